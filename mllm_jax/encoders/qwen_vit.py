"""The image encoders of Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923), Qwen3-VL (arXiv 2511.21631) and
Qwen2.5-Omni (arXiv 2503.20215), which has Qwen2.5-VL's with other names.

They encode images and videos at their own resolution, several in a row. Patches have the processors' order: the patches
of each square of merge_size x merge_size are consecutive ("merge-ordered"), so that merging is a reshape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax import struct

from mllm_jax.checkpoints.architectures import kind_of, model_type
from mllm_jax.checkpoints.config_json import (
    ELSEWHERE,
    MOST_PATCHES,
    RATIOS,
    Fields,
    check_written,
    read_fields,
    write_fields,
)
from mllm_jax.checkpoints.config_options import ENCODER_ACTIVATIONS, ConfigOptions, named_as
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Table, Weight, families, into_heads, linear, norm
from mllm_jax.encoders.qwen_patches import PatchLayout, lay_out_patches, window_numbers
from mllm_jax.encoders.vit import VisionOutput
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.attention import Attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.interpolation import bilinear_packed
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm, RMSNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.rotary import grid_angles
from mllm_jax.layers.stack import layers_of
from mllm_jax.sharding.logical import constrain

NORM_EPS = 1e-6  # of every norm in the encoders; no option sets it


@dataclass(frozen=True)
class QwenViTDialect:
    """Differences between the vision encoders; the defaults are Qwen2-VL's.

    Attributes:
        gated: whether the MLP is gated; with activation "silu" it is SwiGLU.
        norm: "layer" or "rms".
        patch_bias: whether the patch projection has a bias.
        num_positions: None, or the size of a square table of learned positions, interpolated to each image.
        deepstack_layers: layers whose outputs become features for the LLM's first layers, in ascending order.
        tokens_per_second: unit of the LLM's time positions in videos; the encoder does not read it.
        family: the Hugging Face architecture of the saved folder.
    """

    gated: bool = False
    norm: str = "layer"
    patch_bias: bool = False
    num_positions: int | None = None
    deepstack_layers: tuple[int, ...] = ()
    rope_theta: float = 10_000.0
    tokens_per_second: int | None = None
    family: str = "Qwen2VisionTransformerPretrainedModel"


@dataclass(frozen=True)
class QwenViTConfig(WithCompute):
    """Sizes of an image encoder; details that only reproduce a family are in its dialect.

    Attributes:
        temporal_patch_size: frames that make one patch; a still image is repeated.
        merge_size: side of the square of patches that becomes one media token.
        output_size: width of a media token; None takes the LLM's hidden size.
        window_size: None, or the side in pixels of the attention windows of the layers outside `full_layers`.
        full_layers: with windows, the numbers of the layers that attend to the whole frame.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    channels: int = 3
    merge_size: int = 2
    hidden_size: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    mlp_size: int = 5120
    output_size: int | None = None
    activation: str = "quick_gelu"
    window_size: int | None = None
    full_layers: tuple[int, ...] = ()
    dialect: QwenViTDialect = QwenViTDialect()

    def __post_init__(self):
        require = Requirements("Qwen ViT", self)
        require.heads(4, "RoPE rotates pairs by row and pairs by column")
        require.one_of("dialect.norm", ("layer", "rms"))
        require.one_of("activation", ACTIVATIONS)
        require(
            self.window_size is None or self.window_side,
            f"windows of {self.window_size} pixels",
            f"at least one media token, {self.patch_size * self.merge_size} pixels",
            "change window_size",
        )
        layers = self.dialect.deepstack_layers
        require(
            list(layers) == sorted(set(layers)) and all(0 <= layer < self.num_layers for layer in layers),
            f"dialect.deepstack_layers {layers} of {self.num_layers}",
            "different layers of the encoder in ascending order",
            "change dialect.deepstack_layers",
        )

    @property
    def merge_unit(self) -> int:
        """The number of patches in one media token."""
        return self.merge_size**2

    @property
    def patch_values(self) -> int:
        """The number of values in one flattened patch: channels, frames, rows, columns."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_side(self) -> int | None:
        """The side of a window in patches, a whole number of media tokens; None without windows."""
        if self.window_size is None:
            return None
        return self.window_size // self.merge_size // self.patch_size * self.merge_size

    @property
    def family(self) -> str:
        """The Hugging Face architecture of the saved folder."""
        return self.dialect.family

    packed = True  # it reads patches of images of any size

    def make(self) -> QwenViT:
        Requirements("Qwen ViT", self).given("output_size")
        return QwenViT(self)

    def lay_out(self, rows: Sequence[Sequence[tuple[int, int, int]]], num_patches: int) -> PatchLayout:
        """Packs images into rows for this encoder, see `lay_out_patches`."""
        return lay_out_patches(rows, num_patches, self.merge_size, self.window_side)


@struct.dataclass
class QwenVisionOutput(VisionOutput):
    """The output of N patches in the order of the input, and M = N / merge_size^2 media tokens.

    The values of padding are finite and have no meaning.

    Attributes:
        last_hidden_state: [B, N, E], the last layer's output. The reference's Qwen2.5-VL orders it by windows.
        pooler_output: [B, M, output_size], the merged tokens.
        hidden_states: None, or the embeddings and then each layer's output, [B, N, E] each.
        deepstack_features: merged tokens [B, M, output_size] of each deepstack layer (arXiv 2406.04334).
    """

    deepstack_features: tuple[jax.Array, ...] = ()


# ---- the encoder


def _norm(c: QwenViTConfig, name: str) -> nn.Module:
    return (RMSNorm if c.dialect.norm == "rms" else LayerNorm)(NORM_EPS, jnp.dtype(c.dtype), name=name)


class QwenViTBlock(nn.Module):
    """Pre-norm transformer layer that attends within segments or within windows."""

    config: QwenViTConfig
    keep_hidden_state: bool = False

    @nn.compact
    def __call__(self, carry, own, segments, windows, angles):
        """Applies the layer; `carry` is (x, deepstack outputs or None), `own` (full attention?, index in these)."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        (x, features), (full, index) = carry, own
        if windows is not None:
            segments = jnp.where(full, segments, windows)
        attention = Attention(c.num_heads, dtype=dtype, name="attention")
        x = x + attention(_norm(c, "attention_norm")(x), segments=segments, angles=angles)[0]
        x = x + MLP(c.mlp_size, c.activation, c.dialect.gated, dtype=dtype, name="mlp")(_norm(c, "mlp_norm")(x))
        x = constrain(x, "batch", "patches", None)
        if features is not None:
            features = features.at[index].set(x, mode="drop")
        return (x, features), x if self.keep_hidden_state else None


