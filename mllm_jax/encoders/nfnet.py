"""NFNet (arXiv 2102.06171): a convolutional network without normalisation layers, F0 to F6.

The weights are standardised instead of the activations. With scaled activations, the variance of each block is then
known in advance, and the blocks divide by the standard deviation. nfnet_timm.py reads and writes its folders.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.encoders.vit import VisionOutput
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.convolution import convolve
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import REMAT_POLICIES
from mllm_jax.sharding.logical import constrain

# The factor of each activation that keeps the variance of a standard normal input.
GAMMA = {
    "gelu": 1.7015043497085571,
    "gelu_tanh": 1.7015043497085571,
    "silu": 1.7881293296813965,
    "relu": 1.7139588594436646,
}
# Variant -> pixels a side in training and in testing, and the share of a test image that is seen.
VARIANTS = {
    "F0": (192, 256, 0.9), "F1": (224, 320, 0.91), "F2": (256, 352, 0.92), "F3": (320, 416, 0.94),
    "F4": (384, 512, 0.951), "F5": (416, 544, 0.954), "F6": (448, 576, 0.956),
}  # fmt: skip


@dataclass(frozen=True)
class NFNetInput:
    """The preparation of images for a checkpoint in timm; stored so that a folder is saved as it was read.

    Attributes:
        size, test_size: (height, width) in training and in testing.
        mean, std: of the normalisation of pixels in [0, 1].
    """

    size: tuple[int, int] = (192, 192)
    test_size: tuple[int, int] | None = (256, 256)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    test_crop_pct: float | None = None
    crop_mode: str = "center"


@dataclass(frozen=True)
class NFNetDialect:
    """Details of an NFNet's arithmetic; the defaults are its authors' choices as timm computes them.

    Attributes:
        bottleneck: channels inside a block relative to its output, rounded to multiples of channel_divisor.
        se_ratio, se_divisor, se_gain: of squeeze-and-excitation: its relative inner width, the divisor of that width,
            and a factor after it.
        alpha: factor of a block's branch.
        gamma_in_act: whether activations are scaled by GAMMA; False scales every convolution's weights instead.
        same_padding: whether to pad as TensorFlow does, more at the end; False pads both sides equally.
        skip_init: whether each branch has a learned gain that starts at 0.
        std_eps, std_floor: standardised weights are divided by sqrt(variance + std_eps), or with std_floor by
            sqrt(max(variance * fan in, std_eps)), as in the Haiku code with 1e-4.
        family: the timm architecture of the saved folder.
    """

    bottleneck: float = 0.5
    channel_divisor: int = 8
    se_ratio: float = 0.5
    se_divisor: int = 8
    se_gain: float = 2.0
    alpha: float = 0.2
    gamma_in_act: bool = True
    same_padding: bool = True
    skip_init: bool = True
    std_eps: float = 1e-5
    std_floor: bool = False
    family: str = "dm_nfnet_f0"


@dataclass(frozen=True)
class NFNetConfig(WithCompute):
    """Sizes of an NFNet, by default F0's; details of the arithmetic are in its dialect.

    Attributes:
        depths, widths, group_sizes: blocks, channels, and channels a group of the 3x3 convolutions, of each stage.
        stem_sizes: channels of the four 3x3 convolutions before the stages; the first and the last have stride 2.
        final_size: channels of the 1x1 convolution after the stages: the features' width.
        num_classes: outputs of the head; 0 is no head.
        activation: "gelu" (exact) in timm, "gelu_tanh" in the authors' own Haiku code, "silu" or "relu".
    """

    depths: tuple[int, ...] = (1, 2, 6, 3)
    widths: tuple[int, ...] = (256, 512, 1536, 1536)
    group_sizes: tuple[int, ...] = (128, 128, 128, 128)
    stem_sizes: tuple[int, ...] = (16, 32, 64, 128)
    in_channels: int = 3
    final_size: int = 3072
    num_classes: int = 1000
    activation: str = "gelu"
    input: NFNetInput = NFNetInput()
    dialect: NFNetDialect = NFNetDialect()

    class_token = False  # there is none

    def __post_init__(self):
        require = Requirements("NFNet", self)
        lengths = {len(self.depths), len(self.widths), len(self.group_sizes)}
        require(
            lengths == {len(self.depths)} and min(self.depths, default=0) > 0,
            "depths, widths and group_sizes of different lengths, or a depth of 0",
            "one positive depth, one width and one group size for each stage",
            "change depths, widths or group_sizes",
        )
        require(
            self.final_size > 0,
            f"num_features={self.final_size}",
            "a convolution after the stages",
            "change final_size, which timm calls num_features",
        )
        require.one_of("activation", GAMMA)
        for stage, group in enumerate(self.group_sizes):
            width = self.inner_size(stage)
            require(
                width >= group and width % group == 0,
                f"groups of {group} in {width} channels",
                "groups that divide the channels inside a block",
                "change group_sizes, widths or dialect.bottleneck",
            )

    def inner_size(self, stage: int) -> int:
        """Returns the channels inside a block, rounded so that groups remain whole."""
        width = round_to(self.widths[stage] * self.dialect.bottleneck, self.dialect.channel_divisor)
        group = self.group_sizes[stage]
        return width if group % self.dialect.channel_divisor else width // group * group

    @property
    def image_size(self) -> int:
        """The side of the square images of a composed model; the encoder accepts other sizes too."""
        return self.input.size[0]

    @property
    def grid(self) -> int:
        """The number of output vectors along one side."""
        side = self.image_size
        for _ in range(len(self.depths) + 1):  # twice in the stem, once before each stage but the first
            side = -(-side // 2)
        return side

    @property
    def image_mean(self) -> tuple[float, ...]:
        return self.input.mean

    @property
    def image_std(self) -> tuple[float, ...]:
        return self.input.std

    @property
    def family(self) -> str:
        """The timm architecture of the saved folder."""
        return self.dialect.family

    def se_size(self, stage: int) -> int:
        """Returns the channels inside squeeze-and-excitation."""
        return round_to(self.widths[stage] * self.dialect.se_ratio, self.dialect.se_divisor, limit=0.0)

    def betas(self, stage: int) -> tuple[float, ...]:
        """Returns 1 / the expected standard deviation of each block's input.

        The variance grows by alpha^2 a block. The first block of a stage has the variance of the stage before, and its
        shortcut resets the variance to 1.
        """
        before = self.depths[stage - 1] if stage else 0
        gathered = (before, *range(1, self.depths[stage]))
        return tuple((1 + n * self.dialect.alpha**2) ** -0.5 for n in gathered)

    def make(self) -> NFNet:
        return NFNet(self)


def nfnet(variant: str) -> NFNetConfig:
    """Returns the config of "F0" to "F6", which is that of timm's `dm_nfnet_f*`. Raises ConfigError: another name."""
    if variant not in VARIANTS:
        raise ConfigError(f"NFNet variant {variant!r}", f"one of {', '.join(VARIANTS)}", "choose one of them")
    train, test, crop = VARIANTS[variant]
    images = NFNetInput((train, train), (test, test), crop_pct=crop, crop_mode="squash")
    depths = tuple((int(variant[1:]) + 1) * depth for depth in (1, 2, 6, 3))
    return NFNetConfig(depths=depths, input=images, dialect=NFNetDialect(family=f"dm_nfnet_{variant.lower()}"))


