"""The feed-forward block: plain, or gated as in SwiGLU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.layers.linear import Linear
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.sharding.logical import constrain

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
}


class MLP(nn.Module):
    """Two linear maps with an activation between; `gated` multiplies it by a third map (arXiv 2002.05202).

    SwiGLU is `gated=True, activation="silu"`.

    Attributes:
        init_std: standard deviation of the initial kernels before the last map; None means 1/sqrt(fan in).
        out_init_std: that of the last map.
        norm_eps: epsilon of a LayerNorm before the last map (sub-LN, arXiv 2210.06423), or None.
    """

    hidden_size: int
    activation: str
    gated: bool = False
    use_bias: bool = True
    init_std: float | None = None
    out_init_std: float | None = None
    norm_eps: float | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, S, E], or a grid dtype[B, H, W, E], to the same shape."""
        common = dict(use_bias=self.use_bias, dtype=self.dtype)
        wide = dict(features=(self.hidden_size,), names=("embed", "mlp"), init_std=self.init_std, **common)
        h = ACTIVATIONS[self.activation](Linear(**wide, name="gate" if self.gated else "up")(x))
        if self.gated:
            h = h * Linear(**wide, name="up")(x)
        h = constrain(h, "batch", "seq", *[None] * (h.ndim - 3), "mlp")
        if self.norm_eps is not None:
            h = LayerNorm(self.norm_eps, self.dtype, axis="mlp", name="norm")(h)
        return Linear((x.shape[-1],), ("mlp", "embed"), init_std=self.out_init_std, **common, name="down")(h)
