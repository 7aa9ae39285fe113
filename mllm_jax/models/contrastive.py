"""The heads of a dual encoder, which map features of images and texts to unit vectors in one space."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.layers.linear import Linear
from mllm_jax.layers.norms import as_unit_vectors

POOLINGS = ("pooler", "patches")


class ContrastiveHeads(nn.Module):
    """The projections to unit vectors, and the scale and bias of the similarity.

    Attributes:
        projection_size: width of the common space; None: the encoders' own, without a projection.
        pooling: the vector of an image: "pooler", the encoder's pooled vector, as in CLIP; "patches", all patches
            concatenated, which keeps positions separate and learns far faster from little data.
        captions: the most texts of an image in a row.
        init_log_scale, init_bias: of the similarity at the start.
        learned_bias: whether the bias is learned; otherwise it is 0.
    """

    projection_size: int | None
    pooling: str
    captions: int
    init_log_scale: float
    init_bias: float
    learned_bias: bool

    @nn.compact
    def __call__(self, vision, patch, text):
        """Projects images and texts to unit vectors.

        Args:
            vision: VisionOutput of B images, or None.
            patch: int[B, C], the media token that each caption describes; -1, or None for all: the whole image.
            text: dtype[B, C, E], or None.

        Returns:
            float32[B, C, P] of images and of texts, or None for an input that is None; scale; bias.
        """
        image = None
        if vision is not None:
            image = vision.pooler_output
            if self.pooling == "patches":
                image = rearrange(vision.last_hidden_state, "b n e -> b (n e)")
            count = 1 if text is None else text.shape[1]
            image = jnp.broadcast_to(image[:, None], (image.shape[0], count, image.shape[-1]))
            if self.captions > 1 and patch is not None:
                patches = vision.last_hidden_state[:, vision.class_tokens :]
                described = jnp.take_along_axis(patches, jnp.maximum(patch, 0)[..., None], axis=1)
                image = jnp.where((patch >= 0)[..., None], described, image)
            image = as_unit_vectors(self._project(image, "image_projection"))
        if text is not None:
            text = as_unit_vectors(self._project(text, "text_projection"))
        scale = self.param("log_scale", nn.initializers.constant(self.init_log_scale), (), jnp.float32)
        bias = jnp.float32(0)
        if self.learned_bias:
            bias = self.param("bias", nn.initializers.constant(self.init_bias), (), jnp.float32)
        return image, text, jnp.exp(scale), bias

    def _project(self, x, name: str):
        size = self.projection_size
        return x if size is None else Linear((size,), ("channels", "embed"), dtype=x.dtype, name=name)(x)
