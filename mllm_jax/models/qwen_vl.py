"""Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL: packed patches, M-RoPE, deepstack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mllm_jax.checkpoints.architectures import architecture, model_type, nameless
from mllm_jax.checkpoints.config_json import check_written, stored_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.checkpoints.table import Table, families, nested
from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.image_processors import ImageProcessor, read_image_processor
from mllm_jax.data.image_steps import mismatch
from mllm_jax.data.images import Size
from mllm_jax.data.message import Image, Part
from mllm_jax.data.processing.layouts import Layout
from mllm_jax.data.processing.media import TEXT, Collated, PreparedMedia, Row
from mllm_jax.data.units import in_words
from mllm_jax.data.video import FrameSampling, FrameTimes
from mllm_jax.data.video_settings import QWEN2 as QWEN2_FRAMES
from mllm_jax.data.video_settings import QWEN3 as QWEN3_FRAMES
from mllm_jax.data.video_settings import for_video, read_frames, read_sampling
from mllm_jax.encoders import qwen_vit
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.requirements import Requirements
from mllm_jax.llms import qwen
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.multimodal import Branch, MultimodalConfig

QWEN2, QWEN25, QWEN3 = (f"Qwen{number}VLForConditionalGeneration" for number in ("2", "2_5_", "3"))
_LLMS = {QWEN2: "qwen2", QWEN25: "qwen2", QWEN3: "qwen3"}
_SECTIONS = {QWEN2: (16, 24, 24), QWEN25: (16, 24, 24), QWEN3: (24, 20, 20)}
_OLDER = dict(
    vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1_000_000.0, bos_token_id=151643, eos_token_id=151645,
    max_window_layers=80,
)  # fmt: skip
# Of a video's file: two frames a second, as in Qwen's own code.
SAMPLING = FrameSampling(num_frames=None, fps=2.0, min_frames=4, max_frames=768, multiple=2)
# Defaults of the LLM's options that are absent from config.json.
_DEFAULTS = {QWEN2: _OLDER, QWEN25: _OLDER, QWEN3: dict(rope_theta=500_000.0, max_position_embeddings=128_000)}
# Options of the tokenizer, or that transformers writes into every part.
_IDLE = (
    "vision_start_token_id", "vision_end_token_id", "vision_token_id", "bos_token_id", "eos_token_id", "pad_token_id",
    "text_config", "vision_config", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class QwenVLConfig(MultimodalConfig):
    """The config of the three models.

    Attributes:
        image_token_id, video_token_id: of the placeholders in the text.
    """

    family: str | None = QWEN2
    image_token_id: int = 151655
    video_token_id: int = 151656

    def __post_init__(self):
        super().__post_init__()
        Requirements("Qwen-VL", self).one_of("family", (QWEN2, QWEN25, QWEN3))


class QwenVLLayout(Layout):
    """A layout of images of any size as packed patches, and of videos as patches of several frames each.

    Qwen2.5-VL's positions in time follow from the frames a second. Qwen3-VL writes the mean time of the frames of each
    patch as text before it, "<1.5 seconds>", and the tokens that begin and end an image around it. As in transformers
    5, those tokens also stay around the whole video if the text has them there; transformers 4 drops them.

    Args:
        config: the model's.
        image_processor: of images.
        frames: of the frames of a video; None: as images.
        sampling: of the frames of a video's file.
        tokenizer: for Qwen3-VL's times; None: Qwen3-VL takes no videos.

    Raises:
        ConfigError: a processor makes other patches than the model reads, or the tokenizer lacks the tokens.
    """

    unit = "patch"

    def __init__(
        self,
        config: QwenVLConfig,
        image_processor: ImageProcessor,
        frames: ImageProcessor | None = None,
        sampling: FrameSampling = SAMPLING,
        tokenizer: ChatTokenizer | None = None,
    ):
        self.config, self.image_processor, self.frames = config, image_processor, frames
        self.sampling, self._tokenizer = sampling, tokenizer
        encoder = config.image.encoder
        for each in filter(None, (image_processor, frames)):
            cut = each.patch_size, each.merge_size, each.temporal_patch_size
            if cut != (encoder.patch_size, encoder.merge_size, encoder.temporal_patch_size):
                raise mismatch(
                    f"a {each.kind} that cuts patches of {cut} (side, merged, frames)",
                    f"{(encoder.patch_size, encoder.merge_size, encoder.temporal_patch_size)}, as the model",
                )
        self.image_token = config.image_token_id
        self.needs_times = config.family == QWEN3
        self.video_token = None if self.needs_times and tokenizer is None else config.video_token_id
        if self.needs_times and tokenizer is not None:
            self._edges = [_id_of(tokenizer, name) for name in ("<|vision_start|>", "<|vision_end|>")]

    def sized(self, size: Size) -> PreparedMedia:
        grid = self.image_processor.grid(1, *size)
        return self._placed(grid, np.full(math.prod(grid) // self.config.image.encoder.merge_unit, self.image_token))

    def image(self, image: np.ndarray) -> PreparedMedia:
        patches, _ = self.image_processor.patches(image)
        return replace(self.sized(Size(*image.shape[:2])), arrays={"patches": patches})

    def sized_video(self, size: Size, times: FrameTimes) -> PreparedMedia:
        count = len(times.seconds)
        grid = self._processor(count, size).grid(count, *size)
        tokens = math.prod(grid[1:]) // self.config.image.encoder.merge_unit
        step = self.image_processor.temporal_patch_size
        if not self.needs_times:
            ids = np.full(grid[0] * tokens, self.video_token)
            return replace(self._placed(grid, ids), seconds=step / times.fps)
        seconds = np.pad(times.seconds, (0, -count % step), mode="edge").reshape(-1, step)
        begin, end = self._edges
        ids = []
        for first, last in zip(seconds[:, 0].tolist(), seconds[:, -1].tolist(), strict=True):
            written = self._tokenizer.ids(f"<{(first + last) / 2:.1f} seconds>")
            ids += [*written, begin, *[self.video_token] * tokens, end]
        return self._placed(grid, np.asarray(ids))

    def video(self, frames: np.ndarray, times: FrameTimes) -> PreparedMedia:
        size = Size(*frames.shape[1:3])
        patches, _ = self._processor(len(frames), size).patches(*frames)
        return replace(self.sized_video(size, times), arrays={"patches": patches})

    def _placed(self, grid: tuple[int, int, int], ids: np.ndarray) -> PreparedMedia:
        """Lays out ids with a merged patch at each placeholder of media."""
        here = (ids == self.image_token) | (ids == self.video_token)
        return PreparedMedia({}, ids, np.where(here, np.cumsum(here) - 1, TEXT), grid=grid, count=math.prod(grid))

    def _pixels(self, part: Part, sizes: Sequence[Size]) -> int:
        if isinstance(part, Image):
            return super()._pixels(part, sizes)
        return sum(math.prod(self._processor(len(sizes), size).output_size(*size)) for size in sizes)

    def _processor(self, frames: int, size: Size) -> ImageProcessor:
        """Returns the processor of the frames of a video."""
        return for_video(self.frames or self.image_processor, frames, size)

    def collate(self, rows: Sequence[Sequence[PreparedMedia]], slots: Mapping[str, int] | None = None) -> Collated:
        """Collates media into `slots` patches a row; None: the patches of the fullest row."""
        tower = self.config.image.encoder
        counts = [[len(m.arrays["patches"]) for m in row] for row in rows]
        needed = max((sum(row) for row in counts), default=0)
        size = needed if slots is None else slots.get("image", 0)
        if needed > size or size % tower.merge_unit:
            raise DataError(
                f"a row with {in_words({'image': needed}, self.unit)} and slots for {size:,}",
                f"at least this number of slots, a multiple of {tower.merge_unit}",
                "change `slots`, which count patches here; resize the images, or give it fewer",
            )
        first = [list(np.cumsum([0, *row])[:-1] // tower.merge_unit) for row in counts]
        if size == 0:
            return Collated({}, first)
        where = tower.lay_out([[m.grid for m in row] for row in rows], size)
        none = np.zeros((0, tower.patch_values), np.float32)
        patches = where.gather(np.concatenate([none, *(m.arrays["patches"] for row in rows for m in row)]))
        names = dict(segments=where.segments, coordinates=where.coordinates, grids=where.grids)
        return Collated({"patches": patches} | {f"patch_{name}": x for name, x in names.items()}, first)

    def positions(self, row: Row, media: Sequence[PreparedMedia]) -> np.ndarray:
        tower = self.config.image.encoder
        return mrope_positions(row, media, tower.merge_size, tower.dialect.tokens_per_second)


def layout(config: QwenVLConfig, folder: Path) -> QwenVLLayout:
    """Returns the layout of a model with its folder's tokenizer and processor settings."""
    third, images = config.family == QWEN3, read_image_processor(folder)
    frames = read_frames(folder, QWEN3_FRAMES if third else QWEN2_FRAMES, images)
    usual = replace(SAMPLING, multiple=1, position="ends") if third else SAMPLING
    return QwenVLLayout(
        config, images, frames, read_sampling(folder, usual), ChatTokenizer.load(folder) if third else None
    )


