"""BLIP-2 (arXiv 2301.12597): a frozen image encoder, a Q-Former, and OPT or Flan-T5, which reads the queries first.

Includes the code that InstructBLIP shares.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mllm_jax.checkpoints.architectures import BEFORE, find, kind_of, llms_inside, nameless, of_type
from mllm_jax.checkpoints.config_json import check_written, stored_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Family, Table, Weight, families, nested
from mllm_jax.data.image_processors import ImageProcessor, read_image_processor
from mllm_jax.data.images import Size
from mllm_jax.data.processing.layouts import TileLayout
from mllm_jax.data.processing.media import PreparedMedia
from mllm_jax.data.video import FrameTimes
from mllm_jax.encoders import eva
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.llms import t5
from mllm_jax.models.clip import CLIP_MEAN, CLIP_STD
from mllm_jax.models.multimodal import Branch, Connection, MultimodalConfig
from mllm_jax.models.parts import family_of
from mllm_jax.projectors.qformer_hub import qformer_weights, read_qformer, write_qformer

FAMILY = "Blip2ForConditionalGeneration"


@dataclass(frozen=True)
class Blip2Config(MultimodalConfig):
    """The config of BLIP-2, whose queries precede the text and its first token.

    Attributes:
        image_token_id: the token id at a query's position; None: an old config.json has none, and the processor
            refuses images.
    """

    image_token_id: int | None = None
    family: str | None = FAMILY


# ---- config.json and weights


def read_encoder(values: Mapping | None) -> ViTConfig:
    """Reads `vision_config`, and adds the mean and the standard deviation of images, which all these models share."""
    return replace(eva.FAMILY.from_hf(dict(values or {})), image_mean=CLIP_MEAN, image_std=CLIP_STD)


def read_parts(values: Mapping, family: str, llms: Sequence[str], text: bool | None) -> dict:
    """Reads the fields that BLIP-2 and InstructBLIP spell alike.

    Args:
        llms: model types of the language models that the architecture supports, the default first.
        text: see `read_qformer`.

    Raises:
        ConfigError: an option is not supported.
    """
    options = ConfigOptions(values, f"config.json of {family}")
    options.skip("vision_config", "qformer_config", "text_config")
    # The model type decides: old files spell the architecture in various ways.
    llm_values = nameless(options.part("text_config", {}))
    kind = ConfigOptions({"model_type": llms[0]} | llm_values, f"text_config of {family}").only("model_type", *llms)
    llm, encoder = (
        family_of(of_type(kind)).from_hf({"model_type": kind} | llm_values),
        read_encoder(options.part("vision_config", {})),
    )
    projector = read_qformer(
        options.part("qformer_config", {}),
        family,
        text=text,
        output_size=llm.hidden_size,
        feature_size=encoder.hidden_size,
        num_queries=options.size("num_query_tokens", 32),
    )
    image_token = options.id("image_token_index", options.id("image_token_id"))
    # The language model's own config decides what this one repeats.
    options.skip("use_decoder_only_language_model", "tie_word_embeddings", "image_text_hidden_size")
    options.skip("bos_token_id", "eos_token_id", "pad_token_id")
    options.done()
    inputs = {"image": Branch(encoder, projector, Connection(class_token=True))}
    return dict(inputs=inputs, llm=llm, image_token_id=image_token, family=family)


def write_parts(config: Blip2Config, prefix: str) -> dict:
    """Writes the options that `read_parts` reads.

    Args:
        prefix: the beginning of the parts' model types.
    """
    vision = eva.FAMILY.to_hf(config.image.encoder) | dict(model_type=f"{prefix}_vision_model")
    return dict(
        **kind_of(config.family),
        vision_config=nameless(vision),
        qformer_config=write_qformer(config.image.projector, f"{prefix}_qformer"),
        text_config=_llm(config).to_hf(config.llm),
        num_query_tokens=config.image.projector.num_queries,
        image_token_index=config.image_token_id,
        use_decoder_only_language_model=not config.encoder_decoder,
        tie_word_embeddings=config.llm.tie_word_embeddings,
    )


def faithful(config: Blip2Config, written: dict, read) -> dict:
    """Returns `written` if it holds the whole config; the parts check their own values."""

    def facts(c):
        parts = dict(connection=c.image.connection, projector=stored_fields(c.image.projector))
        return stored_fields(c, "inputs", "llm") | parts

    return check_written(config, written, read, "a composed model", facts)


def _llm(config: Blip2Config) -> Family:
    """Returns the family of the language model. Raises ConfigError if these models do not support it."""
    part = find(config.llm.family)
    if part is None or BEFORE not in part.media:
        kinds = dict.fromkeys(part.model_type for part in llms_inside(BEFORE))
        raise ConfigError(f"{config.family} over {config.llm.family}", f"one of {', '.join(kinds)}", "change the LLM")
    return family_of(part)


def from_hf_config(values: dict) -> Blip2Config:
    """Reads config.json of Blip2ForConditionalGeneration; each option is honoured or refused by name."""
    return Blip2Config(**read_parts(values, FAMILY, ("opt", "t5"), text=False))


def to_hf_config(config: Blip2Config) -> dict:
    """Writes config.json; refuses options that the family does not have."""
    return faithful(config, write_parts(config, "blip_2"), from_hf_config)


def settle(config: Blip2Config, stored: Collection[str]) -> Blip2Config:
    """Settles a T5 by the stored tensors, see `t5.settle`."""
    return replace(config, llm=t5.settle(config.llm, stored)) if isinstance(config.llm, t5.T5Config) else config


def table_of(config: Blip2Config, projector: tuple[Weight, ...]) -> Table:
    """Returns the weights of the model; `projector` has those of the Q-Former."""
    vision, llm = eva.FAMILY.table(config.image.encoder), _llm(config).table(config.llm)
    weights = nested(vision, "vision_model.", "encoder_image/") + projector + nested(llm, "language_model.", "llm/")
    ignored = tuple(f"language_model.{name}" for name in llm.ignored) + (
        "qformer.embeddings.position_ids", "embeddings.position_ids",
    )  # fmt: skip
    return Table(weights, (), ignored)


def table(config: Blip2Config) -> Table:
    return table_of(config, qformer_weights(config.image.projector))


# ---- images


class QueryLayout(TileLayout):
    """Images of one size; their queries precede the text and its first token."""

    inserts_images = True

    def __init__(self, config: Blip2Config, folder: Path):
        if config.image_token_id is None:
            raise ConfigError(
                f"{folder}: a config.json without image_token_index",
                "the id of <image> in the tokenizer, which current versions of the checkpoint have",
                "fetch config.json and the tokenizer's files again",
            )
        self.image_token = config.image_token_id
        self.tokens_a_tile = config.image.projector.num_queries
        self._read = pixel_reader(config.image.encoder, folder)

    def sized(self, size: Size) -> PreparedMedia:
        self._read.processor.require(size)
        return PreparedMedia({}, np.full(self.tokens_a_tile, self.image_token), np.arange(self.tokens_a_tile), count=1)

    def image(self, image: np.ndarray) -> PreparedMedia:
        return replace(self.sized(Size(*image.shape[:2])), arrays={"images": self._read(image)[None]})

    def video(self, frames: np.ndarray, times: FrameTimes) -> PreparedMedia:
        raise DataError(f"a video of {len(frames)} frames for a model of images", "images", "give the frames as images")

    def arrange(self, ids: list[int], media: int) -> list[int]:
        return ids if self.image_token in ids else [self.image_token] * media + ids


@dataclass(frozen=True)
class PixelReader:
    """A folder's image processor as a function from uint8[h, w, 3] to [H, W, 3].

    Attributes:
        keeps_bytes: whether it returns bytes, which the model normalises; else normalised float32.
    """

    processor: ImageProcessor
    keeps_bytes: bool

    def __call__(self, image: np.ndarray) -> np.ndarray:
        pixels = self.processor(image)
        return pixels.astype(np.uint8) if self.keeps_bytes else pixels


def pixel_reader(encoder: ViTConfig, folder: Path) -> PixelReader:
    """Returns the reader of a folder; it keeps bytes if the model normalises them as the processor does.

    Raises:
        ConfigError: the processor's image size is not the encoder's.
    """
    processor: ImageProcessor = read_image_processor(folder)
    wanted = (encoder.image_size,) * 2
    if (processor.crop_size or processor.size) != wanted:
        raise ConfigError(
            f"{folder}: images of {processor.crop_size or processor.size} pixels",
            f"those of the image encoder, {wanted}",
            "make preprocessor_config.json and config.json agree",
        )
    normalised = (processor.mean, processor.std, processor.rescale_factor)
    if normalised != (tuple(encoder.image_mean), tuple(encoder.image_std), 1 / 255):
        return PixelReader(processor, keeps_bytes=False)
    return PixelReader(replace(processor, mean=None, std=None, rescale_factor=None), keeps_bytes=True)


FAMILIES = families(
    {FAMILY: "BLIP-2"}, from_hf=from_hf_config, to_hf=to_hf_config, table=table, layout=QueryLayout, settle=settle
)
