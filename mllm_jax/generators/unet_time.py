"""The embedding of a diffusion UNet's time: sines and cosines, and two linear maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mllm_jax.generators.unet_blocks import ACTIVATIONS
from mllm_jax.layers.linear import Linear

LONGEST_PERIOD = 10_000


def embed_time(time: jax.Array, width: int, flip_sin_to_cos: bool, freq_shift: float) -> jax.Array:
    """Embeds float32[B] as sines and cosines, float32[B, width], of periods up to 2 pi LONGEST_PERIOD."""
    half = width // 2
    exponent = np.float32(-np.log(LONGEST_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    # NumPy's exponential of float32 is often off in the last bit, which is 6e-5 of an angle of 1,000.
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = time.astype(jnp.float32)[:, None] * frequencies
    parts = [jnp.sin(angles), jnp.cos(angles)]
    found = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return jnp.pad(found, ((0, 0), (0, width % 2)))


class TimeEmbedding(nn.Module):
    """Two linear maps with an activation between, for a time or a class.

    Attributes:
        condition_size: width of a further vector, or None.
        post_activation: an activation after both, or None.
    """

    features: int
    activation: str = "silu"
    post_activation: str | None = None
    condition_size: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, condition=None):
        """Maps [B, C], and the further vector [B, condition_size], to dtype[B, features]."""
        x = x.astype(self.dtype)
        if self.condition_size is not None and (condition is not None or self.is_initializing()):
            condition = jnp.zeros((len(x), self.condition_size)) if condition is None else condition
            x = x + Linear((x.shape[-1],), ("channels", "embed"), dtype=self.dtype, name="condition")(condition)
        wide = dict(features=(self.features,), use_bias=True, dtype=self.dtype)
        x = Linear(**wide, names=("embed", "mlp"), name="linear_1")(x)
        x = Linear(**wide, names=("mlp", "embed"), name="linear_2")(ACTIVATIONS[self.activation](x))
        return x if self.post_activation is None else ACTIVATIONS[self.post_activation](x)
