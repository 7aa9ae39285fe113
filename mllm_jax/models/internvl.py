"""InternVL 2.5 and 3 (arXiv 2412.05271, 2504.10479): InternViT on dynamic tiles, pixel shuffle and MLP, a decoder.

Supports Hugging Face's `InternVLForConditionalGeneration` and OpenGVLab's `InternVLChatModel`, with the same weights:
`dataclasses.replace(config, family=...)` converts one to the other, unless the shuffle is "v1".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mllm_jax.checkpoints.architectures import architecture, kind_of
from mllm_jax.checkpoints.config_json import check_written, stored_fields, write_activation
from mllm_jax.checkpoints.config_options import ConfigOptions, named_as
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.checkpoints.table import Table, families, linear, nested, norm
from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.image_processors import ImageProcessor, read_image_processor, read_video_processor
from mllm_jax.data.image_steps import mismatch
from mllm_jax.data.images import Size
from mllm_jax.data.processing.layouts import TileLayout
from mllm_jax.data.processing.media import TEXT, PreparedMedia
from mllm_jax.data.video import FrameSampling, FrameTimes
from mllm_jax.data.video_settings import read_sampling
from mllm_jax.encoders import internvit
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.layers.requirements import Requirements
from mllm_jax.models.multimodal import Branch, Connection, MultimodalConfig
from mllm_jax.models.parts import llm_table, read_llm, write_llm
from mllm_jax.projectors.pixel_shuffle import PixelShuffleProjectorConfig

HUB, ORIGINAL = "InternVLForConditionalGeneration", "InternVLChatModel"
MOST_TILES = 1_024  # limit for the tiles of an image
_TOWERS = {HUB: internvit.HUB, ORIGINAL: internvit.ORIGINAL}
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTEXT_TOKEN = "<IMG_CONTEXT>"


@dataclass(frozen=True)
class InternVLConfig(MultimodalConfig):
    """The config of InternVL.

    Attributes:
        image_token_id: of the token that stands for an image and for each of its media tokens; None: the folder's
            tokenizer decides, as in OpenGVLab's folders.
        tile_range: the least and the most tiles of an image, without the thumbnail; None: the folder's processor
            decides, as in Hugging Face's folders. (1, 1) is a single tile.
    """

    family: str | None = HUB
    image_token_id: int | None = 151667
    tile_range: tuple[int, int] | None = None

    def __post_init__(self):
        super().__post_init__()
        require = Requirements("InternVL", self)
        require.one_of("family", (HUB, ORIGINAL))
        require(
            self.image.encoder.class_token and not self.image.connection.class_token,
            f"an encoder with class_token={self.image.encoder.class_token}, read: {self.image.connection.class_token}",
            "an encoder with a class token, which is left out: the rest is a square to be shuffled",
            "set encoder.class_token and leave out connection.class_token",
        )
        require(
            self.tile_range is None or 1 <= self.tile_range[0] <= self.tile_range[1],
            f"tile_range {self.tile_range}",
            "a least number of at least 1, and a greatest that is no smaller",
            "change tile_range",
        )


# ---- images and videos

SAMPLING = FrameSampling(position="middle")  # of a video's file


class InternVLLayout(TileLayout):
    """A layout of tiles between the tokens that begin and end an image; a video's frames are numbered.

    Args:
        config: the model's.
        tokenizer: the folder's.
        image_processor, frames: processors of images and of frames; frames None: the model takes no videos.
        sampling: of the frames of a video's file.

    Raises:
        ConfigError: a processor makes other tiles than the model reads, or the tokenizer lacks the tokens.
    """

    unit = "tile"

    def __init__(
        self,
        config: InternVLConfig,
        tokenizer: ChatTokenizer,
        image_processor: ImageProcessor,
        frames: ImageProcessor | None = None,
        sampling: FrameSampling = SAMPLING,
    ):
        side = config.image.encoder.image_size
        for each in filter(None, (image_processor, frames)):
            if each.size != (side, side):
                raise mismatch(
                    f"a {each.kind} that makes tiles of {each.size}",
                    f"{side} x {side} pixels, as the model reads",
                )
        if config.tile_range is not None:
            several = config.tile_range[1] > 1
            image_processor = replace(image_processor, tile_range=config.tile_range if several else None)
        self.config, self._backend = config, tokenizer.backend
        self.image_processor, self.frames, self.sampling = image_processor, frames, sampling
        self._ids = self._backend.get_vocab()
        self.begin, self.end = (self._id(f"{which}_image_token", given) for which, given in _EDGES.items())
        own = self._id("context_image_token", CONTEXT_TOKEN)
        self.image_token = own if config.image_token_id is None else config.image_token_id
        named = getattr(self._backend, "video_token", None)
        self.video_token = None if named is None or frames is None else self._id("video_token", named)
        self.tokens_a_tile = config.media_tokens

    def sized(self, size: Size) -> PreparedMedia:
        count = self.image_processor.count(*size)
        return self._placed(count, self._shown(count))

    def image(self, image: np.ndarray) -> PreparedMedia:
        tiles = self.image_processor.tiles(image)
        return self._filled(tiles, self._placed(len(tiles), self._shown(len(tiles))), self.image_processor)

    def sized_video(self, size: Size, times: FrameTimes) -> PreparedMedia:
        """Lays out each frame as one tile, after its number, on a line of its own."""
        self.frames.require(size)
        ids: list[int] = []
        frames = len(times.seconds)
        for number in range(1, frames + 1):
            label = f"Frame{number}: " if number == 1 else f"\nFrame{number}: "
            ids += [*self._backend(label, add_special_tokens=False)["input_ids"], *self._shown(1)]
        return self._placed(frames, ids)

    def video(self, frames: np.ndarray, times: FrameTimes) -> PreparedMedia:
        tiles = np.stack([self.frames.prepare(frame) for frame in frames])
        return self._filled(tiles, self.sized_video(Size(*frames.shape[1:3]), times), self.frames)

    def _shown(self, tiles: int) -> list[int]:
        return [self.begin, *[self.image_token] * (tiles * self.tokens_a_tile), self.end]

    def _placed(self, tiles: int, ids: list[int]) -> PreparedMedia:
        tokens = np.array(ids)
        here = tokens == self.image_token
        return PreparedMedia({}, tokens, np.where(here, np.cumsum(here) - 1, TEXT), count=tiles)

    def _filled(self, tiles: np.ndarray, media: PreparedMedia, processor: ImageProcessor) -> PreparedMedia:
        return replace(media, arrays={"images": processor.for_encoder(tiles, self.config.image.encoder)})

    def _id(self, name: str, usual: str) -> int:
        token = getattr(self._backend, name, None) or usual
        number = self._ids.get(token)
        if number is None:
            raise ConfigError(f"a tokenizer without {token!r}", f"{name}, as InternVL's have it", "restore its files")
        return number


_EDGES = {"start": "<img>", "end": "</img>"}


def layout(config: InternVLConfig, folder: Path) -> InternVLLayout:
    """Returns the layout of a model with its folder's tokenizer and processor settings."""
    tokenizer, side = ChatTokenizer.load(folder), config.image.encoder.image_size
    if config.family == ORIGINAL:
        # Its preprocessor_config.json is CLIP's; OpenGVLab's code does not read it.
        tiles = ImageProcessor("GotOcr2ImageProcessor", (side, side), mean=IMAGE_MEAN, std=IMAGE_STD)
        return InternVLLayout(config, tokenizer, tiles, tiles)
    # transformers' processor always cuts tiles, also if the file of the image processor says otherwise.
    image_processor = read_image_processor(folder, crop_to_patches=True)
    sampling = read_sampling(folder, SAMPLING)
    return InternVLLayout(config, tokenizer, image_processor, read_video_processor(folder), sampling)


