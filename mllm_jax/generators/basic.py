"""Convolution of images and group norm, of which the UNets and the autoencoders of diffusers are made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.checkpoints.table import Weight, linear
from mllm_jax.layers.convolution import convolve
from mllm_jax.sharding.fsdp import with_gathered

CONV2D = "o i h w -> h w i o"  # from the stored kernel's axes to the parameter's


class Conv2D(nn.Module):
    """A convolution over images; its kernel is [*size, inputs, features].

    Attributes:
        size: side of the kernel, or its height and width.
        padding: zeros on each side of the image, or ((above, below), (left, right)); None: size // 2.
        names: logical names of the kernel's dimensions.
        kernel_init: initializer of the kernel; None means a deviation of 1/sqrt(fan in).
    """

    features: int
    size: int | tuple[int, int] = 3
    stride: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None
    use_bias: bool = True
    names: tuple[str | None, ...] = (None, None, "channels", "embed")
    kernel_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, H, W, C] to dtype[B, H', W', features]."""
        init = nn.with_logical_partitioning(self.kernel_init or nn.initializers.lecun_normal(), self.names)
        size = (self.size,) * 2 if isinstance(self.size, int) else self.size
        kernel = self.param("kernel", init, (*size, x.shape[-1], self.features), jnp.float32)
        around = tuple((side // 2, side // 2) for side in size) if self.padding is None else self.padding
        padding = ((around, around),) * 2 if isinstance(around, int) else around
        move = partial(convolve, stride=self.stride, padding=padding)
        y = with_gathered(move, x.astype(self.dtype), kernel, self.names, self.dtype)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.names[-1:])
            y = y + self.param("bias", init, (self.features,), jnp.float32).astype(self.dtype)
        return y


class GroupNorm(nn.Module):
    """The norm (x - mean) / std * scale + bias over a group of channels and all positions (arXiv 1803.08494).

    It is computed in float32.

    Attributes:
        groups: number of groups, which divides the channels.
        axis: logical name of the channels.
    """

    groups: int = 32
    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    axis: str = "embed"

    @nn.compact
    def __call__(self, x):
        """Maps [B, ..., C] to dtype[B, ..., C]; everything between the first and the last dimension is positions."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), shape)
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,)), shape)
        x = x.astype(jnp.float32)
        x = x - self._group_mean(x)
        x = x * jax.lax.rsqrt(self._group_mean(jnp.square(x)) + self.eps)
        return (x * scale + bias).astype(self.dtype)

    def _group_mean(self, x):
        """Returns float32[B, 1, ..., 1, C]: each channel's mean over its group."""
        by_channel = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
        by_group = jnp.mean(by_channel.reshape(len(x), self.groups, -1), axis=-1)
        means = jnp.repeat(by_group, x.shape[-1] // self.groups, axis=-1)
        return means.reshape(len(x), *(1,) * (x.ndim - 2), x.shape[-1])


def conv2d(name: str, path: str, *, bias: bool = True) -> list[Weight]:
    """Returns the weights of a `Conv2D`."""
    return linear(name, path, CONV2D, bias=bias)
