"""LLaVA-1.5 (arXiv 2310.03744), LLaVA-NeXT and LLaVA-OneVision (arXiv 2408.03326): ViT, MLP, decoder-only LLM.

An image of LLaVA-1.5 is one tile. LLaVA-NeXT adds tiles in high resolution and a newline vector after each of their
rows. LLaVA-OneVision reduces the features of many tiles, and takes several images, one tile each, and videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mllm_jax.checkpoints.architectures import architecture, find, kind_of, of_type
from mllm_jax.checkpoints.config_json import check_written, stored_fields, write_activation
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Family, Table, Weight, families, linear, nested
from mllm_jax.data.image_processors import ImageProcessor, read_image_processor, read_video_processor
from mllm_jax.data.image_steps import mismatch
from mllm_jax.data.images import Size
from mllm_jax.data.processing.layouts import TileLayout
from mllm_jax.data.processing.media import PreparedMedia
from mllm_jax.data.tiles import Places, anyres_places, best_resolution, tile_places, video_places
from mllm_jax.data.video import FIVE_FRAMES, FrameSampling, FrameTimes
from mllm_jax.data.video_settings import read_sampling
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.layers.requirements import Requirements
from mllm_jax.models.clip import CLIP_MEAN, CLIP_STD
from mllm_jax.models.multimodal import Branch, Connection, MultimodalConfig
from mllm_jax.models.parts import family_of, llm_table, read_llm, write_llm
from mllm_jax.projectors.mlp import MLPProjectorConfig

LLAVA, NEXT, ONEVISION = (f"Llava{name}ForConditionalGeneration" for name in ("", "Next", "Onevision"))
_TOWERS = ("clip_vision_model", "siglip_vision_model")  # `model_type` of vision_config; the first is the default
NEXT_RESOLUTIONS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ONEVISION_RESOLUTIONS = tuple((384 * down, 384 * across) for down in range(1, 7) for across in range(1, 7))
_ANYRES = "anyres_max_"


@dataclass(frozen=True)
class LlavaConfig(MultimodalConfig):
    """The config of LLaVA.

    Attributes:
        image_token_id, video_token_id: of the placeholders in the text.
        resolutions: (height, width) to which an image may be resized before it is cut into tiles; empty: one tile.
        max_tiles: features of more tiles are resized to about this number; None: never.
        preprocessing: "hub", as in transformers, or "original", as in the authors' repository: LLaVA-1.5 pads images
            to squares with the mean colour, LLaVA-NeXT and LLaVA-OneVision leave out more rows at the margins of some
            (see `mllm_jax.data.tiles.unpadded`). No config.json has it.
    """

    family: str | None = LLAVA
    image_token_id: int = 32000
    video_token_id: int | None = None
    resolutions: tuple[tuple[int, int], ...] = ()
    max_tiles: int | None = None
    preprocessing: str = "hub"

    placeholder_fields = ("image_token_id", "video_token_id")  # the only ids that its layout needs of a tokenizer

    def __post_init__(self):
        super().__post_init__()
        require = Requirements("LLaVA", self)
        require.one_of("family", (LLAVA, NEXT, ONEVISION))
        require.one_of("preprocessing", ("hub", "original"))
        tiled = self.family != LLAVA
        require(
            tiled == bool(self.resolutions) == self.newline,
            f"{self.family} with {len(self.resolutions)} resolutions and newline={self.newline}",
            "resolutions and a newline vector in LLaVA-NeXT and LLaVA-OneVision, neither in LLaVA-1.5",
            "change resolutions or newline, or family",
        )
        require(
            not tiled or self.media_tokens == self.image.encoder.grid**2,
            "tiles whose class token is read: vision_feature_select_strategy 'full'",
            "tiles whose features are a grid: strategy 'default' for an encoder with a class token",
            "leave out connection.class_token",
        )
        side = self.image.encoder.image_size
        require(
            not any(length % side for resolution in self.resolutions for length in resolution),
            f"resolutions {self.resolutions} for tiles of {side}",
            "whole tiles",
            "change both, as mllm_jax.with_image_size(config, size) does",
        )

    @property
    def neighbours(self) -> int:
        """The most media tokens in a weighted sum: 4 in the resized features of LLaVA-OneVision."""
        return 4 if self.family == ONEVISION else 1


def _places(c: LlavaConfig, size: tuple[int, int]) -> Places:
    """Returns the positions of an image of this size that is cut into tiles."""
    target, encoder = best_resolution(size, c.resolutions), c.image.encoder
    return anyres_places(size, target, encoder.image_size, encoder.grid, c.max_tiles, c.preprocessing == "hub")


# ---- images


class LlavaLayout(TileLayout):
    """The layout of LLaVA's images and videos.

    Args:
        config: the model's.
        image_processor, frames: processors of images and of frames; frames None: the model takes no videos.
        sampling: of the frames of a video's file.

    Raises:
        ConfigError: a processor makes other tiles than the model reads.
    """

    def __init__(
        self,
        config: LlavaConfig,
        image_processor: ImageProcessor,
        frames: ImageProcessor | None = None,
        sampling: FrameSampling = FIVE_FRAMES,
    ):
        side = config.image.encoder.image_size
        if config.preprocessing == "original" and config.family == LLAVA:
            mean = image_processor.mean or config.image.encoder.image_mean
            image_processor = replace(image_processor, background=tuple(int(x * 255) for x in mean))
        for each in filter(None, (image_processor, frames)):
            made = {each.output_size(*size) for size in ((side, 2 * side), (2 * side, side))}
            if made != {(side, side)}:
                raise mismatch(f"a {each.kind} that makes tiles of {sorted(made)}", f"{side} x {side} pixels")
        if (image_processor.resolutions, image_processor.tile_size * bool(config.resolutions)) != (
            config.resolutions,
            side * bool(config.resolutions),
        ):
            raise mismatch(
                f"a {image_processor.kind} that cuts tiles of {image_processor.tile_size} out of"
                f" {image_processor.resolutions}",
                f"tiles of {side} out of {config.resolutions}, as the model",
            )
        self.config, self.image_processor, self.frames = config, image_processor, frames
        self.sampling = sampling
        self.image_token, self.video_token = config.image_token_id, config.video_token_id
        self.tokens_a_tile, self.unit = config.media_tokens, "tile" if config.resolutions else "image"

    def sized(self, size: Size) -> PreparedMedia:
        count = self.image_processor.count(*size)
        tiled = self.config.resolutions
        return self._placed(_places(self.config, size) if tiled else Places(np.arange(self.tokens_a_tile)), count)

    def image(self, image: np.ndarray) -> PreparedMedia:
        """Prepares the only image of a text."""
        return self._filled(self.image_processor.tiles(image), self.sized(Size(*image.shape[:2])))

    def all_sized(self, sizes: Sequence[Size]) -> list[PreparedMedia]:
        if not self._one_each(len(sizes)):
            return super().all_sized(sizes)
        for size in sizes:
            self.image_processor.require(size)
        return [self._placed(tile_places(self.config.image.encoder.grid), 1) for _ in sizes]

    def images(self, images: Sequence[np.ndarray]) -> list[PreparedMedia]:
        if not self._one_each(len(images)):
            return super().images(images)
        media = self._placed(tile_places(self.config.image.encoder.grid), 1)
        return [self._filled(self.image_processor.prepare(image)[None], media) for image in images]

    def _one_each(self, images: int) -> bool:
        """Returns whether each image is one tile, as in LLaVA-OneVision for several images."""
        return self.config.family == ONEVISION and images != 1

    def sized_video(self, size: Size, times: FrameTimes) -> PreparedMedia:
        self.frames.require(size)
        frames = len(times.seconds)
        return self._placed(video_places(frames, self.config.image.encoder.grid), frames, self.video_token)

    def video(self, frames: np.ndarray, times: FrameTimes) -> PreparedMedia:
        """Prepares each frame as one tile, whose features are resized to half the sides."""
        tiles = np.stack([self.frames.prepare(frame) for frame in frames])
        return self._filled(tiles, self.sized_video(Size(*frames.shape[1:3]), times), self.frames)

    def _placed(self, where: Places, count: int, token: int | None = None) -> PreparedMedia:
        tokens = np.full(len(where.places), self.image_token if token is None else token)
        return PreparedMedia({}, tokens, where.places, where.weights, count=count)

    def _filled(
        self, tiles: np.ndarray, media: PreparedMedia, processor: ImageProcessor | None = None
    ) -> PreparedMedia:
        processor, encoder = processor or self.image_processor, self.config.image.encoder
        return replace(media, arrays={"images": processor.for_encoder(tiles, encoder)})


def layout(config: LlavaConfig, folder: Path) -> LlavaLayout:
    """Returns the layout of a model with its folder's processor settings."""
    frames = None if config.video_token_id is None else read_video_processor(folder)
    return LlavaLayout(config, read_image_processor(folder), frames, read_sampling(folder, FIVE_FRAMES))