# ---- folders


def from_hf_config(values: dict) -> InternVLConfig:
    """Reads config.json of either kind; each option is honoured or refused by name."""
    family = architecture(values, HUB, ORIGINAL)
    options = ConfigOptions(values, f"config.json of {family}")
    return (_read_original if family == ORIGINAL else _read_hub)(options, f"config.json of {family}")


def _read_hub(options: ConfigOptions, what: str) -> InternVLConfig:
    text = options.part("text_config")
    text.setdefault("model_type", "qwen2")
    # The whole model's option takes precedence; if it is absent, as in old files, the LLM's part decides.
    tied = options.flag("tie_word_embeddings", ConfigOptions(text, what).flag("tie_word_embeddings", False))
    llm = read_llm(text | {"tie_word_embeddings": tied}, what)
    options.only("vision_feature_select_strategy", "default")
    options.skip("image_seq_length", "bos_token_id", "eos_token_id", "pad_token_id")
    encoder = _read_tower(options.part("vision_config"), HUB, what)
    projector = PixelShuffleProjectorConfig(
        output_size=llm.hidden_size,
        factor=_factor(options),
        activation=options.activation("projector_hidden_act", default="gelu"),
    )
    read = InternVLConfig(
        inputs={"image": Branch(encoder, projector, _connection(options, "vision_feature_layer", encoder))},
        llm=llm,
        image_token_id=options.id("image_token_id", 151667),
    )
    options.done()
    return read


def _read_original(options: ConfigOptions, what: str) -> InternVLConfig:
    llm = read_llm(options.part("llm_config"), what)
    vision = options.part("vision_config")
    encoder = _read_tower(vision, ORIGINAL, what)
    side = encoder.image_size
    options.only("force_image_size", side, default=side)
    options.only("pad2square", False)
    options.only("use_backbone_lora", 0)
    options.only("use_llm_lora", 0)
    options.only("tie_word_embeddings", False, llm.tie_word_embeddings)
    cuts = options.flag("dynamic_image_size", False)
    if cuts:
        options.only("use_thumbnail", True)
    tiles = options.size("min_dynamic_patch", 1), options.size("max_dynamic_patch", 6, most=MOST_TILES)
    options.skip("template", "use_thumbnail", "image_fold", "hidden_size", "system_message")
    options.skip("bos_token_id", "eos_token_id", "pad_token_id")
    projector = PixelShuffleProjectorConfig(llm.hidden_size, _factor(options), options.only("ps_version", "v1", "v2"))
    read = InternVLConfig(
        inputs={"image": Branch(encoder, projector, _connection(options, "select_layer", encoder))},
        llm=llm,
        family=ORIGINAL,
        image_token_id=None,
        tile_range=tiles if cuts else (1, 1),
    )
    options.done()
    return read