def round_to(size: float, divisor: int, limit: float = 0.9) -> int:
    """Returns the nearest multiple of `divisor`, or the next one if the nearest is less than limit * size."""
    rounded = max(divisor, int(size + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < limit * size else rounded


# ---- the module


class ScaledConv(nn.Module):
    """Convolution with a kernel that is standardised over its inputs and multiplied by a learned gain a channel."""

    config: NFNetConfig
    features: int
    size: int = 1
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, H, W, C] to dtype[B, ceil(H / stride), ceil(W / stride), features]."""
        c, dialect = self.config, self.config.dialect
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        fan_in = self.size**2 * shape[2]

        def param(name: str, init, shape, names):
            return self.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32)

        normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        kernel = param("kernel", normal, shape, (None, None, "channels", "embed")).astype(jnp.float32)
        gain = param("gain", nn.initializers.ones, (self.features,), ("embed",)).astype(jnp.float32)
        bias = param("bias", nn.initializers.zeros, (self.features,), ("embed",))
        variance = kernel.var(axis=(0, 1, 2))
        if dialect.std_floor:
            scale = jax.lax.rsqrt(jnp.maximum(variance * fan_in, dialect.std_eps))
        else:
            scale = jax.lax.rsqrt(variance + dialect.std_eps) * fan_in**-0.5
        if not dialect.gamma_in_act:
            scale = scale * GAMMA[c.activation]
        kernel = (kernel - kernel.mean(axis=(0, 1, 2))) * (scale * gain)
        side = (self.size - 1) // 2
        padding = "SAME" if dialect.same_padding else ((side, side), (side, side))
        return convolve(x, kernel.astype(x.dtype), self.stride, padding, self.groups) + bias.astype(x.dtype)


class SqueezeExcite(nn.Module):
    """Multiplication of each channel by a gate in (0, 1), computed from the means of all channels."""

    inner_size: int

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, H, W, C] to dtype[B, H, W, C]."""
        h = x.mean(axis=(1, 2))
        h = Linear((self.inner_size,), ("embed", "mlp"), use_bias=True, dtype=x.dtype, name="down")(h)
        h = Linear((x.shape[-1],), ("mlp", "embed"), use_bias=True, dtype=x.dtype, name="up")(jax.nn.relu(h))
        return x * jax.nn.sigmoid(h)[:, None, None, :]


class NFBlock(nn.Module):
    """Block of an activation, then 1x1, 3x3, 3x3 and 1x1 convolutions, with a shortcut."""

    config: NFNetConfig
    stage: int
    index: int

    @nn.compact
    def __call__(self, x):
        c = self.config
        width, inner = c.widths[self.stage], c.inner_size(self.stage)
        first = self.index == 0
        stride = 2 if first and self.stage else 1
        groups = inner // c.group_sizes[self.stage]
        h = _activate(c, x) * c.betas(self.stage)[self.index]
        shortcut = x
        if first and (self.stage or x.shape[-1] != width):
            shortcut = h
            if stride > 1:  # padding does not count in the average
                shortcut = nn.avg_pool(h, (2, 2), (2, 2), "SAME", count_include_pad=False).astype(h.dtype)
            shortcut = ScaledConv(c, width, name="shortcut")(shortcut)
        h = ScaledConv(c, inner, name="conv_1")(h)
        h = ScaledConv(c, inner, 3, stride, groups, name="conv_2")(_activate(c, h))
        h = ScaledConv(c, inner, 3, 1, groups, name="conv_3")(_activate(c, h))
        h = ScaledConv(c, width, name="conv_4")(_activate(c, h))
        h = SqueezeExcite(c.se_size(self.stage), name="squeeze_excite")(h) * c.dialect.se_gain
        if c.dialect.skip_init:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
            h = h * self.param("skip_gain", init, (1,), jnp.float32).astype(h.dtype)
        return constrain(h * c.dialect.alpha + shortcut, "batch", None, None, None)


def _activate(c: NFNetConfig, x):
    x = ACTIVATIONS[c.activation](x)
    return x * GAMMA[c.activation] if c.dialect.gamma_in_act else x


class NFNet(nn.Module):
    """NFNet from pixels to a map of features, their mean, and logits (reference class: timm's `NormFreeNet`)."""

    config: NFNetConfig

    def setup(self):
        c = self.config
        block = NFBlock
        if c.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[c.remat])
        strides = (2, 1, 1, 2)
        self.stem = [ScaledConv(c, size, 3, n) for size, n in zip(c.stem_sizes, strides, strict=True)]
        self.stages = [[block(c, stage, i) for i in range(depth)] for stage, depth in enumerate(c.depths)]
        self.final_conv = ScaledConv(c, c.final_size)
        if c.num_classes:
            self.head = Linear((c.num_classes,), ("embed", "vocab"), use_bias=True, init_std=0.01)

    def __call__(self, pixels, output_hidden_states: bool = False) -> VisionOutput:
        """Encodes normalised pixels of any size.

        Args:
            pixels: float[B, H, W, in_channels].
            output_hidden_states: also return the maps between the stages.

        Returns:
            last_hidden_state dtype[B, N, final_size], the last map row by row, N about H/32 * W/32; pooler_output
            dtype[B, final_size], its mean; hidden_states, the maps of the stem and of each stage, without activation
            and before the last convolution, dtype[B, h * w, C] with different h, w and C.
        """
        c = self.config
        x = pixels.astype(jnp.dtype(c.dtype))
        for i, conv in enumerate(self.stem):
            x = conv(_activate(c, x) if i else x)
        maps = [x]
        for stage in self.stages:
            for block in stage:
                x = block(x)
            maps.append(x)
        x = _flat(_activate(c, self.final_conv(x)))
        pooled = x.mean(axis=1)
        if c.num_classes and self.is_initializing():
            self.head(pooled)
        return VisionOutput(
            last_hidden_state=x,
            pooler_output=pooled,
            hidden_states=tuple(map(_flat, maps)) if output_hidden_states else None,
        )


def _flat(x):
    return rearrange(x, "b h w c -> b (h w) c")
