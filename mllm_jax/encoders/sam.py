"""The image encoder of Segment Anything (arXiv 2304.02643) as `SamVisionModel`: a ViT with windows, and a neck.

Most layers attend within windows and a few over the whole image. Each score has two learned terms, one for the distance
of rows and one for the distance of columns (arXiv 2112.01526). The neck reduces the width of each patch's vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import linen as nn

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import (
    ELSEWHERE,
    RATIOS,
    Fields,
    check_written,
    read_fields,
    read_grid,
    stored_fields,
    write_fields,
)
from mllm_jax.checkpoints.config_options import ENCODER_ACTIVATIONS
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import (
    OUT_OF_HEADS,
    Table,
    Weight,
    families,
    image_sample,
    into_heads,
    linear,
    nested,
    norm,
)
from mllm_jax.encoders.vision_hub import options_of
from mllm_jax.encoders.vit import VisionOutput
from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import REMAT_POLICIES
from mllm_jax.sharding.logical import constrain

NECK_EPS = 1e-6  # of the neck's LayerNorms, independent of the layers' epsilon


@dataclass(frozen=True)
class SamDialect:
    """Details that are the same in all published SAMs.

    Attributes:
        norm_eps: of the layers' LayerNorms.
        absolute_positions, relative_positions: whether the encoder has these tables of positions.
        family: the Hugging Face architecture of the saved folder.
    """

    norm_eps: float = 1e-6
    qkv_bias: bool = True
    absolute_positions: bool = True
    relative_positions: bool = True
    family: str = "SamVisionModel"


@dataclass(frozen=True)
class SamConfig(WithCompute):
    """Sizes of a SAM; the defaults are SAM-B's.

    Attributes:
        image_size: side of the square images; others are refused, because the position tables fit one grid.
        output_channels: width after the neck.
        window: side of the windows in patches; at the right and lower edges they are padded with zeros.
        global_layers: the layers that attend over the whole image instead of windows.
        image_mean, image_std: of the normalisation of pixels in [0, 1].
    """

    image_size: int = 1024
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    output_channels: int = 256
    window: int = 14
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    activation: str = "gelu"
    num_channels: int = 3
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    dialect: SamDialect = SamDialect()

    class_token = False  # there is none

    def __post_init__(self):
        require = Requirements("SAM", self)
        require(
            self.image_size >= self.patch_size and not self.image_size % self.patch_size,
            f"image {self.image_size}, patch {self.patch_size}",
            "an image that is a whole number of patches",
            "change image_size or patch_size",
        )
        require(
            self.window >= 1 and all(0 <= layer < self.num_layers for layer in self.global_layers),
            f"window {self.window}, global layers {self.global_layers} of {self.num_layers}",
            "windows of at least one patch, and layers that exist",
            "change window, global_layers or num_layers",
        )
        require.heads()
        require.one_of("activation", ACTIVATIONS)

    @property
    def grid(self) -> int:
        """The number of output vectors along one side."""
        return self.image_size // self.patch_size

    @property
    def family(self) -> str:
        """The Hugging Face architecture of the saved folder."""
        return self.dialect.family

    def make(self) -> Sam:
        return Sam(self)


class SamAttention(nn.Module):
    """Attention over a grid of patches, with learned terms for the distances of rows and of columns."""

    config: SamConfig

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, H, W, E] to dtype[B, H, W, E]; the tables fit this H and W."""
        c = self.config
        head, dtype = c.hidden_size // c.num_heads, jnp.dtype(c.dtype)
        into = dict(features=(c.num_heads, head), names=("embed", "heads", "head_dim"), use_bias=c.dialect.qkv_bias)
        q, k, v = (Linear(**into, dtype=dtype, name=name)(x) for name in "qkv")
        height, width = x.shape[1:3]
        scaled = q * head**-0.5
        if c.dialect.relative_positions:
            # Each query is extended by its terms of all rows and columns, and each key by one-hot vectors of its row
            # and column. Their product adds the terms to the score in any implementation of attention.
            by_row = jnp.einsum("b r c n h, r k h -> b r c n k", q, self._distances("rows", height, head, dtype))
            by_column = jnp.einsum("b r c n h, c k h -> b r c n k", q, self._distances("columns", width, head, dtype))
            scaled = jnp.concatenate([scaled, by_row, by_column], axis=-1)
            row = repeat(jnp.eye(height, dtype=dtype), "r k -> b r c n k", b=x.shape[0], c=width, n=c.num_heads)
            column = repeat(jnp.eye(width, dtype=dtype), "c k -> b r c n k", b=x.shape[0], r=height, n=c.num_heads)
            k = jnp.concatenate([k, row, column], axis=-1)
        y = attention(*(rearrange(each, "b r c n h -> b (r c) n h") for each in (scaled, k, v)), scale=1.0)
        y = rearrange(y, "b (r c) n h -> b r c n h", r=height)
        out = dict(features=(c.hidden_size,), names=("heads", "head_dim", "embed"), in_ndim=2)
        return Linear(**out, use_bias=True, dtype=dtype, name="out")(y)

    def _distances(self, name: str, size: int, head: int, dtype):
        """Returns dtype[size, size, head]: the table's row for the distance of each query and key along one axis."""
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, "head_dim"))
        table = self.param(name, init, (2 * size - 1, head), jnp.float32).astype(dtype)
        index = np.arange(size)
        return table[index[:, None] - index[None, :] + size - 1]