def _connection(options: ConfigOptions, name: str, encoder: ViTConfig) -> Connection:
    """Reads a layer; in both codes -1 is the encoder's output, after its last norm if it has one."""
    layer, *others = options.integers(name, (-1,)) or (None,)
    if others or layer is None or not -encoder.num_layers - 1 <= layer <= encoder.num_layers:
        raise ConfigError(
            f"{name}={[layer, *others]}", f"one hidden state of an encoder of {encoder.num_layers} layers", "mend it"
        )
    return Connection() if layer == -1 else Connection(layers=(layer,))


def _factor(options: ConfigOptions) -> int:
    ratio = options.number("downsample_ratio", 0.5, least=1 / 64, most=1.0)
    factor = round(1 / ratio)
    options.only("downsample_ratio", *([ratio] if factor * ratio == 1 else [0.5, 1.0]), default=ratio)
    return factor


def _read_tower(values: dict, family: str, what: str) -> ViTConfig:
    kind = named_as(values)[1]
    if family == HUB and kind not in (None, "internvl_vision"):
        raise ConfigError(f"{what}: an image encoder {kind!r}", "internvl_vision", "convert another checkpoint")
    tower = _TOWERS[family].from_hf(dict(values) | {"architectures": _TOWERS[family].architectures})
    return replace(tower, image_mean=IMAGE_MEAN, image_std=IMAGE_STD)


def _tower(c: InternVLConfig) -> ViTConfig:
    """Returns the encoder as the family's folders have it, so that either family's model is written as the other's."""
    return change_fields(
        c.image.encoder, family=_TOWERS[c.family].architectures[0], pooler="none" if c.family == HUB else "token"
    )


def to_hf_config(config: InternVLConfig) -> dict:
    """Writes config.json; refuses options that the family does not have."""
    c = config
    vision, text = _TOWERS[c.family].to_hf(_tower(c)), write_llm(c.llm, "an InternVL")
    layer, ratio = c.image.connection.layers, 1 / c.image.projector.factor
    layer = -1 if layer is None else layer[0] if len(layer) == 1 else list(layer)
    written = dict(**kind_of(c.family), downsample_ratio=ratio)
    if c.family == HUB:
        written |= dict(
            vision_config=vision,
            text_config=text,
            tie_word_embeddings=c.llm.tie_word_embeddings,
            image_token_id=c.image_token_id,
            image_seq_length=c.media_tokens,
            projector_hidden_act=write_activation(c.image.projector.activation),
            vision_feature_layer=layer,
            vision_feature_select_strategy="default",
        )
    else:
        least, most = c.tile_range or (1, 12)
        written |= dict(
            vision_config=vision,
            llm_config=text,
            tie_word_embeddings=c.llm.tie_word_embeddings,
            force_image_size=c.image.encoder.image_size,
            select_layer=layer,
            ps_version=c.image.projector.version,
            dynamic_image_size=most > 1,
            use_thumbnail=most > 1,
            min_dynamic_patch=least,
            max_dynamic_patch=most,
        )
    return check_written(c, written, from_hf_config, "an InternVL", _facts)


def _facts(c: InternVLConfig) -> dict:
    """Returns the values of the whole model that config.json must keep; other files hold the rest."""
    return stored_fields(c, "inputs", "llm", "image_token_id", "tile_range") | dict(
        connection=c.image.connection,
        projector=stored_fields(c.image.projector),
        image_token_id=c.image_token_id if c.family == HUB else None,
    )


def table(config: InternVLConfig) -> Table:
    c = config
    hub = c.family == HUB
    tower, llm = _TOWERS[c.family].table(_tower(c)), llm_table(c.llm, "an InternVL")
    vision = "vision_tower." if hub else "vision_model."
    weights = [*nested(tower, vision, "encoder_image/"), *nested(llm, "language_model.", "llm/")]
    prefix, between, first, second = (
        ("multi_modal_projector", "layer_norm", "linear_1", "linear_2") if hub else ("mlp1", "0", "1", "3")
    )
    weights += norm(f"{prefix}.{between}", "projector_image/norm")
    weights += linear(f"{prefix}.{first}", "projector_image/linear_1") + linear(
        f"{prefix}.{second}", "projector_image/linear_2"
    )
    spellings = (
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    )
    ignored = [f"{vision}{name}" for name in tower.ignored] + [f"language_model.{name}" for name in llm.ignored]
    return Table(tuple(weights), spellings if hub else (), tuple(ignored))


_SHARED = dict(from_hf=from_hf_config, to_hf=to_hf_config, table=table, layout=layout)
FAMILIES = (
    *families({HUB: "InternVL 2.5, 3"}, **_SHARED),
    *families({ORIGINAL: "InternVL (OpenGVLab)"}, **_SHARED, oracle="OpenGVLab's code, by its parts"),
)
