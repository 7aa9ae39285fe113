"""NFNet (arXiv 2102.06171): a convolutional network without normalisation layers, F0 to F6.

Instead of activations the weights are standardised, so that with scaled activations each block's variance is known in
advance; blocks divide by it. nfnet_timm.py reads and writes its folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.encoders.vit import VisionOutput
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import REMAT_POLICIES
from mllm_jax.sharding.logical import constrain

# What keeps the variance of a standard normal input through each activation.
GAMMA = {
    "gelu": 1.7015043497085571,
    "gelu_tanh": 1.7015043497085571,
    "silu": 1.7881293296813965,
    "relu": 1.7139588594436646,
}
# Variant -> pixels a side in training and in testing, and the share of a test picture that is seen.
VARIANTS = {
    "F0": (192, 256, 0.9), "F1": (224, 320, 0.91), "F2": (256, 352, 0.92), "F3": (320, 416, 0.94),
    "F4": (384, 512, 0.951), "F5": (416, 544, 0.954), "F6": (448, 576, 0.956),
}  # fmt: skip


@dataclass(frozen=True)
class NFNetInput:
    """How timm prepares pictures for a checkpoint; kept so that a folder is written as it was read.

    Attributes:
        size, test_size: (height, width) in training and in testing.
        mean, std: what pixels in [0, 1] are normalised with.
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
    """Details of an NFNet's arithmetic; the defaults are its authors' choices, in timm's arithmetic.

    Attributes:
        bottleneck: channels inside a block relative to its output, rounded to multiples of channel_divisor.
        se_ratio, se_divisor, se_gain: of squeeze-and-excitation: its inner width, rounded, and a factor after it.
        alpha: the share of a block's branch in the stream.
        gamma_in_act: activations are scaled by GAMMA; False scales every convolution's weights instead.
        same_padding: as TensorFlow pads, at the end first; False pads both sides alike.
        skip_init: a learned gain on each branch, which starts at 0.
        std_eps, std_floor: standardised weights divide by sqrt(variance + std_eps); with std_floor by
            sqrt(max(variance * fan in, std_eps)), as the Haiku code with 1e-4 does.
        family: the timm architecture that it is written as.
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
        stem_sizes: channels of the four 3x3 convolutions in front; the first and the last have stride 2.
        final_size: channels of the 1x1 convolution after the stages: the features' width.
        num_classes: 0 is without a head.
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
            "stages of unequal number or none",
            "as many depths, all positive, as widths and group_sizes",
            "change depths, widths or group_sizes",
        )
        require(
            self.final_size > 0,
            f"num_features={self.final_size}",
            "a convolution behind the stages",
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
        """Channels inside a block; groups come before rounding, so that they stay whole."""
        width = round_to(self.widths[stage] * self.dialect.bottleneck, self.dialect.channel_divisor)
        group = self.group_sizes[stage]
        return width if group % self.dialect.channel_divisor else width // group * group

    @property
    def image_size(self) -> int:
        """Side of the square pictures that a composed model reads; others are taken too."""
        return self.input.size[0]

    @property
    def grid(self) -> int:
        """Vectors along one side of what comes out."""
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
        """The architecture that it is written as."""
        return self.dialect.family

    def se_size(self, stage: int) -> int:
        """Channels inside squeeze-and-excitation."""
        return round_to(self.widths[stage] * self.dialect.se_ratio, self.dialect.se_divisor, limit=0.0)

    def betas(self, stage: int) -> tuple[float, ...]:
        """1 / the standard deviation that each block's input is expected to have.

        It grows by alpha^2 a block. The first block of a stage meets what the stage before has gathered, and its
        shortcut sets the variance back to 1.
        """
        before = self.depths[stage - 1] if stage else 0
        gathered = (before, *range(1, self.depths[stage]))
        return tuple((1 + n * self.dialect.alpha**2) ** -0.5 for n in gathered)

    def make(self) -> NFNet:
        return NFNet(self)


def nfnet(variant: str) -> NFNetConfig:
    """The config of "F0" to "F6", as timm's `dm_nfnet_f*` has it. Raises ConfigError: another name."""
    if variant not in VARIANTS:
        raise ConfigError(f"NFNet variant {variant!r}", f"one of {', '.join(VARIANTS)}", "choose one of them")
    train, test, crop = VARIANTS[variant]
    pictures = NFNetInput((train, train), (test, test), crop_pct=crop, crop_mode="squash")
    depths = tuple((int(variant[1:]) + 1) * depth for depth in (1, 2, 6, 3))
    return NFNetConfig(depths=depths, input=pictures, dialect=NFNetDialect(family=f"dm_nfnet_{variant.lower()}"))


def round_to(size: float, divisor: int, limit: float = 0.9) -> int:
    """The nearest multiple of `divisor`, or the next where that would lose more than 1 - limit."""
    rounded = max(divisor, int(size + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < limit * size else rounded


# ---- the module


class ScaledConv(nn.Module):
    """Convolution whose kernel is standardised over its inputs, then multiplied by a learned gain a channel."""

    config: NFNetConfig
    features: int
    size: int = 1
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        """dtype[B, H, W, C] -> dtype[B, ceil(H / stride), ceil(W / stride), features]"""
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
        return _convolve(x, kernel.astype(x.dtype), self.stride, padding, self.groups) + bias.astype(x.dtype)


def _convolve(x, kernel, stride: int, padding, groups: int):
    def convolve(x, kernel, groups: int = 1):
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=axes, feature_group_count=groups
        )

    def group_by_group(x, kernel):
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
        return jnp.concatenate([convolve(*part) for part in parts], axis=-1)

    if groups == 1:
        return convolve(x, kernel)
    # XLA's CPU compiler has a fast convolution without groups only: 9 times as fast with 6 groups of 128.
    return jax.lax.platform_dependent(x, kernel, cpu=group_by_group, default=partial(convolve, groups=groups))


class SqueezeExcite(nn.Module):
    """Each channel by a gate in (0, 1) that is worked out from the means of all channels."""

    inner_size: int

    @nn.compact
    def __call__(self, x):
        """dtype[B, H, W, C] -> dtype[B, H, W, C]"""
        h = x.mean(axis=(1, 2))
        h = Linear((self.inner_size,), ("embed", "mlp"), use_bias=True, dtype=x.dtype, name="down")(h)
        h = Linear((x.shape[-1],), ("mlp", "embed"), use_bias=True, dtype=x.dtype, name="up")(jax.nn.relu(h))
        return x * jax.nn.sigmoid(h)[:, None, None, :]


class NFBlock(nn.Module):
    """Activation first, then 1x1, 3x3, 3x3 and 1x1 convolutions beside a shortcut."""

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
            if stride > 1:  # over the places that there are: padding does not count
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
    """Pixels to a map of features, their mean, and logits (reference class: timm's `NormFreeNet`)."""

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
            dtype[B, final_size], its mean; hidden_states, the stem's map and each stage's, before its activation and
            before the last convolution, each dtype[B, h * w, C] with a size of its own.
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