class PatchMerger(nn.Module):
    """Merging of each square of patches to one media token: norm, Linear, GELU, Linear."""

    config: QwenViTConfig
    norm_merged: bool = False

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, N, E] to dtype[B, N / merge_size^2, output_size]."""
        c = self.config
        dtype, norm = jnp.dtype(c.dtype), _norm(c, "norm")
        x = x if self.norm_merged else norm(x)
        x = rearrange(x, "b (n u) e -> b n (u e)", u=c.merge_unit)
        x = norm(x) if self.norm_merged else x
        x = Linear((x.shape[-1],), ("embed", "mlp"), use_bias=True, dtype=dtype, name="linear_1")(x)
        x = ACTIVATIONS["gelu"](x)
        return Linear((c.output_size,), ("mlp", "embed"), use_bias=True, dtype=dtype, name="linear_2")(x)


class QwenViT(nn.Module):
    """Image encoder from patches of packed images to media tokens (reference classes: see FAMILIES)."""

    config: QwenViTConfig

    @nn.compact
    def __call__(
        self, patches, segments, coordinates, grids, windows=None, *, output_hidden_states: bool = False
    ) -> QwenVisionOutput:
        """Encodes rows of N merge-ordered patches.

        Args:
            patches: float[B, N, channels * temporal_patch_size * patch_size^2], normalised, as processors flatten them.
            segments: int[B, N], one for each frame of an image or video, 0 is padding. Attention stays within segments.
            coordinates: int[B, N, 2], row and column in patches.
            grids: int[B, N, 2], height and width in patches of the patch's image.
            windows: int[B, N] of `window_numbers`; None computes them. Encoders without windows do not read them.

        Raises:
            DataError: patches of another size, or a number of patches that merge_size^2 does not divide.
        """
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        if patches.shape[-1] != c.patch_values or patches.shape[1] % c.merge_unit:
            raise DataError(
                f"patches {patches.shape}",
                f"[B, N, {c.patch_values}] with N a multiple of {c.merge_unit}",
                "make them with this model's processor and `lay_out_patches`",
            )
        x = Linear(
            (c.hidden_size,), ("channels", "embed"), use_bias=dialect.patch_bias, dtype=dtype, name="patch_embedding"
        )(patches)
        if dialect.num_positions is not None:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("patches", "embed"))
            table = self.param("position_embedding", init, (dialect.num_positions, c.hidden_size), jnp.float32)
            table = constrain(table, None, None)  # replicated: it is small, and patches are sharded by row
            x = x + bilinear_packed(table, coordinates, grids).astype(dtype)
        x = embedded = constrain(x, "batch", "patches", None)
        if c.window_side is None:
            windows = None
        elif windows is None:
            windows = window_numbers(segments, coordinates, grids, c.window_side)
        angles = grid_angles(coordinates, c.hidden_size // c.num_heads, dialect.rope_theta)
        numbers, depth = np.arange(c.num_layers), len(dialect.deepstack_layers)
        # Layers outside deepstack_layers get an index past the end, where writes are dropped.
        indices = np.array(
            [dialect.deepstack_layers.index(i) if i in dialect.deepstack_layers else depth for i in numbers]
        )
        features = jnp.zeros((depth, *x.shape), dtype) if depth else None
        layers = layers_of(c, QwenViTBlock, 3)(c, output_hidden_states, name="layers")
        own = (jnp.asarray(np.isin(numbers, c.full_layers)), jnp.asarray(indices, jnp.int32))
        (x, features), states = layers((x, features), own, segments, windows, angles)
        deepstack = ()
        if depth:
            mergers = nn.vmap(
                PatchMerger,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, norm_merged=True, name="deepstack_mergers")
            deepstack = tuple(mergers(features))
        return QwenVisionOutput(
            last_hidden_state=x,
            pooler_output=PatchMerger(c, name="merger")(x),
            hidden_states=(embedded, *states) if output_hidden_states else None,
            deepstack_features=deepstack,
        )


# ---- Hugging Face folders

_QWEN2, _QWEN25, _QWEN3, _OMNI = (
    "Qwen2VisionTransformerPretrainedModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen3VLVisionModel",
    "Qwen2_5OmniVisionEncoder",
)
# Defaults of the options that config.json leaves out.
_COMMON = dict(num_heads=16, in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
_WINDOWED = _COMMON | dict(
    depth=32, hidden_size=3584, hidden_act="silu", intermediate_size=3420, out_hidden_size=3584, window_size=112,
    fullatt_block_indexes=(7, 15, 23, 31),
)  # fmt: skip
_DEFAULTS = {
    _QWEN2: _COMMON | dict(depth=32, embed_dim=1280, hidden_size=3584, hidden_act="quick_gelu", mlp_ratio=4),
    _QWEN25: _WINDOWED | dict(tokens_per_second=4),
    _OMNI: _WINDOWED,
    _QWEN3: _COMMON
    | dict(depth=27, hidden_size=1152, hidden_act="gelu_pytorch_tanh", intermediate_size=4304, out_hidden_size=3584)
    | dict(patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=(8, 16, 24)),
}
MOST_PATCH = 256  # a side in pixels, or in patches that become one token
_FIELDS: Fields = {
    "patch_size": ("patch_size", "size", ..., MOST_PATCH),
    "temporal_patch_size": ("temporal_patch_size", "size"),
    "channels": ("in_channels", "size"),
    "merge_size": ("spatial_merge_size", "size", ..., MOST_PATCH),
    "num_layers": ("depth", "size"),
    "num_heads": ("num_heads", "size"),
    "activation": ("hidden_act", "activation", ENCODER_ACTIVATIONS),
}
_WIDTHS: Fields = {
    "hidden_size": ("hidden_size", "size"),
    "mlp_size": ("intermediate_size", "size"),
    "output_size": ("out_hidden_size", "size"),
}
_WINDOWS: Fields = _WIDTHS | {
    "window_size": ("window_size", "size"),
    "full_layers": ("fullatt_block_indexes", "counts"),
}
_OWN: dict[str, Fields] = {
    _QWEN2: {"hidden_size": ("embed_dim", "size"), "output_size": ("hidden_size", "size")},
    _QWEN25: _WINDOWS | {"tokens_per_second": ("tokens_per_second", "size")},
    _OMNI: _WINDOWS,
    _QWEN3: _WIDTHS
    | {
        "num_positions": ("num_position_embeddings", "size", ..., MOST_PATCHES**2),
        "deepstack_layers": ("deepstack_visual_indexes", "counts"),
    },
}
# The modules' names: queries, keys and values, projections of the MLP, then the merger's norm and two maps.
_NAMES = {
    _QWEN2: (("qkv",) * 3, ("fc1", "fc2"), ("ln_q", "mlp.0", "mlp.2")),
    _QWEN25: (("qkv",) * 3, ("up_proj", "down_proj"), ("ln_q", "mlp.0", "mlp.2")),
    _QWEN3: (("qkv",) * 3, ("linear_fc1", "linear_fc2"), ("norm", "linear_fc1", "linear_fc2")),
    _OMNI: (tuple("qkv"), ("up_proj", "down_proj"), ("ln_q", "mlp.0", "mlp.2")),
}


def from_hf_config(values: dict) -> QwenViTConfig:
    """Reads config.json of an image encoder, or only the `vision_config` in that of a whole model.

    Raises:
        ConfigError: another architecture, or an unsupported option.
    """
    part = ConfigOptions(values, "config.json of a Qwen-VL").part("vision_config", {}) or values
    kind = str(named_as(values)[1]).removesuffix("_vision")
    named = [name for name in named_as(part)[0] if name in _DEFAULTS]
    kinds = {model_type(name).removesuffix("_vision"): name for name in _DEFAULTS}
    family = named[0] if named else kinds.get(kind)
    if family is None:
        raise ConfigError(
            f"a config.json with architectures={part.get('architectures')}, model_type={values.get('model_type')!r}",
            f"{' or '.join(_DEFAULTS)}, or a model_type of {', '.join(kinds)}",
            "read it with the family of its architecture: mllm_jax.supported_models()",
        )
    options = ConfigOptions(
        _DEFAULTS[family] | {k: v for k, v in part.items() if v is not None}, f"config.json of {family}"
    )
    rope = ConfigOptions(options.part("rope_parameters", {}), f"rope_parameters of {family}")
    rope.only("rope_type", "axial")
    read = read_fields(options, _FIELDS | _OWN[family]) | dict(family=family)
    read["rope_theta"] = rope.number("rope_theta", 10_000.0, least=1.0)
    rope.done()
    # Spellings of the first checkpoints, which the reference class does not read.
    options.only("in_chans", read["channels"])
    options.only("spatial_patch_size", read["patch_size"])
    if family == _QWEN2:
        read["mlp_size"] = int(read["hidden_size"] * options.number("mlp_ratio", ..., *RATIOS))
    if family in (_QWEN25, _OMNI):
        read |= dict(norm="rms", gated=True)
    if family == _OMNI:  # as the hub's files have them; the whole model has its own steps a second
        options.only("embed_dim", read["hidden_size"])
        options.skip("tokens_per_second")
    if family == _QWEN3:
        read |= dict(patch_bias=True)
    options.skip(*ELSEWHERE)
    options.done()
    return make_config(QwenViTConfig, **read)


def to_hf_config(config: QwenViTConfig) -> dict:
    """Returns config.json of a folder with only the encoder, the inverse of `from_hf_config`.

    Raises:
        ConfigError: some fields cannot be expressed in the family's options; names them.
    """
    c = config
    if c.family not in _DEFAULTS:
        raise ConfigError(f"Qwen ViT: family {c.family!r}", f"one of {', '.join(_DEFAULTS)}", "change family")
    written = kind_of(c.family) | write_fields(c, _FIELDS | _OWN[c.family])
    written["rope_parameters"] = dict(rope_type="axial", rope_theta=c.dialect.rope_theta)
    if c.family == _QWEN2:
        written["mlp_ratio"] = c.mlp_size // c.hidden_size
    return check_written(c, written, from_hf_config, "a Qwen ViT")


def table(config: QwenViTConfig) -> Table:
    """Returns the table of the encoder's weights; in a whole model's folder the LLM's weights are ignored."""
    c, dialect = config, config.dialect
    heads, (up, down), merger = _NAMES[c.family]
    head, bias, hub = {"h": c.hidden_size // c.num_heads}, dialect.norm == "layer", "blocks.{layer}"

    def merge(name: str, path: str) -> list[Weight]:
        maps = linear(f"{name}.{merger[1]}", f"{path}/linear_1") + linear(f"{name}.{merger[2]}", f"{path}/linear_2")
        return norm(f"{name}.{merger[0]}", f"{path}/norm", bias=bias) + maps

    sizes = dict(c=c.channels, t=c.temporal_patch_size, p=c.patch_size, q=c.patch_size)
    weights = linear("patch_embed.proj", "patch_embedding", "e c t p q -> (c t p q) e", sizes, bias=dialect.patch_bias)
    if dialect.num_positions is not None:
        weights.append(Weight("pos_embed.weight", "position_embedding"))
    weights += norm(f"{hub}.norm1", "layers/attention_norm", bias=bias)
    weights += norm(f"{hub}.norm2", "layers/mlp_norm", bias=bias)
    names = [f"{hub}.attn.{name}" for name in heads]
    weights += into_heads(names, "layers/attention", head["h"], (c.hidden_size,) * 3)
    weights += linear(f"{hub}.attn.proj", "layers/attention/out", OUT_OF_HEADS, head)
    if dialect.gated:
        weights += linear(f"{hub}.mlp.gate_proj", "layers/mlp/gate")
    weights += linear(f"{hub}.mlp.{up}", "layers/mlp/up") + linear(f"{hub}.mlp.{down}", "layers/mlp/down")
    weights += merge("merger", "merger")
    if dialect.deepstack_layers:
        weights += merge("deepstack_merger_list.{layer}", "deepstack_mergers")
    spellings = (
        (r"^(?:model\.)?visual\.", ""),
        (r"^(?:model\.(?:language_model|embed_tokens|layers|norm)|language_model|lm_head)\..+$", "language_model"),
    )
    return Table(tuple(weights), spellings, ("rotary_pos_emb.inv_freq", "language_model"))


def sample(config: QwenViTConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    unit = (1, config.merge_unit)
    integers, pairs = jnp.ones(unit, jnp.int32), jnp.ones((*unit, 2), jnp.int32)
    return jnp.zeros((*unit, config.patch_values)), integers, pairs, pairs


FAMILIES = families(
    {_QWEN2: "Qwen2-VL ViT", _QWEN25: "Qwen2.5-VL ViT", _QWEN3: "Qwen3-VL ViT", _OMNI: "Qwen2.5-Omni ViT"},
    from_hf=from_hf_config,
    to_hf=to_hf_config,
    table=table,
    sample=sample,
)
