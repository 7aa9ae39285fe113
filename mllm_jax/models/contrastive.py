"""The heads of contrastive training: both towers' features to one space of unit vectors."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.layers.linear import Linear
from mllm_jax.layers.norms import as_unit_vectors

POOLINGS = ("pooler", "patches")


@dataclass(frozen=True)
class ContrastiveConfig:
    """Projection of both towers.

    Attributes:
        projection_size: width of the common space; None: the towers' own, without a projection.
        pooling: what stands for a picture: "pooler", the encoder's pooled vector, as in CLIP; "patches", all patches
            side by side, which keeps places apart and learns far faster from little data.
        init_scale, init_bias: logit scale and bias at the start; softmax: 1/0.07 and 0 (CLIP), sigmoid: 10 and -10
            (SigLIP, arXiv 2303.15343).
        learned_bias: whether there is a bias to learn; without, it is 0.
        max_scale: what the scale is clipped at, or None.
    """

    projection_size: int | None = 256
    pooling: str = "pooler"
    captions: int = 1
    init_scale: float = 1 / 0.07
    init_bias: float = 0.0
    learned_bias: bool = True
    max_scale: float | None = 100.0

    def make(self) -> ContrastiveHeads:
        return ContrastiveHeads(self)


class ContrastiveHeads(nn.Module):
    """Pictures and texts as unit vectors, with the scale and bias of their similarity."""

    config: ContrastiveConfig

    @nn.compact
    def __call__(self, vision, place, text):
        """VisionOutput of B pictures, int[B, C], dtype[B, C, E] -> float32[B, C, P], float32[B, C, P], scale, bias

        `place` is the media token that a caption describes; -1 is the whole picture, and so is None. Without `vision`
        or `text` there is None in its place.
        """
        c = self.config
        image = None
        if vision is not None:
            image = vision.pooler_output
            if c.pooling == "patches":
                image = rearrange(vision.last_hidden_state, "b n e -> b (n e)")
            count = 1 if text is None else text.shape[1]
            image = jnp.broadcast_to(image[:, None], (image.shape[0], count, image.shape[-1]))
            if c.captions > 1 and place is not None:
                patches = vision.last_hidden_state[:, vision.class_tokens :]
                there = jnp.take_along_axis(patches, jnp.maximum(place, 0)[..., None], axis=1)
                image = jnp.where((place >= 0)[..., None], there, image)
            image = as_unit_vectors(self._project(image, "image_projection"))
        if text is not None:
            text = as_unit_vectors(self._project(text, "text_projection"))
        scale = self.param("log_scale", nn.initializers.constant(jnp.log(c.init_scale)), (), jnp.float32)
        if c.max_scale is not None:
            scale = jnp.minimum(scale, jnp.log(c.max_scale))
        bias = jnp.float32(0)
        if c.learned_bias:
            bias = self.param("bias", nn.initializers.constant(c.init_bias), (), jnp.float32)
        return image, text, jnp.exp(scale), bias

    def _project(self, x, name: str):
        size = self.config.projection_size
        return x if size is None else Linear((size,), ("channels", "embed"), dtype=x.dtype, name=name)(x)
