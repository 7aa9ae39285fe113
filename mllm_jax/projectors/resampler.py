"""Cross-attention resampler: learned queries read any number of patches and become the media tokens.

The defaults are Qwen-VL's (arXiv 2308.12966, section 2.1). Other options make it the Perceiver resampler of Flamingo
(arXiv 2204.14198, section 3.1), Idefics and Idefics2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.errors import DataError
from mllm_jax.layers.attention import attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.interpolation import bicubic_grid
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm, RMSNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.sincos import sincos_positions
from mllm_jax.layers.stack import layers_of
from mllm_jax.sharding.logical import constrain

POSITIONS = ("sincos", "none")


@dataclass(frozen=True)
class ResamplerDialect:
    """Details that distinguish the families of resamplers; the defaults are Qwen-VL's.

    Attributes:
        positions: "sincos" adds fixed 2-D positions to queries and keys, not to values; "none" adds nothing.
        attends_itself: whether the queries follow the features among the keys and values (Flamingo).
        gated: whether the MLP is gated; with activation "silu" it is SwiGLU.
        bias: whether the attention's maps have biases; the MLP has none.
        qk_norm: whether a LayerNorm follows each head's queries and keys.
        norm: "layer" or "rms".
        output_map: whether a linear map without bias follows the last norm; without it, hidden_size is output_size.
    """

    positions: str = "sincos"
    attends_itself: bool = False
    gated: bool = False
    bias: bool = True
    qk_norm: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-6
    output_map: bool = True


@dataclass(frozen=True)
class ResamplerConfig(WithCompute):
    """Sizes of a resampler; details that only reproduce a family are in its dialect.

    Attributes:
        output_size: width of a media token; None takes the LLM's hidden size.
        hidden_size: None is output_size; a linear map without bias brings features of another width to it.
        num_queries: number of media tokens of an image; a square number with "sincos" positions.
        num_heads: None is hidden_size / head_dim.
        num_kv_heads: None is num_heads.
        mlp_size: None, or the width of a pre-norm MLP with a residual connection after each attention.
        activation: of that MLP.
        residual: whether the output of attention is added to the queries instead of replacing them.
    """

    output_size: int | None = None
    hidden_size: int | None = None
    num_queries: int = 256
    num_layers: int = 1
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int = 128
    mlp_size: int | None = None
    activation: str = "relu"
    residual: bool = False
    dialect: ResamplerDialect = ResamplerDialect()

    def __post_init__(self):
        require = Requirements("resampler", self)
        require.one_of("dialect.positions", POSITIONS)
        require.one_of("dialect.norm", ("layer", "rms"))
        require.one_of("activation", ACTIVATIONS)
        require(
            self.num_queries > 0 and self.num_layers > 0,
            f"{self.num_queries} queries, {self.num_layers} layers",
            "at least one of each",
            "change num_queries or num_layers",
        )
        require(
            self.dialect.positions == "none"
            or (self.num_queries == math.isqrt(self.num_queries) ** 2 and (self.width is None or self.width % 4 == 0)),
            f"sincos positions of {self.num_queries} queries of width {self.width}",
            "a square number, because they form a grid, and a width that is a multiple of 4",
            "change num_queries, hidden_size or dialect.positions",
        )
        if self.width is None:  # the LLM's: heads are checked when it is known
            return
        require(
            self.num_heads is not None or self.width % self.head_dim == 0,
            f"width {self.width} in heads of {self.head_dim}",
            "heads that fill it",
            "change head_dim, or set num_heads",
        )
        require.kv_heads(self.heads, self.kv_heads)
        require(
            self.dialect.output_map or self.width == self.output_size,
            f"hidden_size {self.width} and output_size {self.output_size} without a map between them",
            "dialect.output_map, or equal sizes",
            "change one of them",
        )

    @property
    def width(self) -> int | None:
        """The hidden size; None before the LLM's is known."""
        return self.hidden_size or self.output_size

    @property
    def heads(self) -> int:
        """The number of heads, also if num_heads is None."""
        return self.num_heads or self.width // self.head_dim

    @property
    def kv_heads(self) -> int:
        """The number of key-value heads, also if num_kv_heads is None."""
        return self.num_kv_heads or self.heads

    pointwise = False  # the queries read all input vectors

    @property
    def needs_grid(self) -> bool:
        """A flag: the input must be a square grid of patches without other vectors."""
        return self.dialect.positions == "sincos"

    def num_tokens(self, grid: int) -> int:
        """Returns the media tokens of an image of grid x grid patches: one for each query."""
        return self.num_queries

    def make(self) -> Resampler:
        Requirements("resampler", self).given("output_size")
        return Resampler(self)