# ---- Hugging Face folders


def from_hf_config(values: dict) -> LlavaConfig:
    """Reads config.json of any of the three; each option is honoured or refused by name."""
    family = architecture(values, LLAVA, NEXT, ONEVISION)
    what = f"config.json of {family}"
    options = ConfigOptions(values, what)
    encoder = _read_tower(options.part("vision_config"), what)
    text = options.part("text_config")
    # transformers also reads this from the LLM's part, except in LLaVA-NeXT.
    tied = options.flag("tie_word_embeddings", False) or (
        family != NEXT and ConfigOptions(text, f"text_config of {what}").flag("tie_word_embeddings", False)
    )
    text.setdefault("model_type", "llama")
    llm = read_llm(text | {"tie_word_embeddings": tied}, what)
    layers = options.integers("vision_feature_layer", (-1 if family == ONEVISION else -2,))
    keeps = options.only(
        "vision_feature_select_strategy", "default", "full", default="full" if family == ONEVISION else "default"
    )
    if keeps == "default" and not encoder.class_token:
        raise ConfigError(
            f"{what}: vision_feature_select_strategy='default' for a {encoder.family}",
            "'full': without a class token 'default' would drop a patch",
            "convert another checkpoint, or mend its config.json",
        )
    projector = MLPProjectorConfig(
        output_size=llm.hidden_size,
        activation=options.activation("projector_hidden_act", default="gelu"),
        use_bias=options.flag("multimodal_projector_bias", True),
    )
    connection = Connection(_existing(layers, encoder, what), class_token=keeps == "full" and encoder.class_token)
    read = dict(
        inputs={"image": Branch(encoder, projector, connection)},
        llm=llm,
        image_token_id=options.id(
            "image_token_index", options.id("image_token_id", 151646 if family == ONEVISION else 32000)
        ),
        family=family,
    )
    if family != LLAVA:
        usual = ONEVISION_RESOLUTIONS if family == ONEVISION else NEXT_RESOLUTIONS
        read |= dict(newline=True, resolutions=_resolutions(options, usual, what))
        options.only("use_image_newline_parameter", True)
    if family == ONEVISION:
        most = options.text("vision_aspect_ratio", f"{_ANYRES}9")
        if not (most.startswith(_ANYRES) and most.removeprefix(_ANYRES).isdecimal()):
            raise ConfigError(f"{what}: vision_aspect_ratio={most!r}", f"{_ANYRES}9 or another number", "mend it")
        read |= dict(max_tiles=int(most.removeprefix(_ANYRES)))
        read |= dict(video_token_id=options.id("video_token_index", options.id("video_token_id", 151647)))
    # Options of training, generation or the processor; vocab_size repeats the LLM's.
    options.skip("ignore_index", "pad_token_id", "bos_token_id", "eos_token_id", "image_seq_length", "vocab_size")
    options.done()
    return LlavaConfig(**read)


