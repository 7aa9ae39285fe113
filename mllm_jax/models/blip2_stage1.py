"""BLIP-2's first stage (arXiv 2301.12597, section 3.2): encoder, Q-Former and heads that compare, match and generate.

`Blip2ForImageTextRetrieval` ranks images and texts with the same heads, except the one that generates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mllm_jax.checkpoints.architectures import kind_of, nameless
from mllm_jax.checkpoints.config_json import check_written, stored_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Table, families, linear, nested
from mllm_jax.data.batch import ONE_IMAGE, BatchSpec, images_spec, text_spec
from mllm_jax.encoders import eva
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS
from mllm_jax.layers.norms import LayerNorm, as_unit_vectors
from mllm_jax.layers.pixels import normalise_pixels
from mllm_jax.models.blip2 import read_encoder
from mllm_jax.models.branch import filled, read_from
from mllm_jax.projectors.qformer import INIT_STD, QFormerCache, QFormerConfig
from mllm_jax.projectors.qformer_hub import qformer_weights, read_qformer, write_qformer


@dataclass(frozen=True)
class QFormerPretrainingConfig(WithCompute):
    """The config of a model that learns from pairs of images and texts, without an LLM.

    Attributes:
        projector: a Q-Former that reads text. A composed model reads the trained one as its part "projector_image".
        projection_size: width of the space in which images and texts are compared.
        captioning: whether there are a temperature and a head that generates text, which only training needs.
        init_temperature: the initial divisor of similarities; it is learned.
        decode_token_id: the first token of a text that is generated; None: the text's own first token.
        image_token_id: of the checkpoint's tokenizer; unused here.
        family: the Hugging Face architecture for writing it, or None.
    """

    encoder: Any
    projector: QFormerConfig
    projection_size: int = 256
    captioning: bool = True
    init_temperature: float = 0.07
    decode_token_id: int | None = None
    image_token_id: int | None = None
    family: str | None = None

    def __post_init__(self):
        if not self.projector.reads_text:
            raise ConfigError("a Q-Former that reads no text", "one that does", "set projector.vocab_size")

    @property
    def media_tokens(self) -> int:
        """The number of tokens of an image: the queries."""
        return self.projector.num_tokens(self.encoder.grid)

    llm = None  # it has no language model
    encoder_decoder = False

    @property
    def image_size(self) -> int:
        """The side of the images in a batch."""
        return self.encoder.image_size

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters."""
        parts = {"encoder_image": self.encoder, "projector_image": filled(self.projector, **read_from(self.encoder))}
        return {name: within(part, self.compute) for name, part in parts.items()}

    @property
    def captions(self) -> int:
        """The maximum number of captions of an image in a row."""
        return 1

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """The number of tokens of each embedding, by its path in an experiment."""
        return {"model.projector.vocab_size": self.projector.vocab_size}

    @property
    def dtype(self) -> str:
        """The dtype of most of the computation."""
        return self.parts["projector_image"].dtype

    def batch_spec(self, rows: int = 1, length: int = 8, slots: Mapping[str, int] = ONE_IMAGE) -> BatchSpec:
        """Returns the arrays of a batch: captions, and an image in each slot."""
        return text_spec(rows, length) | images_spec(rows, slots.get("image", 0), self.encoder.image_size)

    def beside(self, model: Any, vocab_size: int) -> QFormerPretrainingConfig:
        """Returns the config with the open width of its Q-Former filled in; it takes nothing from the experiment."""
        return replace(self, projector=filled(self.projector, **read_from(self.encoder)))

    def make(self) -> QFormerPretraining:
        return QFormerPretraining(self)


@struct.dataclass
class Pairs:
    """Images and texts, encoded separately.

    Attributes:
        features: dtype[B, P, E], which the queries read.
        cache: the queries' keys and values, for generating texts.
        image, text: float32[B, num_queries, D] and float32[B, D], unit vectors.
        temperature: float32, the divisor of similarities; 1 without a captioning head.
    """

    features: jax.Array
    cache: QFormerCache
    image: jax.Array
    text: jax.Array
    temperature: jax.Array


@struct.dataclass
class PairScores:
    """The outputs of the heads.

    Attributes:
        similarity: float32[B, T] of each image and each text: the largest cosine over the queries.
        matching: float32[B, 2], the logits of "no match" and "match" for the image and the text of a row.
    """

    similarity: jax.Array
    matching: jax.Array


