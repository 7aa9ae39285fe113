"""Vision transformer (arXiv 2010.11929), from pixels to one vector a patch.

Its options make it CLIP, SigLIP, DINOv2, EVA-01, EVA-02-CLIP or InternViT. Each of these has a file with its config and
its checkpoints' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from mllm_jax.encoders.vit_embeddings import AttentionPooling, PatchEmbedding, RegionPooling
from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import Attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.interpolation import bicubic_grid, bicubic_packed
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm, RMSNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.rotary import grid_angles
from mllm_jax.layers.stack import layers_of
from mllm_jax.sharding.logical import constrain

POOLERS = ("auto", "token", "mean", "attention", "none")


@dataclass(frozen=True)
class ViTDialect:
    """Details that distinguish the families of ViTs; the defaults are for a ViT from scratch.

    Attributes:
        norm: "layer" or "rms", of the layers.
        pre_norm: whether a norm precedes the first layer (CLIP).
        norm_first: whether norms come before attention and MLP; False puts them after each, before the sum (EVA-02-CLIP
            E/14).
        norm_output, norm_pooled: whether the final LayerNorm applies to all vectors, and to the pooled vector.
        norm_eps: epsilon of all these norms.
        patch_bias, qkv_bias, k_bias: whether there are biases of the patch projection; of queries, keys and values; of
            the keys if queries and values have them.
        gated: whether the MLP is gated; with activation "silu" it is SwiGLU.
        qk_norm: whether an RMSNorm over all heads follows queries and keys; qk_norm_eps is its epsilon.
        attention_sub_norm_eps, mlp_sub_norm_eps: None, or the epsilons of LayerNorms before the last maps of attention
            and MLP (sub-LN).
        layer_scale: None, or the initial value of a learned factor, one a dimension, of the outputs of attention and
            MLP.
        num_positions: None, or the size of a square table of learned positions if image_size has another number.
        position_antialias: whether position embeddings are interpolated to fewer patches with antialiasing.
        rope_grid: None, or the side of the grid to which the rotary positions of any number of patches are scaled
            (EVA-02).
        drop_remainder: whether pixels at the right and lower edges that fill no patch are left out instead of refused.
        pooler: "token" (the class token), "mean" (over the patches), "attention" (a learned query), "none"; "auto" is
            the class token if there is one, else the mean.
        head_size, head_activation: None, or the width of a linear map after the pooling, and its activation.
        family: the Hugging Face or timm architecture of the saved folder.
    """

    norm: str = "layer"
    norm_first: bool = True
    pre_norm: bool = False
    norm_output: bool = True
    norm_pooled: bool = False
    norm_eps: float = 1e-6
    patch_bias: bool = True
    qkv_bias: bool = True
    k_bias: bool = True
    gated: bool = False
    qk_norm: bool = False
    qk_norm_eps: float = 1e-6
    attention_sub_norm_eps: float | None = None
    mlp_sub_norm_eps: float | None = None
    layer_scale: float | None = None
    num_positions: int | None = None
    position_antialias: bool = False
    rope_grid: int | None = None
    rope_theta: float = 10_000.0
    drop_remainder: bool = False
    pooler: str = "auto"
    head_size: int | None = None
    head_activation: str | None = None
    family: str = "ViTModel"


@dataclass(frozen=True)
class ViTConfig(WithCompute):
    """Sizes of a ViT; details that only reproduce a family are in its dialect.

    Attributes:
        image_size: side of the square images of the position embedding; for others it is interpolated.
        class_token: whether a learned vector before the patches represents the whole image.
        stem_channels: channels of 3x3 stride-2 convolutions before the patch projection (arXiv 2106.14881); each
            halves the image and with it the projected patch. If empty, patches are cut from pixels.
        regions: None, or the side of a square grid of regions: a linear map of each region's own makes one vector of
            `region_size` of its concatenated patches. Contrastive training then also teaches positions, and the LLM
            reads few tokens.
        mimetic_init: whether to initialise for training from scratch on little data; see `Attention`.
        image_mean, image_std: of the normalisation of pixels in [0, 1].
    """

    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    activation: str = "gelu"
    class_token: bool = False
    stem_channels: tuple[int, ...] = ()
    regions: int | None = None
    region_size: int = 256
    mimetic_init: bool = False
    num_channels: int = 3
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    dialect: ViTDialect = ViTDialect()

    def __post_init__(self):
        dialect = self.dialect
        low = max(self.image_size // self.patch_size, 1) * self.patch_size
        require = Requirements("ViT", self)
        whole = dialect.drop_remainder or not self.image_size % self.patch_size
        require(
            whole and self.image_size >= self.patch_size and not self.patch_size % 2 ** len(self.stem_channels),
            f"image {self.image_size}, patch {self.patch_size}, {len(self.stem_channels)} stem layers",
            "an image that is a whole number of patches, a patch divisible by 2^stem layers",
            f"set image_size to {low} or {low + self.patch_size}, or change patch_size or stem_channels",
        )
        require(
            self.regions is None or (self.regions > 0 and not self.class_token and not self.side % self.regions),
            f"{self.regions} regions on {self.side} patches a side" + (" and a class token" * self.class_token),
            "regions that divide the patches, and no class token",
            "change regions, image_size or patch_size",
        )
        require.one_of("activation", ACTIVATIONS)
        require.one_of("dialect.head_activation", (None, *ACTIVATIONS))
        require.one_of("dialect.norm", ("layer", "rms"))
        require.one_of("dialect.pooler", POOLERS)
        require.heads()
        if dialect.rope_grid is not None:
            require.heads(4, "rows and columns rotate pairs in one half of a head each")
        require(
            self.class_token or dialect.pooler != "token",
            "dialect.pooler 'token' without a class token",
            "a class token",
            "set class_token, or change dialect.pooler",
        )
        require(
            dialect.pooler != "none" or not (dialect.head_size or dialect.norm_pooled),
            "a head or a norm of the pooled vector, and dialect.pooler 'none'",
            "a pooled vector",
            "change dialect.pooler, or leave out dialect.head_size and dialect.norm_pooled",
        )

    @property
    def side(self) -> int:
        """The number of patches along one side of an image of image_size."""
        return self.image_size // self.patch_size

    @property
    def grid(self) -> int:
        """The number of output vectors along one side: regions if there are any, else patches."""
        return self.regions or self.side

    @property
    def family(self) -> str:
        """The Hugging Face architecture of the saved folder."""
        return self.dialect.family

    @property
    def feature_size(self) -> int:
        """The width of the output vectors."""
        return self.hidden_size if self.regions is None else self.region_size

    resampled = ("position_embedding",)  # the parameters that `resample` makes for this image_size

    def resample(self, table: jax.Array) -> jax.Array:
        """Resamples the position table [N, E] of the same encoder for another image_size to this image_size."""
        first, grid = table[: int(self.class_token)], table[int(self.class_token) :]
        grid = bicubic_grid(grid, self.side, self.side, self.dialect.position_antialias)
        return jnp.concatenate([first, grid.astype(table.dtype)])

    def make(self) -> ViT:
        return ViT(self)


@struct.dataclass
class VisionOutput:
    """The output of every image encoder.

    Attributes:
        last_hidden_state: [B, N, E].
        pooler_output: [B, E], or None without pooling.
        hidden_states: None, or the first layer's input and each layer's output, [B, N, E] each, without the final norm.
        class_tokens: number of vectors before the patches that represent the whole image; None if they are among the
            patches.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    class_tokens: int | None = struct.field(pytree_node=False, default=0)