def _existing(layers: tuple[int, ...], encoder: ViTConfig, what: str) -> tuple[int, ...]:
    """Refuses hidden states that the encoder does not have: 0 to num_layers, or counted from the end."""
    if not layers or not all(-encoder.num_layers - 1 <= layer <= encoder.num_layers for layer in layers):
        raise ConfigError(
            f"{what}: vision_feature_layer={list(layers)}",
            f"hidden states of an encoder of {encoder.num_layers} layers",
            "restore config.json from its origin",
        )
    return layers


def _resolutions(options: ConfigOptions, usual: Sequence, what: str) -> tuple[tuple[int, int], ...]:
    listed = options.resolutions("image_grid_pinpoints", usual)
    if not listed:
        raise ConfigError(f"{what}: image_grid_pinpoints=[]", "at least one [height, width]", "leave it out")
    return tuple(map(tuple, listed))


def _read_tower(values: dict, what: str) -> ViTConfig:
    kind = ConfigOptions(values, f"vision_config of {what}").text("model_type", _TOWERS[0])
    if kind not in _TOWERS:
        raise ConfigError(f"{what}: an image encoder {kind!r}", " or ".join(_TOWERS), "convert another checkpoint")
    # Image encoders from a whole CLIP have the vocabulary of its text encoder.
    tower = family_of(of_type(kind)).from_hf(
        {name: value for name, value in values.items() if name not in ("architectures", "vocab_size")}
    )
    return replace(tower, image_mean=CLIP_MEAN, image_std=CLIP_STD) if kind == _TOWERS[0] else tower


