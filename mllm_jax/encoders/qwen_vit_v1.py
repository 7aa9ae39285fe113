"""The first Qwen-VL's vision tower (arXiv 2308.12966): a ViT-bigG and a resampler with 256 queries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from mllm_jax.checkpoints.options import Options
from mllm_jax.checkpoints.table import Family, Table, Weight
from mllm_jax.encoders.vit import VisionOutput
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.attention import Attention, attention
from mllm_jax.layers.interpolation import bicubic_grid
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import scan_layers
from mllm_jax.sharding.logical import constrain

NORM_EPS = 1e-6  # of every norm; no option sets it
# Qwen-VL's repository has no class for the tower alone, and its folders no architecture of its own: this is ours.
ARCHITECTURE = "QWenVisionTransformer"


@dataclass(frozen=True)
class QwenViTV1Config:
    """Sizes of the tower.

    Attributes:
        image_size: pixels a side that it was trained on; other sizes are taken too, positions are interpolated.
        mlp_ratio: the MLP's width over hidden_size, cut to a whole number.
        num_positions: entries of the square table of learned positions.
        num_queries: vectors that come out of the resampler, a square number.
        output_size: their width, which is the LLM's.
        query_head_dim: size of the resampler's heads.
        family: the architecture that it is written as.
    """

    image_size: int = 448
    patch_size: int = 14
    hidden_size: int = 1664
    num_layers: int = 48
    num_heads: int = 16
    mlp_ratio: float = 4.9231
    num_positions: int = 256
    num_queries: int = 256
    output_size: int = 4096
    query_head_dim: int = 128
    family: str = ARCHITECTURE
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self):
        require = Requirements("Qwen-VL's ViT", self)
        for name in ("num_positions", "num_queries"):
            size = getattr(self, name)
            require(
                size == math.isqrt(size) ** 2, f"{name} {size}", "a square number: they form a grid", f"change {name}"
            )
        require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size}, patch_size {self.patch_size}",
            "a picture that is a whole number of patches",
            "change one of them",
        )
        require.heads()
        require(
            self.output_size % self.query_head_dim == 0 and self.output_size % 4 == 0,
            f"output_size {self.output_size}, resampler heads of {self.query_head_dim}",
            "a multiple of the heads' size and of 4",
            "change output_size",
        )

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    def make(self) -> QwenViTV1:
        return QwenViTV1(self)


def sincos_positions(side: int, width: int) -> np.ndarray:
    """float32[side^2, width]: sines and cosines of the column, then of the row, half of the width each."""
    frequencies = (1.0 / 10_000 ** (np.arange(width // 4) / np.float32(width / 4))).astype(np.float32)
    rows, columns = np.divmod(np.arange(side**2, dtype=np.float32), side)
    parts = [f(places[:, None] * frequencies) for places in (columns, rows) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class QwenViTV1Block(nn.Module):
    """Pre-norm transformer layer, full attention; `capture` gives its output to the scan too."""

    config: QwenViTV1Config
    capture: bool = False

    @nn.compact
    def __call__(self, x, _):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        h = LayerNorm(NORM_EPS, dtype, name="attention_norm")(x)
        x = x + Attention(c.num_heads, dtype=dtype, name="attention")(h)[0]
        h = LayerNorm(NORM_EPS, dtype, name="mlp_norm")(x)
        x = x + MLP(c.mlp_size, "gelu", dtype=dtype, name="mlp")(h)
        x = constrain(x, "batch", "patches", None)
        return x, x if self.capture else None


class Resampler(nn.Module):
    """Learned queries that attend to the patches once; fixed 2-D positions are added to queries and keys."""

    config: QwenViTV1Config

    @nn.compact
    def __call__(self, x, grid: tuple[int, int]):
        """dtype[B, h*w, E] of a grid (h, w) -> dtype[B, num_queries, output_size]"""
        c = self.config
        dtype, width = jnp.dtype(c.dtype), c.output_size
        shape, names = (c.num_queries, width), ("queries", "embed")

        def fixed(*_):
            return jnp.asarray(sincos_positions(math.isqrt(c.num_queries), width))

        query = self.param(
            "query", nn.with_logical_partitioning(nn.initializers.normal(0.02), names), shape, jnp.float32
        )
        # Not learnt, but stored: checkpoints hold it rounded to their own precision.
        positions = self.param("positions", nn.with_logical_partitioning(fixed, names), shape, jnp.float32)
        positions = jax.lax.stop_gradient(positions)
        if c.hidden_size != width:
            x = Linear((width,), (None, "embed"), dtype=dtype, name="kv_projection")(x)
        x = LayerNorm(NORM_EPS, dtype, name="kv_norm")(x)
        queries = LayerNorm(NORM_EPS, dtype, name="query_norm")(query) + positions.astype(dtype)
        keys = x + bicubic_grid(positions, *grid).astype(dtype)
        heads = (width // c.query_head_dim, c.query_head_dim)
        common = dict(names=("embed", "heads", "head_dim"), use_bias=True, dtype=dtype)
        q = Linear(heads, **common, name="q")(queries)
        k, v = Linear(heads, **common, name="k")(keys), Linear(heads, **common, name="v")(x)
        y = attention(jnp.broadcast_to(q, (x.shape[0], *q.shape)), k, v)
        out = ("heads", "head_dim", "embed")
        return Linear((width,), out, in_ndim=2, use_bias=True, dtype=dtype, name="out")(y)


class QwenViTV1(nn.Module):
    """Pixels to a fixed number of media tokens (reference: `VisionTransformer` in Qwen-VL-Chat's visual.py)."""

    config: QwenViTV1Config

    @nn.compact
    def __call__(self, pixels, output_hidden_states: bool = False) -> VisionOutput:
        """Encodes normalised pixels float[B, H, W, 3].

        Returns:
            last_hidden_state [B, N, hidden_size] is what the resampler reads; pooler_output [B, num_queries,
            output_size] are the media tokens, the only output of the reference.

        Raises:
            DataError: pictures that are not a whole number of patches.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        _, height, width, channels = pixels.shape
        if height % c.patch_size or width % c.patch_size or channels != 3:
            raise DataError(
                f"pixels {pixels.shape}",
                f"[B, H, W, 3] with H and W multiples of {c.patch_size}",
                "resize the pictures with this model's processing",
            )
        grid = (height // c.patch_size, width // c.patch_size)
        x = rearrange(pixels.astype(dtype), "b (h p) (w q) c -> b (h w) (p q c)", p=c.patch_size, q=c.patch_size)
        x = Linear((c.hidden_size,), ("channels", "embed"), dtype=dtype, name="patch_embedding")(x)
        init = nn.with_logical_partitioning(nn.initializers.normal(c.hidden_size**-0.5), ("patches", "embed"))
        positions = self.param("position_embedding", init, (c.num_positions, c.hidden_size), jnp.float32)
        x = LayerNorm(NORM_EPS, dtype, name="pre_norm")(x + bicubic_grid(positions, *grid).astype(dtype))
        x = embedded = constrain(x, "batch", "patches", None)
        layers = scan_layers(
            QwenViTV1Block, num_layers=c.num_layers, remat=c.remat, unroll=c.scan_unroll, num_broadcast=0
        )
        x, states = layers(c, output_hidden_states, name="layers")(x, None)
        tokens = Resampler(c, name="resampler")(x, grid)
        tokens = LayerNorm(NORM_EPS, dtype, name="post_norm")(tokens)
        tokens = Linear((c.output_size,), ("embed", None), dtype=dtype, name="projection")(tokens)
        return VisionOutput(
            last_hidden_state=x,
            pooler_output=tokens,
            hidden_states=(embedded, *states) if output_hidden_states else None,
        )


# ---- Hugging Face folders


def from_hf_config(values: dict) -> QwenViTV1Config:
    """The `visual` part of a Qwen-VL config.json, alone or within the whole, whose other entries are not read.

    Raises:
        ConfigError: no such part, or an option that is not supported.
    """
    options = Options(values.get("visual") or values, "the visual part of Qwen-VL's config.json")
    config = QwenViTV1Config(
        image_size=options("image_size"),
        patch_size=options("patch_size"),
        hidden_size=options("width"),
        num_layers=options("layers"),
        num_heads=options("heads"),
        mlp_ratio=options("mlp_ratio"),
        num_queries=options("n_queries", 256),
        output_size=options("output_dim"),
    )
    options.skip("image_start_id")  # where the LLM's text has a picture
    options.done()
    return config


def to_hf_config(config: QwenViTV1Config) -> dict:
    """The reverse. Raises ConfigError: sizes that the reference has fixed."""
    c = config
    if (c.num_positions, c.query_head_dim, c.family) != (256, 128, ARCHITECTURE):
        raise ConfigError(
            f"Qwen-VL's ViT with {c.num_positions} positions, resampler heads of {c.query_head_dim}, family {c.family}",
            f"256 positions, heads of 128, family {ARCHITECTURE}: no option says otherwise",
            "change num_positions, query_head_dim or family",
        )
    return dict(
        architectures=[ARCHITECTURE],
        image_size=c.image_size,
        patch_size=c.patch_size,
        width=c.hidden_size,
        layers=c.num_layers,
        heads=c.num_heads,
        mlp_ratio=c.mlp_ratio,
        n_queries=c.num_queries,
        output_dim=c.output_size,
    )


def table(config: QwenViTV1Config) -> Table:
    """The tower's weights under the names of visual.py; in a whole model's folder the LLM's are passed over."""
    c = config
    weights = [
        Weight("conv1.weight", "patch_embedding/kernel", "e c p q -> (p q c) e", dict(c=3, p=c.patch_size)),
        Weight("positional_embedding", "position_embedding"),
        Weight("attn_pool.query", "resampler/query"),
        Weight("attn_pool.pos_embed", "resampler/positions"),
        Weight("proj", "projection/kernel"),
    ]

    def norm(name: str, path: str):
        weights.append(Weight(f"{name}.weight", f"{path}/scale"))
        weights.append(Weight(f"{name}.bias", f"{path}/bias"))

    def linear(name: str, path: str, pattern: str = "o i -> i o", sizes=None):
        weights.append(Weight(f"{name}.weight", f"{path}/kernel", pattern, sizes or {}))
        weights.append(Weight(f"{name}.bias", f"{path}/bias"))

    block, head = "transformer.resblocks.{layer}", {"h": c.hidden_size // c.num_heads}
    norm("ln_pre", "pre_norm")
    norm("ln_post", "post_norm")
    norm(f"{block}.ln_1", "layers/attention_norm")
    norm(f"{block}.ln_2", "layers/mlp_norm")
    fused = f"{block}.attn.in_proj"
    for part, letter in enumerate("qkv"):
        # Head after head, each with its query, key and value rows.
        path, sizes = f"layers/attention/{letter}", head | {"p": 3}
        weights.append(Weight(f"{fused}.weight", f"{path}/kernel", "(n p h) e -> p e n h", sizes, part=part))
        weights.append(Weight(f"{fused}.bias", f"{path}/bias", "(n p h) -> p n h", sizes, part=part))
    linear(f"{block}.attn.out_proj", "layers/attention/out", "e (n h) -> n h e", head)
    linear(f"{block}.mlp.c_fc", "layers/mlp/up")
    linear(f"{block}.mlp.c_proj", "layers/mlp/down")
    if c.hidden_size != c.output_size:
        weights.append(Weight("attn_pool.kv_proj.weight", "resampler/kv_projection/kernel", "o i -> i o"))
    norm("attn_pool.ln_kv", "resampler/kv_norm")
    norm("attn_pool.ln_q", "resampler/query_norm")
    head = {"h": c.query_head_dim}
    for part, letter in enumerate("qkv"):
        rows, path = (part * c.output_size, (part + 1) * c.output_size), f"resampler/{letter}"
        weights.append(Weight("attn_pool.attn.in_proj_weight", f"{path}/kernel", "(n h) e -> e n h", head, rows))
        weights.append(Weight("attn_pool.attn.in_proj_bias", f"{path}/bias", "(n h) -> n h", head, rows))
    linear("attn_pool.attn.out_proj", "resampler/out", "e (n h) -> n h e", head)
    spellings = (
        (r"^(?:transformer\.)?visual\.", ""),
        (r"^(?:transformer\.(?:wte|h|ln_f|rotary_emb)|lm_head)\..+$", "language_model"),
    )
    return Table(tuple(weights), spellings, ("language_model",))


def sample(config: QwenViTV1Config) -> tuple:
    """Arguments with which `init` creates every parameter."""
    return (jnp.zeros((1, config.image_size, config.image_size, 3)),)


FAMILIES = (
    Family(
        "Qwen-VL (first) ViT",
        (ARCHITECTURE,),
        from_hf_config,
        to_hf_config,
        table,
        sample,
        oracle="recorded outputs of Qwen-VL-Chat's visual.py",
    ),
)