def select_layers(output: VisionOutput, layers: int | Sequence[int], keep_class_token: bool = False) -> jax.Array:
    """Returns the hidden states that an LLM reads, concatenated: dtype[B, N, E * len(layers)].

    Args:
        layers: indices of `hidden_states`: 0 is the input of the first layer, -1 the output of the last.
        keep_class_token: whether to keep the vectors before the patches.

    Raises:
        ConfigError: an output without hidden states, an index out of range, or class tokens among packed patches.
    """
    wanted = (layers,) if isinstance(layers, int) else tuple(layers)
    states = output.hidden_states
    if states is None or not wanted or not all(-len(states) <= layer < len(states) for layer in wanted):
        raise ConfigError(
            f"hidden layers {wanted} of " + ("an output without any" if states is None else f"{len(states)}"),
            "an output with hidden states, and indices of them",
            "apply the encoder with output_hidden_states=True, and count from 0 (embeddings) or back from -1",
        )
    if not keep_class_token and output.class_tokens is None:
        raise ConfigError(
            "packed images without keep_class_token",
            "keep_class_token: class tokens are at coordinates -1, among the patches",
            "keep them, and leave them out of media_index",
        )
    x = jnp.concatenate([states[layer] for layer in wanted], axis=-1)
    return x if keep_class_token else x[:, output.class_tokens :]