class SamBlock(nn.Module):
    """Pre-norm transformer layer on a grid of patches, in windows unless it is global."""

    config: SamConfig
    windowed: bool

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, H, W, E] to dtype[B, H, W, E]."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        h = LayerNorm(c.dialect.norm_eps, dtype, name="attention_norm")(x)
        attend = SamAttention(c, name="attention")
        x = x + (self._in_windows(attend, h) if self.windowed else attend(h))
        h = LayerNorm(c.dialect.norm_eps, dtype, name="mlp_norm")(x)
        x = x + MLP(c.mlp_size, c.activation, dtype=dtype, name="mlp")(h)
        return constrain(x, "batch", "patches", None, None)

    def _in_windows(self, attend, x):
        # The zeros at the edges are attended to like patches, as in training.
        (height, width), side = x.shape[1:3], self.config.window
        x = jnp.pad(x, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
        sizes = dict(rows=x.shape[1] // side, columns=x.shape[2] // side)
        x = attend(rearrange(x, "b (rows r) (columns c) e -> (b rows columns) r c e", **sizes))
        x = rearrange(x, "(b rows columns) r c e -> b (rows r) (columns c) e", **sizes)
        return x[:, :height, :width]


class Convolution(nn.Module):
    """3 x 3 convolution without bias, padded with one zero on each side."""

    features: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, H, W, C] to dtype[B, H / stride, W / stride, features]."""
        init = nn.with_logical_partitioning(nn.initializers.he_normal(), (None, None, "channels", "channels"))
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features), jnp.float32).astype(self.dtype)
        steps, margins, order = (self.stride,) * 2, ((1, 1), (1, 1)), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x.astype(self.dtype), kernel, steps, margins, dimension_numbers=order)


class SamNeck(nn.Module):
    """The neck: Linear, LayerNorm, 3 x 3 convolution, LayerNorm."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, H, W, E] to dtype[B, H, W, features]."""
        norm = dict(eps=NECK_EPS, dtype=self.dtype, axis="channels")
        x = Linear((self.features,), ("embed", "channels"), dtype=self.dtype, name="projection")(x)
        x = Convolution(self.features, dtype=self.dtype, name="convolution")(LayerNorm(**norm, name="norm_1")(x))
        return LayerNorm(**norm, name="norm_2")(x)


class Sam(nn.Module):
    """Encoder of images to one vector a patch (reference: `SamVisionModel`)."""

    config: SamConfig

    @nn.compact
    def __call__(self, pixels, output_hidden_states=False) -> VisionOutput:
        """Encodes images.

        Args:
            pixels: normalised, float[B, image_size, image_size, C].

        Returns:
            VisionOutput: last_hidden_state dtype[B, N, output_channels], the neck's output, patches row by row;
            hidden_states, the input of the first layer and the output of each layer, dtype[B, N, E].

        Raises:
            ConfigError: images of another shape.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        if pixels.shape[1:] != (c.image_size, c.image_size, c.num_channels):
            raise ConfigError(
                f"SAM: pixels of shape {list(pixels.shape)}",
                f"[B, {c.image_size}, {c.image_size}, {c.num_channels}]",
                "resize and pad the images to that square",
            )
        x = rearrange(pixels, "b (h p) (w q) c -> b h w (p q c)", p=c.patch_size, q=c.patch_size)
        x = Linear((c.hidden_size,), ("channels", "embed"), use_bias=True, dtype=dtype, name="patch_embedding")(x)
        if c.dialect.absolute_positions:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("patches", None, "embed"))
            x = x + self.param("position_embedding", init, (c.grid, c.grid, c.hidden_size), jnp.float32).astype(dtype)
        policy = REMAT_POLICIES[c.remat]
        block = SamBlock if c.remat == "none" else nn.remat(SamBlock, policy=policy)
        states = [x]
        # Not scanned: the tables of windows and of whole images differ in size.
        for i in range(c.num_layers):
            states.append(block(c, windowed=i not in c.global_layers, name=f"layer_{i}")(states[-1]))
        x = SamNeck(c.output_channels, dtype, name="neck")(states[-1])
        flat = [rearrange(each, "b h w e -> b (h w) e") for each in (x, *states)]
        return VisionOutput(flat[0], hidden_states=tuple(flat[1:]) if output_hidden_states else None)


# ---- Hugging Face folders

_FAMILY = "SamVisionModel"
_FIELDS: Fields = {
    "hidden_size": ("hidden_size", "size", 768),
    "num_layers": ("num_hidden_layers", "size", 12),
    "num_heads": ("num_attention_heads", "size", 12),
    "output_channels": ("output_channels", "size", 256),
    "window": ("window_size", "count", 14),
    "global_layers": ("global_attn_indexes", "counts", (2, 5, 8, 11)),
    "activation": ("hidden_act", "activation", ENCODER_ACTIVATIONS, "gelu"),
    "norm_eps": ("layer_norm_eps", "number", 1e-6, 0.0),
    "qkv_bias": ("qkv_bias", "flag", True),
    "absolute_positions": ("use_abs_pos", "flag", True),
    "relative_positions": ("use_rel_pos", "flag", True),
    "num_channels": ("num_channels", "size", 3),
}


def from_hf_config(values: dict) -> SamConfig:
    """Reads config.json of SamVisionModel, or the part for it in a larger model's config.json."""
    options = options_of(values, dict(image_size=1024, patch_size=16), _FAMILY)
    options.skip("num_pos_feats", "scale", *ELSEWHERE)  # of the prompt encoder
    read = read_grid(options) | read_fields(options, _FIELDS)
    width = int(read["hidden_size"] * options.number("mlp_ratio", 4.0, *RATIOS))
    config = make_config(SamConfig, **read, mlp_size=options.size("mlp_dim", width))
    options.done()
    return config


def to_hf_config(config: SamConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`. Raises ConfigError: switches without an option."""
    c = config
    sizes = dict(image_size=c.image_size, patch_size=c.patch_size, mlp_dim=c.mlp_size)
    return check_written(c, kind_of(c.family) | sizes | write_fields(c, _FIELDS), from_hf_config, "a SAM", _facts)


def _facts(c: SamConfig) -> dict:
    return stored_fields(c, "image_mean", "image_std")


def sam_weights(c: SamConfig) -> list[Weight]:
    """Returns the encoder's weights under Hugging Face's names."""
    head = {"h": c.hidden_size // c.num_heads}
    patch = dict(p=c.patch_size, q=c.patch_size, c=c.num_channels)
    weights = linear("patch_embed.projection", "patch_embedding", "e c p q -> (p q c) e", patch)
    if c.dialect.absolute_positions:
        weights.append(Weight("pos_embed", "position_embedding", "1 h w e -> h w e"))
    for i in range(c.num_layers):
        hub, layer = f"layers.{i}", f"layer_{i}"
        weights += norm(f"{hub}.layer_norm1", f"{layer}/attention_norm")
        biased, rows = "qkv" if c.dialect.qkv_bias else "", (c.hidden_size,) * 3
        weights += into_heads((f"{hub}.attn.qkv",) * 3, f"{layer}/attention", head["h"], rows, biased)
        if c.dialect.relative_positions:
            weights.append(Weight(f"{hub}.attn.rel_pos_h", f"{layer}/attention/rows"))
            weights.append(Weight(f"{hub}.attn.rel_pos_w", f"{layer}/attention/columns"))
        weights += linear(f"{hub}.attn.proj", f"{layer}/attention/out", OUT_OF_HEADS, head)
        weights += norm(f"{hub}.layer_norm2", f"{layer}/mlp_norm")
        weights += linear(f"{hub}.mlp.lin1", f"{layer}/mlp/up") + linear(f"{hub}.mlp.lin2", f"{layer}/mlp/down")
    return weights + neck_weights("neck", "neck")


def convolution_weight(name: str, path: str) -> Weight:
    return Weight(f"{name}.weight", f"{path}/kernel", "o i p q -> p q i o")


def neck_weights(name: str, path: str) -> list[Weight]:
    return [
        Weight(f"{name}.conv1.weight", f"{path}/projection/kernel", "o i 1 1 -> i o"),
        *norm(f"{name}.layer_norm1", f"{path}/norm_1"),
        convolution_weight(f"{name}.conv2", f"{path}/convolution"),
        *norm(f"{name}.layer_norm2", f"{path}/norm_2"),
    ]


def table(config: SamConfig) -> Table:
    weights = sam_weights(config)
    named = nested(Table(tuple(weights)), "vision_encoder.", "")
    return Table(named, ((r"^(?!vision_encoder\.)", "vision_encoder."),))


FAMILIES = families(
    {_FAMILY: "SAM's image encoder"}, from_hf=from_hf_config, to_hf=to_hf_config, table=table, sample=image_sample
)
