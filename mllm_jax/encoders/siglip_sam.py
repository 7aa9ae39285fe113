"""DeepSeek-VL's hybrid encoder (arXiv 2403.05525, section 2.1): SigLIP on a small image, SAM on a large image.

SAM's features are resized and halved twice, so that both encoders have the same grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.checkpoints.table import Weight, nested
from mllm_jax.encoders.sam import Convolution, SamConfig, SamNeck, convolution_weight, neck_weights
from mllm_jax.encoders.sam import table as sam_table
from mllm_jax.encoders.siglip_vision import FAMILY as SIGLIP
from mllm_jax.encoders.vit import VisionOutput, ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.requirements import Requirements


@dataclass(frozen=True)
class SiglipSamConfig(WithCompute):
    """The configs of the two encoders.

    Attributes:
        low, high: SigLIP's and SAM's configs.
        downsample: channels of the stride-2 convolutions that reduce SAM's grid to SigLIP's.
    """

    low: ViTConfig
    high: SamConfig
    downsample: tuple[int, ...] = (512, 1024)

    # Each encoder normalises its own image, so both images have values from 0 to 1.
    image_mean = (0.0, 0.0, 0.0)
    image_std = (1.0, 1.0, 1.0)
    class_token = False

    def __post_init__(self):
        require = Requirements("SigLIP and SAM", self)
        require(self.high.global_layers, "a SAM without global layers", "at least one", "set high.global_layers")
        require(self.downsample, "no convolutions after SAM", "at least one", "set downsample")
        require(
            self.low.image_size < self.high.image_size,
            f"images of {self.low.image_size} pixels for SigLIP and {self.high.image_size} for SAM",
            "a smaller image for SigLIP",
            "change low.image_size or high.image_size",
        )

    @property
    def image_size(self) -> int:
        """The side of the large image."""
        return self.high.image_size

    @property
    def grid(self) -> int:
        """The number of output vectors along one side."""
        return self.low.grid

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of SAM's and of SigLIP's part of each vector."""
        return self.downsample[-1], self.low.hidden_size

    def make(self) -> SiglipSam:
        return SiglipSam(self)


class SiglipSam(nn.Module):
    """Encoder of an image in two sizes to one grid of vectors (reference: the encoders of `DeepseekVLHybridModel`)."""

    config: SiglipSamConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.low = within(c.low, c.compute).make()
        self.high = within(c.high, c.compute).make()
        self.neck = SamNeck(c.high.output_channels, dtype)
        self.downsample = [Convolution(features, stride=2, dtype=dtype) for features in c.downsample]
        self.alpha = self.param("alpha", nn.with_logical_partitioning(nn.initializers.zeros, (None,)), (1,))

    def __call__(self, pixels, output_hidden_states=False) -> VisionOutput:
        """Encodes images.

        Args:
            pixels: from 0 to 1, float[B, S + s, S, 3]: the large image of side S and, below it at the left edge, the
                small image of side s. Or float[B, S, S, 3], only the large image: it is then resized to side s,
                bilinear with antialiasing, as in the authors' code.
            output_hidden_states: has no effect, because the encoders' layers have no common grid.

        Returns:
            VisionOutput with dtype[B, N, E], SAM's part before SigLIP's, see `widths`.

        Raises:
            ConfigError: images of another shape.
        """
        c = self.config
        large, small = c.high.image_size, c.low.image_size
        if pixels.shape[1:3] not in ((large, large), (large + small, large)):
            raise ConfigError(
                f"SigLIP and SAM: pixels of shape {list(pixels.shape)}",
                f"[B, {large + small}, {large}, 3], the large image above the small one, or [B, {large}, {large}, 3]",
                "resize and pad the images to these squares",
            )
        high, low = pixels[:, :large], pixels[:, large:, :small]
        if pixels.shape[1] == large:
            low = _resize(high, small, antialias=True)
        below = self.low(_normalise(low, c.low)).last_hidden_state
        return VisionOutput(jnp.concatenate([self._high(_normalise(high, c.high)), below], axis=-1))

    def _high(self, pixels):
        c = self.config
        out = self.high(pixels, output_hidden_states=True)
        first = out.hidden_states[c.high.global_layers[0] + 1]  # the first state is the input of the layers
        on_grid = dict(pattern="b (h w) e -> b h w e", h=c.high.grid)
        added = self._halve(self.neck(rearrange(first, **on_grid)))
        x = self._halve(rearrange(out.last_hidden_state, **on_grid)) + added * self.alpha.astype(added.dtype)
        return rearrange(x, "b h w e -> b (h w) e")

    def _halve(self, x):
        """Reduces SAM's grid of any size to SigLIP's grid."""
        x = _resize(x, self.config.grid * 2 ** len(self.downsample), antialias=False)
        for convolution in self.downsample:
            x = convolution(x)
        return x


def _normalise(pixels, encoder):
    return (pixels - jnp.asarray(encoder.image_mean)) / jnp.asarray(encoder.image_std)


def _resize(x, side: int, antialias: bool):
    """Resizes [B, H, W, C] to [B, side, side, C], bilinear, with "align_corners" False."""
    shape = (x.shape[0], side, side, x.shape[-1])
    return jax.image.resize(x, shape, "linear", antialias=antialias, precision=jax.lax.Precision.HIGHEST)


def siglip_sam_weights(c: SiglipSamConfig) -> list[Weight]:
    """Returns the encoder's weights under the names of `DeepseekVLHybridModel`."""
    return [
        *nested(SIGLIP.table(c.low), "vision_model.", "low/"),
        *nested(sam_table(c.high), "high_res_vision_model.", "high/"),
        *neck_weights("high_res_vision_neck", "neck"),
        *(convolution_weight(f"high_res_vision_proj.conv{i + 1}", f"downsample_{i}") for i in range(len(c.downsample))),
        Weight("high_res_vision_alpha", "alpha"),
    ]