def _norm(c: ViTConfig, name: str) -> nn.Module:
    return (RMSNorm if c.dialect.norm == "rms" else LayerNorm)(c.dialect.norm_eps, jnp.dtype(c.dtype), name=name)


class ViTBlock(nn.Module):
    """Transformer layer with full attention within an image; `capture` also returns its output to the scan."""

    config: ViTConfig
    capture: bool = False

    @nn.compact
    def __call__(self, x, _, segments, angles):
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        attention = Attention(
            c.num_heads,
            qkv_bias=dialect.qkv_bias,
            k_bias=dialect.k_bias,
            qk_norm=dialect.qk_norm,
            qk_norm_width=True,
            out_norm_eps=dialect.attention_sub_norm_eps,
            rotary_interleaved=True,
            norm_eps=dialect.qk_norm_eps,
            mimetic_init=c.mimetic_init,
            dtype=dtype,
            name="attention",
        )
        mlp = MLP(c.mlp_size, c.activation, dialect.gated, norm_eps=dialect.mlp_sub_norm_eps, dtype=dtype, name="mlp")
        for part, branch in (("attention", lambda h: attention(h, segments=segments, angles=angles)[0]), ("mlp", mlp)):
            norm = _norm(c, f"{part}_norm")
            h = branch(norm(x)) if dialect.norm_first else norm(branch(x))
            if dialect.layer_scale is not None:
                init = nn.with_logical_partitioning(nn.initializers.constant(dialect.layer_scale), ("embed",))
                h = h * self.param(f"{part}_scale", init, (c.hidden_size,), jnp.float32).astype(dtype)
            x = x + h
        x = constrain(x, "batch", "patches", None)
        return x, x if self.capture else None


