"""The heads of contrastive training: both towers' features to one space of unit vectors."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.layers.linear import Linear

POOLINGS = ("pooler", "patches")


@dataclass(frozen=True)
class ContrastiveConfig:
    """Projection of both towers.

    Attributes:
        pooling: what stands for a picture: "pooler", the encoder's pooled vector, as in CLIP; "patches", all patches
            side by side, which keeps places apart and learns far faster from little data.
        init_scale, init_bias: logit scale and bias at the start; softmax: 1/0.07 and 0 (CLIP), sigmoid: 10 and -10
            (SigLIP, arXiv 2303.15343).
    """

    projection_size: int = 256
    pooling: str = "pooler"
    captions: int = 1
    init_scale: float = 1 / 0.07
    init_bias: float = 0.0

    def make(self) -> ContrastiveHeads:
        return ContrastiveHeads(self)


class ContrastiveHeads(nn.Module):
    """Pictures and texts as unit vectors, with the scale and bias of their similarity."""

    config: ContrastiveConfig

    @nn.compact
    def __call__(self, vision, place, text):
        """VisionOutput of B pictures, int[B, C], dtype[B, C, E] -> float32[B, C, P], float32[B, C, P], scale, bias

        `place` is the media token that a caption describes; -1 is the whole picture.
        """
        c = self.config
        image = vision.pooler_output
        if c.pooling == "patches":
            image = rearrange(vision.last_hidden_state, "b n e -> b (n e)")
        image = jnp.broadcast_to(image[:, None], (*text.shape[:2], image.shape[-1]))
        if c.captions > 1:
            there = jnp.take_along_axis(vision.last_hidden_state, jnp.maximum(place, 0)[..., None], axis=1)
            image = jnp.where((place >= 0)[..., None], there, image)
        image = Linear((c.projection_size,), ("channels", "embed"), dtype=image.dtype, name="image_projection")(image)
        text = Linear((c.projection_size,), ("channels", "embed"), dtype=text.dtype, name="text_projection")(text)
        scale = self.param("log_scale", nn.initializers.constant(jnp.log(c.init_scale)), (), jnp.float32)
        bias = self.param("bias", nn.initializers.constant(c.init_bias), (), jnp.float32)
        return _unit(image), _unit(text), jnp.exp(jnp.minimum(scale, jnp.log(100.0))), bias


def _unit(x):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
