"""The first Qwen-VL's ViT-bigG (arXiv 2308.12966), whose patches a resampler reads: see models/qwen_vl_v1.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.checkpoints.config_json import RATIOS, Fields, read_fields, read_grid, write_fields
from mllm_jax.checkpoints.options import Options
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Table, Weight, head_by_head, linear, norm
from mllm_jax.encoders.vit import VisionOutput
from mllm_jax.errors import DataError
from mllm_jax.layers.attention import Attention
from mllm_jax.layers.interpolation import bicubic_grid
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import scan_layers
from mllm_jax.sharding.logical import constrain

NORM_EPS = 1e-6  # of every norm, the resampler's too; no option sets it


@dataclass(frozen=True)
class QwenViTV1Config:
    """Sizes of the ViT.

    Attributes:
        image_size: pixels a side that it was trained on; other sizes are taken too, positions are interpolated.
        mlp_ratio: the MLP's width over hidden_size, cut to a whole number.
        num_positions: entries of the square table of learned positions.
        image_mean, image_std: what pixels in [0, 1] are normalised with.
    """

    image_size: int = 448
    patch_size: int = 14
    hidden_size: int = 1664
    num_layers: int = 48
    num_heads: int = 16
    mlp_ratio: float = 4.9231
    num_positions: int = 256
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self):
        require = Requirements("Qwen-VL's ViT", self)
        require(
            self.num_positions == math.isqrt(self.num_positions) ** 2,
            f"num_positions {self.num_positions}",
            "a square number: they form a grid",
            "change num_positions",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size}, patch_size {self.patch_size}",
            "a picture that is a whole number of patches",
            "change one of them",
        )
        require.heads()

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def grid(self) -> int:
        """Patches along one side of a picture of image_size."""
        return self.image_size // self.patch_size

    @property
    def class_token(self) -> bool:
        return False

    def make(self) -> QwenViTV1:
        return QwenViTV1(self)


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


class QwenViTV1(nn.Module):
    """Pixels to one vector a patch (reference: `VisionTransformer` in Qwen-VL-Chat's visual.py)."""

    config: QwenViTV1Config

    @nn.compact
    def __call__(self, pixels, output_hidden_states: bool = False) -> VisionOutput:
        """Encodes normalised pixels float[B, H, W, 3].

        Returns:
            last_hidden_state [B, N, hidden_size], without a final norm: what the resampler reads.

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
        return VisionOutput(last_hidden_state=x, hidden_states=(embedded, *states) if output_hidden_states else None)


# ---- Hugging Face folders


_FIELDS: Fields = {
    "hidden_size": ("width", "size"),
    "num_layers": ("layers", "size"),
    "num_heads": ("heads", "size"),
    "mlp_ratio": ("mlp_ratio", "number", ..., *RATIOS),
}


def read_sizes(options: Options) -> QwenViTV1Config:
    """The ViT's options of the `visual` part of a Qwen-VL config.json; the resampler's stand beside them."""
    return QwenViTV1Config(**read_grid(options), **read_fields(options, _FIELDS))


def write_sizes(c: QwenViTV1Config) -> dict:
    """The inverse."""
    return dict(image_size=c.image_size, patch_size=c.patch_size) | write_fields(c, _FIELDS)


def table(c: QwenViTV1Config) -> Table:
    """The ViT's weights under the names of visual.py."""
    block, head = "transformer.resblocks.{layer}", {"h": c.hidden_size // c.num_heads}
    weights = [
        Weight("conv1.weight", "patch_embedding/kernel", "e c p q -> (p q c) e", dict(c=3, p=c.patch_size)),
        Weight("positional_embedding", "position_embedding"),
        *norm("ln_pre", "pre_norm"),
        *norm(f"{block}.ln_1", "layers/attention_norm"),
        *norm(f"{block}.ln_2", "layers/mlp_norm"),
        *head_by_head(f"{block}.attn.in_proj", "layers/attention", head),
        *linear(f"{block}.attn.out_proj", "layers/attention/out", OUT_OF_HEADS, head),
        *linear(f"{block}.mlp.c_fc", "layers/mlp/up"),
        *linear(f"{block}.mlp.c_proj", "layers/mlp/down"),
    ]
    return Table(tuple(weights))