class ViT(nn.Module):
    """Vision transformer with learned positions (reference classes: see the families' files)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, pixels, output_hidden_states=False, *, segments=None, coordinates=None, grids=None):
        """Encodes whole images, or patches of several images packed in a row.

        The position embeddings are interpolated for an image of another size than image_size. A packed image has the
        same output as the image alone. If the model has a class token, a position with coordinates (-1, -1) becomes the
        class token of its segment, for any pixels.

        Args:
            pixels: normalised, float[B, H, W, C]; or packed, float[B, N, P*P*C], a patch's rows, columns, channels.
            segments: packed: int[B, N], the image of each patch; 0 is padding.
            coordinates: packed: int[B, N, 2], row and column of each patch in its image.
            grids: packed: int[B, N, 2], height and width of that image in patches.

        Returns:
            VisionOutput with N = patches (+ 1 with a class token, which comes first); packed images are not pooled.

        Raises:
            ConfigError: pixels that do not fit, packed patches without their coordinates, or regions and another image
                size.
        """
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        given = dict(segments=segments, coordinates=coordinates, grids=grids)
        given = [name for name, value in given.items() if value is not None]
        packed = bool(given)
        if len(given) not in (0, 3) or pixels.ndim != (3 if packed else 4):
            raise ConfigError(
                f"ViT: pixels of shape {pixels.shape} with {', '.join(given) or 'nothing else'}",
                "images [B, H, W, C] alone, or packed patches [B, N, P*P*C] with segments, coordinates and grids",
                "pass all four or only the images",
            )
        if not packed:
            grids = np.array([size // c.patch_size for size in pixels.shape[1:3]])
            coordinates = np.indices(grids).reshape(1, 2, -1).swapaxes(1, 2)
            if c.class_token:
                coordinates = np.concatenate([np.full((1, 1, 2), -1), coordinates], axis=1)
        if c.regions is not None and (packed or tuple(grids) != (c.side, c.side)):
            raise ConfigError(
                f"ViT: {c.regions} regions on " + ("packed patches" if packed else f"{grids} patches"),
                f"images of {c.side} x {c.side} patches",
                "resize the images, or leave out regions",
            )
        clipped = jnp.maximum(jnp.asarray(coordinates), 0)
        grids = jnp.maximum(jnp.asarray(grids), 1)  # the grid of padding may be 0, which would give NaN
        x = self._embed(pixels.astype(dtype), coordinates, clipped, grids if packed else None)
        if dialect.pre_norm:
            x = _norm(c, "pre_norm")(x)
        angles = None
        if dialect.rope_grid is not None:
            angles = grid_angles(clipped / grids * dialect.rope_grid, c.hidden_size // c.num_heads, dialect.rope_theta)
        layers = layers_of(c, ViTBlock, 2)
        first = x
        x, states = layers(c, output_hidden_states, name="layers")(x, None, segments, angles)
        if output_hidden_states:
            states = (first, *states)
        if dialect.norm_output or dialect.norm_pooled:
            final_norm = LayerNorm(dialect.norm_eps, dtype, name="final_norm")
        if dialect.norm_output:
            x = final_norm(x)
        if c.regions is not None:
            x = RegionPooling(c, name="region_pooling")(x)
        if packed:
            return VisionOutput(x, None, states, class_tokens=None if c.class_token else 0)
        pooled = self._pool(x)
        if dialect.norm_pooled:
            pooled = final_norm(pooled)
        if dialect.head_size is not None:
            head = Linear((dialect.head_size,), ("embed", "channels"), use_bias=True, dtype=dtype, name="head")
            pooled = head(pooled)
        if dialect.head_activation is not None:
            pooled = ACTIVATIONS[dialect.head_activation](pooled)
        return VisionOutput(x, pooled, states, class_tokens=int(c.class_token))

    def _embed(self, pixels, coordinates, clipped, grids):
        """Returns patches and class tokens with their position embeddings; `grids` is None for whole images."""
        c = self.config
        x = PatchEmbedding(c, name="patch_embedding")(pixels)
        normal = nn.initializers.normal(0.02)
        if c.class_token:
            init = nn.with_logical_partitioning(normal, (None, "embed"))
            token = self.param("class_token", init, (1, c.hidden_size), jnp.float32).astype(x.dtype)
        init = nn.with_logical_partitioning(normal, ("patches", "embed"))
        rows = (c.dialect.num_positions or c.side**2) + int(c.class_token)
        table = self.param("position_embedding", init, (rows, c.hidden_size), jnp.float32)
        first, table = table[: int(c.class_token)], table[int(c.class_token) :]
        if grids is None:
            height, width = (size // c.patch_size for size in pixels.shape[1:3])
            positions = bicubic_grid(table, height, width, c.dialect.position_antialias)
            if c.class_token:
                x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, c.hidden_size)), x], axis=1)
                positions = jnp.concatenate([first, positions])
        else:
            positions = bicubic_packed(table, clipped, grids, c.dialect.position_antialias)
            if c.class_token:
                here = coordinates[..., :1] < 0
                x, positions = jnp.where(here, token, x), jnp.where(here, first, positions)
        return x + positions.astype(x.dtype)

    def _pool(self, x):
        c, dialect = self.config, self.config.dialect
        if dialect.pooler == "none":
            return None
        if dialect.pooler == "attention":
            return AttentionPooling(
                c.num_heads, c.mlp_size, c.activation, dialect.norm_eps, jnp.dtype(c.dtype), name="pooler"
            )(x[:, int(c.class_token) :])
        if c.class_token and dialect.pooler != "mean":
            return x[:, 0]
        return x[:, int(c.class_token) :].mean(axis=1)
