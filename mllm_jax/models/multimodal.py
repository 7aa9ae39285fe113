"""The parts of a multimodal LLM as one module: encoder -> projector -> LLM (MM-LLMs survey, arXiv 2401.13601)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.encoders.text import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.contrastive import ContrastiveConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.sharding.logical import constrain


@dataclass(frozen=True)
class MultimodalConfig:
    """The parts' configs; text tower and contrastive heads (both or neither) serve the contrastive stage only."""

    encoder: ViTConfig
    projector: MLPProjectorConfig
    llm: DecoderConfig
    text_tower: TextTowerConfig | None = None
    contrastive: ContrastiveConfig | None = None

    def __post_init__(self):
        if self.projector.output_size != self.llm.hidden_size:
            raise ConfigError(
                f"projector.output_size {self.projector.output_size}",
                f"the LLM's hidden_size {self.llm.hidden_size}",
                "make the two equal",
            )
        if (self.text_tower is None) != (self.contrastive is None):
            raise ConfigError(
                "a text tower without contrastive heads, or the reverse", "both or neither", "add or drop"
            )
        if self.encoder.grid % self.projector.merge:
            raise ConfigError(
                f"projector.merge {self.projector.merge} on {self.encoder.grid} patches a side",
                "a merge that divides the patches",
                "change projector.merge, encoder.image_size or encoder.patch_size",
            )

    @property
    def media_tokens(self) -> int:
        """Tokens that one picture takes in the LLM's row."""
        return self.projector.num_tokens(self.encoder.grid)

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """How many tokens each embedding holds, by its place in an experiment."""
        sizes = {"model.llm.vocab_size": self.llm.vocab_size}
        return sizes if self.text_tower is None else sizes | {"model.text_tower.vocab_size": self.text_tower.vocab_size}

    @property
    def captions(self) -> int | None:
        """The most captions that contrastive training may give a picture; None: there are no heads for any."""
        return self.contrastive and self.contrastive.captions

    @property
    def dtype(self) -> str:
        """What most of the model computes in."""
        return self.llm.dtype

    def make(self) -> Multimodal:
        return Multimodal(self)


class Multimodal(nn.Module):
    """One batch of packed rows to logits; also the two towers for contrastive training."""

    config: MultimodalConfig

    def setup(self):
        c = self.config
        self.encoder = c.encoder.make()
        self.projector = c.projector.make()
        self.llm = c.llm.make()
        if c.contrastive is not None:
            self.text_tower = c.text_tower.make()
            self.contrastive = c.contrastive.make()

    def normalise(self, pixels):
        """uint8[..., 3] -> float32[..., 3] by the encoder's mean and deviation."""
        c = self.config.encoder
        mean, std = jnp.asarray(c.image_mean, jnp.float32), jnp.asarray(c.image_std, jnp.float32)
        return (pixels.astype(jnp.float32) / 255.0 - mean) / std

    def encode_media(self, images):
        """uint8[B, M, H, W, 3] -> dtype[B, M*T, E]: every slot's projected media tokens, in the order of the slots."""
        rows = images.shape[0]
        pixels = rearrange(self.normalise(images), "b m h w c -> (b m) h w c")
        features = self.encoder(pixels).last_hidden_state
        if self.config.encoder.class_token:
            features = features[:, 1:]
        return rearrange(self.projector(features), "(b m) t e -> b (m t) e", b=rows)

    def merge(self, tokens, media, media_index):
        """Media tokens in the places of the text that ask for them; a gather inside each row, so no shard is crossed.

        Args:
            tokens: int[B, S].  media: dtype[B, M*T, E] or None.  media_index: int[B, S], -1 for text.

        Returns:
            dtype[B, S, E].
        """
        text = self.llm.embed(tokens)
        if media is None:
            return text
        index = jnp.maximum(media_index, 0)[..., None]
        placed = jnp.take_along_axis(media, index, axis=1).astype(text.dtype)
        return constrain(jnp.where((media_index >= 0)[..., None], placed, text), "batch", "seq", None)

    def __call__(self, batch, cache=None, logits_at=None):
        """Next-token logits of a batch of packed rows.

        Args:
            batch: tokens, positions, segments, media_index int[B, S]; images uint8[B, M, H, W, 3], or what
                `encode_media` made of them as `media` dtype[B, M*T, E] (neither: text only).
            cache: KVCache, for generation.
            logits_at: int[B, M], the places whose logits are wanted; None is all.

        Returns:
            float32[B, S or M, V], with a cache (logits, cache).
        """
        media = self.encode_media(batch["images"]) if "images" in batch else batch.get("media")
        embeddings = self.merge(batch["tokens"], media, batch["media_index"])
        places = batch["tokens"], batch["positions"], batch["segments"]
        return self.llm(*places, embeddings=embeddings, cache=cache, logits_at=logits_at)

    def embed_pairs(self, batch):
        """The captions of each row and what they describe of its first picture, as unit vectors.

        A caption stands in the row as a segment of its own. `media_index` at its first token names the media token
        that it describes, -1 the whole picture.

        Returns:
            float32[B, C, P] of pictures or their places, float32[B, C, P] of captions, scale, bias; C is
            `contrastive.captions`.
        """
        vision = self.encoder(self.normalise(batch["images"][:, 0]))
        count = self.config.contrastive.captions
        text = self.text_tower(batch["tokens"], batch["positions"], batch["segments"], count)
        first = (batch["segments"][:, None] == jnp.arange(1, count + 1)[None, :, None]).argmax(axis=-1)
        place = jnp.take_along_axis(batch["media_index"], first, axis=1)
        return self.contrastive(vision, place, text)

    def touch(self, batch):
        """Runs every part once: what `init` traces so that all parameters exist."""
        logits = self(batch)
        if self.config.contrastive is not None:
            self.embed_pairs(batch)
        return logits

    def sample_batch(self, rows: int = 1, length: int = 8, slots: int = 1) -> dict:
        """A batch of zeros with the shapes that `touch` needs."""
        side = self.config.encoder.image_size
        ints = jnp.zeros((rows, length), jnp.int32)
        images = jnp.zeros((rows, slots, side, side, 3), jnp.uint8)
        return dict(tokens=ints, positions=ints, segments=ints, media_index=ints - 1, images=images)