class QFormerPretraining(nn.Module):
    """A module that maps pairs of images and texts to the outputs of three heads."""

    config: QFormerPretrainingConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        made = {name: part.make() for name, part in c.parts.items()}
        self.encoder_image, self.projector_image = made["encoder_image"], made["projector_image"]
        common = dict(use_bias=True, init_std=INIT_STD, dtype=dtype)
        self.image_projection = Linear((c.projection_size,), ("channels", "embed"), **common)
        self.text_projection = Linear((c.projection_size,), ("channels", "embed"), **common)
        self.matching = Linear((2,), ("embed", None), **common)
        if c.captioning:
            constant = nn.initializers.constant(c.init_temperature)
            self.temperature = self.param("temperature", constant, (), jnp.float32)
            self.caption_dense = Linear((c.projector.hidden_size,), ("channels", "embed"), **common)
            self.caption_norm = LayerNorm(c.projector.norm_eps, dtype)
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            self.caption_bias = self.param("caption_bias", zeros, (c.projector.vocab_size,), jnp.float32)

    def __call__(self, batch) -> PairScores:
        """Compares every image of a batch with every text, and matches each with its own.

        Args:
            batch: images uint8[B, M, H, W, 3], or float if they are normalised already; only the first of each row
                counts. tokens, segments int[B, L]; only segment 1 counts, which starts at the first position.
        """
        pairs = self.encode_pairs(batch)
        return PairScores(similarity(pairs.image, pairs.text), self.match(batch | {"features": pairs.features}))

    def encode_pairs(self, batch) -> Pairs:
        """Encodes the images and the texts of a batch separately."""
        images, real = batch["images"][:, 0], _first_text(batch)
        pixels = normalise_pixels(images, self.config.encoder) if images.dtype == jnp.uint8 else images
        features = self.encoder_image(pixels).last_hidden_state
        queries, cache = self.projector_image.encode(features)
        text = self.projector_image.read(batch["tokens"], real)[:, 0]
        temperature = self.temperature if self.config.captioning else jnp.float32(1)
        image, text = (as_unit_vectors(x) for x in (self.image_projection(queries), self.text_projection(text)))
        return Pairs(features, cache, image, text, temperature)

    def match(self, batch):
        """Computes matching logits float32[N, 2] of `features` dtype[N, P, E] and the text of the same row."""
        hidden, _ = self.projector_image.encode(batch["features"], batch["tokens"], _first_text(batch))
        queries = hidden[:, : self.config.projector.num_queries]
        return self.matching(queries).astype(jnp.float32).mean(axis=1)

    def write(self, batch):
        """Computes next-token logits float32[B, L, V] of a text that is generated from the queries in `cache`."""
        c = self.config
        tokens = batch["tokens"]
        if c.decode_token_id is not None:
            tokens = tokens.at[:, 0].set(c.decode_token_id)
        x = self.projector_image.read(tokens, _first_text(batch), batch["cache"])
        x = self.caption_norm(ACTIVATIONS[c.projector.activation](self.caption_dense(x)))
        return self.projector_image.token_embedding.attend(x).astype(jnp.float32) + self.caption_bias

    # ---- for training

    def touch(self, batch):
        """Runs every part once, so that `init` creates all parameters."""
        pairs = self.encode_pairs(batch)
        self.projector_image(pairs.features)  # the map to an LLM, which this stage holds and does not train
        self.match(batch | {"features": pairs.features})
        if self.config.captioning:
            self.write(batch | {"cache": pairs.cache})


def similarity(image, text):
    """Returns the largest similarity of a query with a text: [B, Q, D], [T, D] -> [B, T]."""
    return jnp.einsum("bqd,td->bqt", image, text).max(axis=1)


def _first_text(batch):
    return (batch["segments"] == 1).astype(jnp.int32)


# ---- `Blip2ForImageTextRetrieval`: the stage without the head that generates

FAMILY = "Blip2ForImageTextRetrieval"


def from_hf_config(values: dict) -> QFormerPretrainingConfig:
    """Reads config.json of Blip2ForImageTextRetrieval; each option is honoured or refused by name."""
    options = ConfigOptions(values, f"config.json of {FAMILY}")
    encoder = read_encoder(options.part("vision_config", {}))
    projector = read_qformer(
        options.part("qformer_config", {}),
        FAMILY,
        text=True,
        feature_size=encoder.hidden_size,
        num_queries=options.size("num_query_tokens", 32),
    )
    config = QFormerPretrainingConfig(
        encoder,
        projector,
        projection_size=options.size("image_text_hidden_size", 256),
        captioning=False,
        image_token_id=options.id("image_token_index", options.id("image_token_id")),
        family=FAMILY,
    )
    # config.json describes a language model, but the model has none.
    options.skip("vision_config", "qformer_config", "text_config", "use_decoder_only_language_model")
    options.skip("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    options.done()
    return config


def to_hf_config(config: QFormerPretrainingConfig) -> dict:
    """Writes config.json; refuses options that the family does not have."""
    written = dict(
        **kind_of(FAMILY),
        vision_config=nameless(eva.FAMILY.to_hf(config.encoder)),
        qformer_config=write_qformer(config.parts["projector_image"], "blip_2_qformer"),
        num_query_tokens=config.projector.num_queries,
        image_text_hidden_size=config.projection_size,
        image_token_index=config.image_token_id,
    )

    def facts(c):
        return stored_fields(c, "encoder", "init_temperature") | dict(
            projector=stored_fields(c.parts["projector_image"])
        )

    return check_written(config, written, from_hf_config, "a model that compares images and texts", facts)


def table(config: QFormerPretrainingConfig) -> Table:
    weights = nested(eva.FAMILY.table(config.encoder), "vision_model.", "encoder_image/")
    weights += qformer_weights(config.projector, embeddings="embeddings")
    heads = {"vision_projection": "image_projection", "text_projection": "text_projection", "itm_head": "matching"}
    for theirs, ours in heads.items():
        weights += (*linear(theirs, ours),)
    return Table(weights, (), ("embeddings.position_ids",))


FAMILIES = families({FAMILY: "BLIP-2 retrieval"}, from_hf=from_hf_config, to_hf=to_hf_config, table=table)