def _id_of(tokenizer: ChatTokenizer, token: str) -> int:
    number = tokenizer.id_of(token)
    if number is None:
        raise ConfigError(
            f"a tokenizer without {token!r}", "the tokens around a frame of Qwen3-VL", "restore its files"
        )
    return number


def mrope_positions(
    row: Row, media: Sequence[PreparedMedia], merge_size: int, tokens_per_second: int | None
) -> np.ndarray:
    """Returns M-RoPE positions int[L, 3]: equal coordinates for text; time, height and width for an image or video.

    An image starts at the position after the text before it. The text after it continues at that start plus the longer
    side in media tokens, whatever time a video takes.

    Args:
        merge_size: side of the square of patches that is one media token.
        tokens_per_second: steps of a video's time coordinate for each of its `seconds`; None: one a frame step.
    """
    positions = np.zeros((len(row.tokens), 3), np.int32)
    owners = np.where(row.places[:, 0] >= 0, row.owners, -1)  # -1: text, also the times between patches of a video
    here = start = 0
    while here < len(row.tokens):
        owner = owners[here]
        stop = here + int(np.argmin(np.append(owners[here:] == owner, False)))
        if owner < 0:
            positions[here:stop] = (start + np.arange(stop - here))[:, None]
            start += stop - here
        else:
            _, height, width = media[owner].grid
            sides = height // merge_size, width // merge_size
            grid = np.indices(((stop - here) // math.prod(sides), *sides)).reshape(3, -1).T
            if tokens_per_second is not None and media[owner].seconds is not None:
                # in float32 and cut off, as the reference: above 2 frames a second several steps may share a position
                step = np.float32(tokens_per_second) * np.float32(media[owner].seconds)
                grid[:, 0] = (grid[:, 0].astype(np.float32) * step).astype(np.int64)
            positions[here:stop] = start + grid
            start += max(height, width) // merge_size
        here = stop
    return positions


# ---- Hugging Face folders


def from_hf_config(values: dict) -> QwenVLConfig:
    """Reads config.json, nested or flat (Qwen2-VL's first files); each option is honoured or refused by name."""
    family = architecture(values, QWEN2, QWEN25, QWEN3)
    what = f"config.json of {family}"
    own = ("image_token_id", "video_token_id", "architectures", "model_type", *_IDLE)
    flat = values.get("text_config") is None
    whole = ConfigOptions(values, what)
    text = {name: value for name, value in values.items() if name not in own[:4] + ("vision_config",)}
    text = text if flat else whole.part("text_config")
    # Before version 5, transformers wrote this option into the LLM's part.
    tied = whole.flag("tie_word_embeddings", False) or ConfigOptions(text, what).flag("tie_word_embeddings", False)
    options = ConfigOptions(values if not flat else {n: v for n, v in values.items() if n in own}, what)
    options.skip("architectures", "model_type", *_IDLE)
    tower = qwen_vit.from_hf_config(dict(model_type=model_type(family), vision_config=whole.part("vision_config", {})))
    config = QwenVLConfig(
        inputs={"image": Branch(tower)},
        llm=read_mrope_llm(
            text | {"tie_word_embeddings": tied}, what, _LLMS[family], _DEFAULTS[family], _SECTIONS[family], _IDLE[:3]
        ),
        image_token_id=options.id("image_token_id", 151655),
        video_token_id=options.id("video_token_id", 151656),
        family=family,
    )
    options.done()
    return config


def read_mrope_llm(
    text: dict, what: str, kind: str, usual: Mapping, sections: Sequence[int], idle: Sequence[str] = ()
) -> DecoderConfig:
    """Reads the options of a Qwen2 or Qwen3 with M-RoPE.

    Args:
        kind: its model_type, "qwen2" or "qwen3", whose M-RoPE is interleaved.
        usual: values of absent options.
        sections: those of M-RoPE if they are absent.
        idle: options to pass over.
    """
    left = {n: v for n, v in text.items() if n not in ("architectures", "rope_scaling", "rope_parameters", *idle)}
    options = ConfigOptions(text, f"text_config of {what}")
    rope = options.part("rope_scaling", {}) or options.part("rope_parameters", {})
    sections = ConfigOptions(rope, f"rope options in {what}").counts("mrope_section", sections)
    rope.pop("mrope_section", None)
    rope.pop("mrope_interleaved", None)  # Qwen3-VL's always are
    old = rope.pop("type", None)
    rope.setdefault("rope_type", old or "default")
    if rope["rope_type"] == "mrope":
        rope["rope_type"] = "default"
    rope.setdefault("rope_theta", options.number("rope_theta", usual["rope_theta"]))
    left = dict(usual) | left | dict(model_type=kind, rope_parameters=rope)
    left.pop("rope_theta", None)
    read = qwen.from_hf_config({name: value for name, value in left.items() if name != "use_mrope"})
    return change_fields(read, mrope_sections=sections, mrope_interleaved=kind == "qwen3")


def write_mrope_llm(llm: DecoderConfig) -> dict:
    """Returns the options of an LLM with M-RoPE: the inverse of `read_mrope_llm`."""
    text = qwen.to_hf_config(change_fields(llm, mrope_sections=(), mrope_interleaved=False))
    text.pop("architectures")
    rope = dict(text.pop("rope_scaling") or {"rope_type": "default"})
    rope |= dict(rope_theta=text.pop("rope_theta"), mrope_section=list(llm.dialect.mrope_sections))
    return text | dict(rope_parameters=rope)


def to_hf_config(config: QwenVLConfig) -> dict:
    """Writes config.json; refuses options that the family does not have."""
    llm, kind = config.llm, model_type(config.family)
    vision = nameless(qwen_vit.to_hf_config(config.image.encoder))
    if config.family == QWEN3:
        vision["model_type"] = kind
    written = dict(
        architectures=[config.family],
        model_type=kind,
        text_config=write_mrope_llm(llm) | dict(model_type=f"{kind}_text"),
        vision_config=vision,
        tie_word_embeddings=llm.tie_word_embeddings,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
    )
    return check_written(config, written, from_hf_config, "a Qwen-VL", _facts)


def _facts(c: QwenVLConfig) -> dict:
    """Returns the values that config.json must keep, also of the parts, whose own files have no M-RoPE."""
    parts = dict(encoder=stored_fields(c.image.encoder), llm=stored_fields(c.llm))
    return stored_fields(c, "inputs", "llm") | parts


def table(config: QwenVLConfig) -> Table:
    tower, llm = qwen_vit.table(config.image.encoder), qwen.table(config.llm)
    if config.family == QWEN3:
        visual, text = "model.visual.", "model.language_model."
        spellings = ((r"^visual\.", visual), (r"^model\.(?!visual\.|language_model\.)", text))
    else:
        visual, text = "visual.", "model."
        spellings = ((r"^model\.visual\.", visual), (r"^model\.language_model\.", text))
    own = [
        replace(weight, name=weight.name.replace("model.", text, 1)) if weight.name.startswith("model.") else weight
        for weight in nested(llm, "", "llm/")
    ]
    return Table((*nested(tower, visual, "encoder_image/"), *own), spellings, (*llm.ignored,))


FAMILIES = families(
    {QWEN2: "Qwen2-VL", QWEN25: "Qwen2.5-VL", QWEN3: "Qwen3-VL"},
    from_hf=from_hf_config,
    to_hf=to_hf_config,
    table=table,
    layout=layout,
)