def _norm(c: ResamplerConfig, name: str) -> nn.Module:
    return (RMSNorm if c.dialect.norm == "rms" else LayerNorm)(c.dialect.norm_eps, jnp.dtype(c.dtype), name=name)


class ResamplerLayer(nn.Module):
    """Attention of the queries to the features and an optional MLP."""

    config: ResamplerConfig

    @nn.compact
    def __call__(self, queries, _, features, query_positions, key_positions):
        """Maps queries [B, Q, E] and features [B, P, E], with positions [Q, E] and [P, E] or None, to [B, Q, E]."""
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        x, found = _norm(c, "query_norm")(queries), _norm(c, "kv_norm")(features)
        q = x if query_positions is None else x + query_positions.astype(dtype)
        keys = found if key_positions is None else found + key_positions.astype(dtype)
        if dialect.attends_itself:
            keys, found = jnp.concatenate([keys, q], axis=1), jnp.concatenate([found, x], axis=1)
        kv_names = ("embed", "kv_heads", "head_dim")
        common = dict(use_bias=dialect.bias, dtype=dtype)
        q = Linear((c.heads, c.head_dim), ("embed", "heads", "head_dim"), **common, name="q")(q)
        k = Linear((c.kv_heads, c.head_dim), kv_names, **common, name="k")(keys)
        v = Linear((c.kv_heads, c.head_dim), kv_names, **common, name="v")(found)
        if dialect.qk_norm:
            q = LayerNorm(dialect.norm_eps, dtype, axis="head_dim", name="q_norm")(q)
            k = LayerNorm(dialect.norm_eps, dtype, axis="head_dim", name="k_norm")(k)
        y = Linear((c.width,), ("heads", "head_dim", "embed"), in_ndim=2, **common, name="out")(attention(q, k, v))
        queries = queries + y if c.residual else y
        if c.mlp_size is not None:
            mlp = MLP(c.mlp_size, c.activation, dialect.gated, use_bias=False, dtype=dtype, name="mlp")
            queries = queries + mlp(_norm(c, "mlp_norm")(queries))
        return constrain(queries, "batch", "queries", None), None


class Resampler(nn.Module):
    """Resampler from features to a fixed number of media tokens."""

    config: ResamplerConfig

    @nn.compact
    def __call__(self, features):
        """Maps dtype[N, P, F] to dtype[N, num_queries, output_size].

        Raises:
            DataError: "sincos" positions and patches that do not form a square grid.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        shape, names = (c.num_queries, c.width), ("queries", "embed")
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), names)
        queries = self.param("query", init, shape, jnp.float32).astype(dtype)
        query_positions = key_positions = None
        if c.dialect.positions == "sincos":
            query_positions, key_positions = self._positions(features.shape[1], shape, names)
        x = features
        if x.shape[-1] != c.width:
            x = Linear((c.width,), ("channels", "embed"), dtype=dtype, name="kv_projection")(x)
        layers = layers_of(c, ResamplerLayer, 3)
        y = jnp.broadcast_to(queries, (x.shape[0], *shape))
        y, _ = layers(c, name="layers")(y, None, x.astype(dtype), query_positions, key_positions)
        y = _norm(c, "output_norm")(y)
        if not c.dialect.output_map:
            return y
        return Linear((c.output_size,), ("channels", "embed"), dtype=dtype, name="projection")(y)

    def _positions(self, patches: int, shape, names) -> tuple[jax.Array, jax.Array]:
        """Returns the positions of the queries, and of the patches by interpolation to their grid."""
        side = math.isqrt(patches)
        if side**2 != patches:
            raise DataError(
                f"{patches} vectors of an image for a resampler with sincos positions",
                "a square grid of patches, without a class token",
                "change the connection, or the resampler's positions to 'none'",
            )

        def fixed(*_):
            return sincos_positions(math.isqrt(shape[0]), shape[1])

        # Constant, but stored: checkpoints hold it rounded to their precision.
        table = self.param("positions", nn.with_logical_partitioning(fixed, names), shape, jnp.float32)
        table = jax.lax.stop_gradient(table)
        return table, bicubic_grid(table, side, side)