def to_hf_config(config: LlavaConfig) -> dict:
    """Writes config.json; refuses options that the family does not have."""
    layers, llm = config.image.connection.layers, config.llm
    full = config.image.connection.class_token or not config.image.encoder.class_token
    written = dict(
        **kind_of(config.family),
        vision_config=_tower(config.image.encoder).to_hf(config.image.encoder),
        text_config=write_llm(llm, "a LLaVA"),
        tie_word_embeddings=llm.tie_word_embeddings,
        image_token_index=config.image_token_id,
        projector_hidden_act=write_activation(config.image.projector.activation),
        multimodal_projector_bias=config.image.projector.use_bias,
        vision_feature_layer=layers[0] if layers and len(layers) == 1 else layers and list(layers),
        vision_feature_select_strategy="full" if full else "default",
    )
    if config.family != ONEVISION:
        written |= dict(image_seq_length=config.media_tokens)
    if config.family != LLAVA:
        written |= dict(image_grid_pinpoints=[list(resolution) for resolution in config.resolutions])
    if config.family == ONEVISION:
        written |= dict(vision_aspect_ratio=f"{_ANYRES}{config.max_tiles}", video_token_index=config.video_token_id)
    return check_written(config, written, from_hf_config, "a LLaVA", _facts)


def _facts(c: LlavaConfig) -> dict:
    """Returns the values of the whole model that config.json must keep; the parts check their own."""
    p = c.image.projector
    projector = stored_fields(p, "hidden_size") | dict(hidden_size=p.hidden_size or p.output_size)
    return stored_fields(c, "inputs", "llm", "preprocessing") | dict(connection=c.image.connection, projector=projector)


def _tower(encoder: ViTConfig) -> Family:
    """Returns the family for writing an image encoder."""
    found = find(encoder.family)
    if found is not None and found.model_type in _TOWERS:
        return family_of(found)
    raise ConfigError(f"LLaVA with a {encoder.family}", f"one of {', '.join(_TOWERS)}", "choose another encoder")


def table(config: LlavaConfig) -> Table:
    tower = _tower(config.image.encoder).table(config.image.encoder)
    llm = llm_table(config.llm, "a LLaVA")
    weights = list(nested(tower, "vision_tower.", "encoder_image/") + nested(llm, "language_model.", "llm/"))
    for layer in range(1, config.image.projector.num_layers + 1):
        name = f"linear_{layer}"
        weights += linear(
            f"multi_modal_projector.{name}", f"projector_image/{name}", bias=config.image.projector.use_bias
        )
    if config.newline:
        weights.append(Weight("image_newline", "newline"))
    spellings = (
        (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^vision_tower\.(embeddings|pre_layrnorm|encoder|post_layernorm|head)\.", r"vision_tower.vision_model.\1."),
    )
    ignored = [f"vision_tower.{name}" for name in tower.ignored] + [f"language_model.{name}" for name in llm.ignored]
    return Table(tuple(weights), spellings, tuple(ignored))


FAMILIES = families(
    {LLAVA: "LLaVA-1.5", NEXT: "LLaVA-NeXT", ONEVISION: "LLaVA-OneVision"},
    from_hf=from_hf_config,
    to_hf=to_hf_config,
    table=table,
    layout=layout,
)
