"""MetaQuery's connector (arXiv 2504.06256): a bidirectional transformer over the states of learned query tokens.

The prompt is followed by a begin marker, N query tokens and an end marker. Only the embeddings of the query tokens and
this connector train, by the generator's loss alone. OpenUni (arXiv 2505.23661) found 6 layers to be enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.layers.attention import attention
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import RMSNorm, as_unit_vectors
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.rotary import apply_rotary, rotary_angles
from mllm_jax.layers.stack import layers_of
from mllm_jax.output_projectors.protocol import TokensToCondition
from mllm_jax.sharding.logical import constrain


@dataclass(frozen=True)
class QueryConnectorConfig(TokensToCondition):
    """Sizes of a connector; with 24 layers it is MetaQuery's, whose layers are Qwen2's without the causal mask.

    Attributes:
        tokens: number of query tokens, and of vectors of the condition; 77 in MetaQuery with Stable Diffusion 1.5.
        hidden_size: width of the transformer; None is input_size. A linear map brings states of another width to it.
        num_layers: 6 as in OpenUni; 24 in MetaQuery.
        mlp_size: None is 4 x hidden_size.
        qk_norm: whether each head's queries and keys are scaled to unit root mean square, after the rotation, and then
            by learned factors of each head.
        init_std: standard deviation of the transformer's initial kernels.
        output_scale: initial value of the last norm's scale: the root mean square of the condition that the generator
            was trained with. 1 for Stable Diffusion 1.5, sqrt(5.5) for SANA.
        norm_eps, output_norm_eps: of the norms inside the transformer, and of the last one.
    """

    tokens: int = 77
    hidden_size: int | None = None
    num_layers: int = 6
    head_dim: int = 64
    mlp_size: int | None = None
    qk_norm: bool = True
    rope_theta: float = 10_000.0
    init_std: float = 0.014
    output_scale: float = 1.0
    norm_eps: float = 1e-6
    output_norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        require = Requirements("query connector", self)
        require(
            self.head_dim >= 2 and self.head_dim % 2 == 0 and (self.width is None or self.width % self.head_dim == 0),
            f"width {self.width} in heads of {self.head_dim}",
            "heads of an even size that fill it",
            "change head_dim or hidden_size",
        )
        require(self.num_layers >= 1, f"{self.num_layers} layers", "at least one", "change num_layers")

    @property
    def width(self) -> int | None:
        """The transformer's width; None before the LLM's is known."""
        return self.hidden_size or self.input_size

    @property
    def num_heads(self) -> int:
        """The number of heads."""
        return self.width // self.head_dim

    @property
    def output_tokens(self) -> int:
        """The number of vectors of the condition: one for each query token."""
        return self.tokens

    def output_mask(self, mask: jax.Array | None) -> jax.Array | None:
        """Returns the mask of the query tokens, bool[B, N]."""
        return None if mask is None else mask.astype(bool)

    def make(self) -> QueryConnector:
        Requirements("query connector", self).given("input_size")
        return QueryConnector(self)


class HeadNorm(nn.Module):
    """Scaling of each head's vectors to unit root mean square, times learned factors of each head."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, S, N, H] to the same shape."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("heads", "head_dim"))
        scale = self.param("scale", init, x.shape[2:], jnp.float32)
        return (as_unit_vectors(x) * scale * x.shape[-1] ** 0.5).astype(self.dtype)


class ConnectorLayer(nn.Module):
    """Bidirectional attention with rotary positions, then SwiGLU, each after an RMSNorm and with a residual connection.

    Queries, keys and values have biases, as in Qwen2.
    """

    config: QueryConnectorConfig

    @nn.compact
    def __call__(self, x, _, angles, segments):
        """Maps [B, N, E] to the same shape; `segments` int[B, N] is 0 at tokens that others do not see, or None."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        heads, names = (c.num_heads, c.head_dim), ("embed", "heads", "head_dim")
        h = RMSNorm(c.norm_eps, dtype, name="attention_norm")(x)
        common = dict(use_bias=True, init_std=c.init_std, dtype=dtype)
        q, k, v = (Linear(heads, names, **common, name=name)(h) for name in "qkv")
        q, k = (apply_rotary(each, angles) for each in (q, k))
        if c.qk_norm:
            q, k = HeadNorm(dtype, name="q_norm")(q), HeadNorm(dtype, name="k_norm")(k)
        asking = None if segments is None else jnp.ones_like(segments)
        y = attention(q, k, v, q_segments=asking, k_segments=segments)
        y = constrain(y, "batch", "queries", "heads", "head_dim")
        out_names = (*names[1:], "embed")
        x = x + Linear((c.width,), out_names, in_ndim=2, init_std=c.init_std, dtype=dtype, name="out")(y)
        h = RMSNorm(c.norm_eps, dtype, name="mlp_norm")(x)
        stds = dict(init_std=c.init_std, out_init_std=c.init_std)
        x = x + MLP(c.mlp_size or 4 * c.width, "silu", True, use_bias=False, **stds, dtype=dtype, name="mlp")(h)
        return constrain(x, "batch", "queries", None), None


class QueryConnector(nn.Module):
    """Connector from the states of query tokens to a generator's condition (reference: MetaQuery's `connector`)."""

    config: QueryConnectorConfig

    @nn.compact
    def __call__(self, states, embeddings=None, mask=None):
        """Maps dtype[B, N, E] to dtype[B, N, output_size], 0 for queries that do not count.

        Args:
            embeddings: not read.
            mask: bool[B, N] or None.

        Raises:
            DataError: states of another shape.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        c.check(states, embeddings)
        x = states.astype(dtype)
        if c.width != c.input_size:
            x = Linear((c.width,), ("channels", "embed"), use_bias=True, dtype=dtype, name="input")(x)
        angles = rotary_angles(jnp.arange(c.tokens)[None], c.head_dim, c.rope_theta)
        segments = None if mask is None else mask.astype(jnp.int32)
        x, _ = layers_of(c, ConnectorLayer, 2)(c, name="layers")(x, None, angles, segments)
        common = dict(use_bias=True, dtype=dtype)
        x = Linear((c.output_size,), ("embed", "mlp"), **common, name="linear_1")(x)
        x = Linear((c.output_size,), ("mlp", "channels"), **common, name="linear_2")(ACTIVATIONS["gelu_tanh"](x))
        x = RMSNorm(c.output_norm_eps, dtype, axis="channels", init_scale=c.output_scale, name="output_norm")(x)
        x = x if mask is None else jnp.where(mask.astype(bool)[..., None], x, 0)
        return constrain(x, "batch", "queries", None)
