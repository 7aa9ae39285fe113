"""The ViT-bigG of the first Qwen-VL (arXiv 2308.12966), whose features a resampler reads: see models/qwen_vl_v1.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from mllm_jax.checkpoints.config_json import RATIOS, Fields, read_fields, read_grid, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Table, Weight, head_by_head, linear, norm
from mllm_jax.encoders.vit import ViT, ViTConfig
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.requirements import Requirements

NORM_EPS = 1e-6  # of every norm, also of the resampler's; no option sets it


@dataclass(frozen=True)
class QwenViTV1Config(WithCompute):
    """Sizes of the ViT.

    Attributes:
        image_size: pixels a side of the training images; for other sizes, positions are interpolated.
        mlp_ratio: the MLP's width divided by hidden_size; the width is rounded down.
        num_positions: entries of the square table of learned positions.
        image_mean, image_std: of the normalisation of pixels in [0, 1].
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
            "an image that is a whole number of patches",
            "change one of them",
        )
        require.heads()

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def grid(self) -> int:
        """The number of patches along one side of an image of image_size."""
        return self.image_size // self.patch_size

    class_token = False  # there is none

    def make(self) -> ViT:
        """Returns the ViT without its last norm (reference: `VisionTransformer` in Qwen-VL-Chat's visual.py)."""
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "mlp_ratio"}
        return ViT(
            make_config(
                ViTConfig,
                **shared,
                mlp_size=self.mlp_size,
                norm_eps=NORM_EPS,
                patch_bias=False,
                pre_norm=True,
                norm_output=False,
                pooler="none",
            )
        )


# ---- Hugging Face folders


_FIELDS: Fields = {
    "hidden_size": ("width", "size"),
    "num_layers": ("layers", "size"),
    "num_heads": ("heads", "size"),
    "mlp_ratio": ("mlp_ratio", "number", ..., *RATIOS),
}


def read_sizes(options: ConfigOptions) -> QwenViTV1Config:
    """Reads the ViT's options in the `visual` part of a Qwen-VL config.json; it also holds the resampler's."""
    return QwenViTV1Config(**read_grid(options), **read_fields(options, _FIELDS))


def write_sizes(c: QwenViTV1Config) -> dict:
    """Writes the ViT's options, the inverse of `read_sizes`."""
    return dict(image_size=c.image_size, patch_size=c.patch_size) | write_fields(c, _FIELDS)


def table(c: QwenViTV1Config) -> Table:
    """Returns the table of the ViT's weights under the names of visual.py."""
    block, head = "transformer.resblocks.{layer}", {"h": c.hidden_size // c.num_heads}
    weights = [
        Weight("conv1.weight", "patch_embedding/projection/kernel", "e c p q -> (p q c) e", dict(c=3, p=c.patch_size)),
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
