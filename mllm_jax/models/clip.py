"""Dual encoders, CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343): images and texts in one vector space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mllm_jax.checkpoints.architectures import kind_of, nameless
from mllm_jax.checkpoints.config_json import ELSEWHERE, Fields, check_written, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Family, Table, Weight, linear, nested
from mllm_jax.data.batch import ONE_IMAGE, BatchSpec, images_spec, text_spec
from mllm_jax.encoders import clip_text, clip_vision, siglip_text, siglip_vision
from mllm_jax.encoders.text_encoder import TextModel, TextOutput, TextTowerConfig
from mllm_jax.encoders.vit import VisionOutput, ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.pixels import normalise_pixels
from mllm_jax.layers.requirements import Requirements
from mllm_jax.models.branch import filled
from mllm_jax.models.contrastive import POOLINGS, ContrastiveHeads

KINDS = ("softmax", "sigmoid")
# Mean and standard deviation of OpenAI's and LAION's images; no config.json has them.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Log scale and bias at the start of training.
INIT = {"softmax": (math.log(1 / 0.07), 0.0), "sigmoid": (math.log(10.0), -10.0)}


@dataclass(frozen=True)
class DualEncoderConfig(WithCompute):
    """The config of two encoders and their heads.

    Attributes:
        vision: the image encoder; None: that of the experiment's model, which the stage then trains.
        projection_size: width of the common space; None: the width of the encoders' vectors, which are not projected.
        kind: "softmax" (CLIP), or "sigmoid" (SigLIP), which has a bias; the loss for its training has the same name.
        pooling, captions: see `ContrastiveHeads`.
        init_log_scale, init_bias: of the similarity at the start of training; None: those of the kind's paper.
        family: the Hugging Face architecture for writing it, or None.
    """

    vision: ViTConfig | None = None
    text: TextTowerConfig = TextTowerConfig()
    projection_size: int | None = 512
    kind: str = "softmax"
    pooling: str = "pooler"
    captions: int = 1
    init_log_scale: float | None = None
    init_bias: float | None = None
    family: str | None = None

    def __post_init__(self):
        for name, allowed in (("kind", KINDS), ("pooling", POOLINGS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"dual encoder: {name} {getattr(self, name)!r}", f"one of {', '.join(allowed)}", f"change {name}"
                )
        if self.vision is None:
            return
        if self.pooling == "pooler" and self.vision.dialect.pooler == "none":
            raise ConfigError(
                "dual encoder: an image encoder that pools nothing", "a pooled vector", "set vision.dialect.pooler"
            )
        if self.projection_size is None and self.image_vector_size != self.text.output_size:
            raise ConfigError(
                f"dual encoder: images of {self.image_vector_size} and texts of {self.text.output_size} dimensions",
                "equal widths, or a projection",
                "set projection_size, or change an encoder's width",
            )

    @property
    def image_vector_size(self) -> int:
        """The width of the image encoder's vector of an image."""
        v = self.vision
        if self.pooling == "patches":
            return (v.grid**2 + int(v.class_token)) * (v.hidden_size if v.regions is None else v.region_size)
        return v.dialect.head_size or (v.hidden_size if v.regions is None else v.region_size)

    @property
    def media_tokens(self) -> int:
        """The number of patches or regions of an image that a caption may describe."""
        return self.vision.grid**2

    llm = None  # it has no language model
    encoder_decoder = False

    @property
    def image_size(self) -> int:
        """The side of the images in a batch."""
        return self.vision.image_size

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters."""
        parts = {"encoder_image": self.vision, "encoder_text": self.text}
        return {name: within(part, self.compute) for name, part in parts.items() if part is not None}

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """The number of tokens of each embedding, by its path in an experiment."""
        return {"model.text.vocab_size": self.text.vocab_size}

    def batch_spec(self, rows: int = 1, length: int = 8, slots: Mapping[str, int] = ONE_IMAGE) -> BatchSpec:
        """Returns the arrays of a batch: captions, and an image in each slot."""
        images = images_spec(rows, slots.get("image", 0), self.vision.image_size, self.vision.num_channels)
        return text_spec(rows, length) | images

    def beside(self, model: Any, vocab_size: int) -> DualEncoderConfig:
        """Returns the config with open fields filled in from the experiment; see `TakesFromExperiment`."""
        vision = model.parts.get("encoder_image") if self.vision is None else self.vision
        return replace(self, vision=vision, text=filled(self.text, vocab_size=vocab_size))

    def make(self) -> DualEncoder:
        Requirements("dual encoder", self).given("vision")
        Requirements("dual encoder's text encoder", self.text).given("vocab_size")
        return DualEncoder(self)


@struct.dataclass
class DualOutput:
    """The vectors of images and texts, and their similarities.

    Attributes:
        image_embeds, text_embeds: float32[B, P], float32[T, P], unit vectors.
        logits_per_image: float32[B, T]; logits_per_text is its transpose.
        vision, text: the encoders' own outputs.
    """

    image_embeds: jax.Array
    text_embeds: jax.Array
    logits_per_image: jax.Array
    logits_per_text: jax.Array
    vision: VisionOutput
    text: TextOutput


class DualEncoder(nn.Module):
    """A module that maps images and texts to unit vectors (reference classes: `CLIPModel`, `SiglipModel`)."""

    config: DualEncoderConfig

    def setup(self):
        c = self.config
        log_scale, bias = INIT[c.kind]
        self.encoder_image, self.encoder_text = c.parts["encoder_image"].make(), TextModel(c.parts["encoder_text"])
        self.heads = ContrastiveHeads(
            projection_size=c.projection_size,
            pooling=c.pooling,
            captions=c.captions,
            init_log_scale=log_scale if c.init_log_scale is None else c.init_log_scale,
            init_bias=bias if c.init_bias is None else c.init_bias,
            learned_bias=c.kind == "sigmoid",
        )

    def __call__(self, pixels, tokens, mask=None, *, output_hidden_states: bool = False) -> DualOutput:
        """Compares every image with every text.

        Args:
            pixels: float[B, H, W, 3], normalised.
            tokens: int[T, L], one text a row.
            mask: int[T, L], 0 at padding, or None; see `TextModel`.

        Raises:
            ConfigError: texts are longer than the encoder's positions, or it does not take the images.
        """
        vision = self.encoder_image(pixels, output_hidden_states)
        text = self.encoder_text(tokens, mask, output_hidden_states=output_hidden_states)
        image_embeds, _, scale, bias = self.heads(vision, None, None)
        _, text_embeds, _, _ = self.heads(None, None, _vector(text)[:, None])
        image_embeds, text_embeds = image_embeds[:, 0], text_embeds[:, 0]
        logits = scale * image_embeds @ text_embeds.T + bias
        return DualOutput(image_embeds, text_embeds, logits, logits.T, vision, text)

    def encode_image(self, pixels):
        """Encodes normalised images float[B, H, W, 3] as unit vectors float32[B, P]."""
        return self.heads(self.encoder_image(pixels), None, None)[0][:, 0]

    def encode_text(self, tokens, mask=None):
        """Encodes texts int[T, L] as unit vectors float32[T, P]; for the mask see `TextModel`."""
        return self.heads(None, None, _vector(self.encoder_text(tokens, mask))[:, None])[1][:, 0]

    # ---- for training

    def embed_pairs(self, batch):
        """Returns unit vectors of each row's captions, and of what they describe in its first image.

        Each caption is a segment of the row. `media_index` at its first token is the patch or region that it
        describes, or -1 for the whole image; without `media_index` all captions describe the whole image.

        Returns:
            float32[B, C, P] of images or their patches, float32[B, C, P] of captions, scale, bias. With softmax the
            scale is clipped at 100, as in CLIP's training.
        """
        c = self.config
        vision = self.encoder_image(normalise_pixels(batch["images"][:, 0], c.vision))
        text = self.encoder_text.embed(batch["tokens"], batch["positions"], batch["segments"], c.captions)
        patch = None
        if c.captions > 1 and "media_index" in batch:
            first = (batch["segments"][:, None] == jnp.arange(1, c.captions + 1)[None, :, None]).argmax(axis=-1)
            patch = jnp.take_along_axis(batch["media_index"], first, axis=1)
        image, text, scale, bias = self.heads(vision, patch, text)
        return image, text, jnp.minimum(scale, 100.0) if c.kind == "softmax" else scale, bias

    def touch(self, batch):
        """Runs every part once, so that `init` creates all parameters."""
        return self.embed_pairs(batch)


def _vector(text: TextOutput):
    return text.pooler_output if text.text_embeds is None else text.text_embeds


# ---- Hugging Face folders


def _parts(options: ConfigOptions, readers: Sequence[Callable[[dict], Any]]) -> list:
    """Returns the configs of the image encoder and the text encoder.

    Early folders also have `vision_config_dict` and `text_config_dict`, without defaults. These take precedence; the
    others are read too, so that their unknown options are refused.

    Args:
        readers: read the options of the two encoders.
    """
    options.skip("vision_config", "text_config", "vision_config_dict", "text_config_dict")
    found = []
    for name, read in zip(("vision_config", "text_config"), readers, strict=True):
        parts = [options.part(f"{name}_dict", None), options.part(name, {})]
        for part in filter(None, parts):
            part.pop("architectures", None)  # of the whole model, or empty
        found.append([read(part) for part in parts if part is not None][0])
    return found


def sample(config: DualEncoderConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    side = config.vision.image_size
    return jnp.zeros((1, side, side, config.vision.num_channels)), jnp.zeros((1, 1), jnp.int32)


def _family(
    architecture: str,
    *,
    name: str,
    kind: str,
    encoders: tuple[Family, Family],
    joined: tuple[Weight, ...],
    fields: Fields = {},  # noqa: B006
    normalised: Mapping[str, Any] = {},
) -> Family:
    """Returns the family of a dual encoder's class; each option of config.json is honoured or refused by name.

    Args:
        encoders: families of the image encoder and the text encoder.
        joined: the weights of the heads.
        fields: the options of the whole model.
        normalised: fields of the image encoder that no config.json has.
    """
    vision, text = encoders

    def from_hf(values: dict) -> DualEncoderConfig:
        options = ConfigOptions(values, f"config.json of {architecture}")
        seen, read = _parts(options, (vision.from_hf, text.from_hf))
        given = dict(projection_size=None) | read_fields(options, fields)
        options.skip(*ELSEWHERE)
        options.done()
        return DualEncoderConfig(replace(seen, **normalised), read, kind=kind, family=architecture, **given)

    def to_hf(config: DualEncoderConfig) -> dict:
        log_scale = INIT[kind][0] if config.init_log_scale is None else config.init_log_scale
        written = dict(
            **kind_of(config.family),
            vision_config=nameless(vision.to_hf(config.vision)),
            text_config=nameless(text.to_hf(config.text)),
            **write_fields(replace(config, init_log_scale=log_scale), fields),
        )
        return check_written(config, written, from_hf, "a dual encoder", _facts)

    def table(config: DualEncoderConfig) -> Table:
        seen, read = vision.table(config.vision), text.table(config.text)
        weights = nested(seen, "", "encoder_image/") + nested(read, "", "encoder_text/") + joined
        return Table(weights, (), seen.ignored + read.ignored)

    return Family(name=name, architectures=(architecture,), from_hf=from_hf, to_hf=to_hf, table=table, sample=sample)


def _facts(c: DualEncoderConfig) -> dict:
    """Returns the values that config.json must keep; the encoders check their own."""
    return {name: getattr(c, name) for name in ("projection_size", "kind", "pooling", "family")}


CLIP = _family(
    "CLIPModel",
    name="CLIP",
    kind="softmax",
    encoders=(clip_vision.FAMILY, clip_text.FAMILIES[0]),
    joined=(
        *linear("visual_projection", "heads/image_projection", bias=False),
        *linear("text_projection", "heads/text_projection", bias=False),
        Weight("logit_scale", "heads/log_scale"),
    ),
    fields={
        "projection_size": ("projection_dim", "size", 512),
        "init_log_scale": ("logit_scale_init_value", "number", 2.6592),
    },
    normalised=dict(image_mean=CLIP_MEAN, image_std=CLIP_STD),
)
SIGLIP = _family(
    "SiglipModel",
    name="SigLIP",
    kind="sigmoid",
    encoders=(siglip_vision.FAMILY, siglip_text.FAMILIES[0]),
    joined=(Weight("logit_scale", "heads/log_scale", "1 ->"), Weight("logit_bias", "heads/bias", "1 ->")),
)
FAMILIES = (CLIP, SIGLIP)
