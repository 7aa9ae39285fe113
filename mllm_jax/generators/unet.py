"""The UNet of Stable Diffusion 1 and 2 (arXiv 2112.10752), diffusers' `UNet2DConditionModel`.

It predicts the noise (or the velocity) in noised latents from the time and a text. unet_blocks.py has its blocks,
unet_hub.py reads and writes its folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.generators.basic import Conv2D, GroupNorm
from mllm_jax.generators.unet_blocks import ACTIVATIONS, DownBlock, MidBlock, Style, TextStates, UNetBlock, UpBlock
from mllm_jax.generators.unet_time import TimeEmbedding, embed_time
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.requirements import Requirements
from mllm_jax.sharding.logical import constrain

DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
UP = ("CrossAttnUpBlock2D", "UpBlock2D")
# Ways to embed a class, beside None: its index, a number embedded like the time, a vector as it is, or a vector through
# an MLP or a linear map.
CLASSES = ("index", "timestep", "identity", "projection", "simple_projection")


@dataclass(frozen=True)
class UNetDialect:
    """Details of a UNet's arithmetic; the defaults are Stable Diffusion 1.5's.

    Attributes:
        only_cross: of each block, whether the first attention of its transformers reads the text too; the middle block
            never does.
        linear_projection: whether folders have linear maps around the transformers, instead of convolutions of one
            pixel; the result is the same.
        flip_sin_to_cos: whether the cosines of the time come before the sines.
        freq_shift: subtracted from the number of the time's frequencies, where their spacing is computed.
        time_activation, time_post_activation: further activations of the time's embedding, after its sum with others,
            and before it.
        mid_scale: divisor in the residual blocks of the middle.
        center_input: whether the latents are in [0, 1] and are scaled to [-1, 1].
        class_embedding: one of CLASSES, or None.
        class_concat: whether the class is concatenated with the time; else it is added.
        head_dim: width of every head of the transformers; None: the block's channels // num_heads.
        out_activation: before the last convolution; None: `activation`.
        family: the class of the saved folder.
    """

    norm_groups: int = 32
    norm_eps: float = 1e-5
    activation: str = "silu"
    scale_shift: bool = False
    only_cross: tuple[bool, ...] = (False,) * 4
    linear_projection: bool = False
    upcast_attention: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    time_activation: str | None = None
    time_post_activation: str | None = None
    downsample_padding: int = 1
    mid_scale: float = 1.0
    center_input: bool = False
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    class_embedding: str | None = None
    class_concat: bool = False
    head_dim: int | None = None
    out_activation: str | None = None
    family: str = "UNet2DConditionModel"


@dataclass(frozen=True)
class UNetConfig(WithCompute):
    """Sizes of a UNet; the defaults are Stable Diffusion 1.5's. Lists go from the largest resolution to the smallest.

    Attributes:
        sample_size: height and width of the latents that it was trained on, or one number for both; it takes others.
        channels: of each block.
        layers: residual blocks of each block on the way down; on the way up it has one more.
        num_heads: of each block's transformers; those of the last are the middle block's too.
        text_sizes: width of the texts that each block reads: one number, or several for several transformers after each
            residual block, None being self-attention. The last are the middle block's too.
        depths: layers of each block's transformers: one number, or one for each residual block.
        up_depths: of the blocks of the way up, the smallest resolution first; None: `depths`, in its order.
        time_size: width of the time's embedding; None: 4 times the first block's channels.
        condition_size: width of a further vector that `timestep_cond` brings, such as the embedded guidance of a
            distilled model.
        class_size: number of classes, or width of the vectors, that `class_labels` brings; see the dialect.
    """

    sample_size: tuple[int, ...] | None = (64,)
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: tuple[int, ...] = (2,) * 4
    num_heads: tuple[int, ...] = (8,) * 4
    text_sizes: tuple[tuple[int | None, ...], ...] = ((768,),) * 4
    depths: tuple[int | tuple[int, ...], ...] = (1,) * 4
    up_depths: tuple[int | tuple[int, ...], ...] | None = None
    down_blocks: tuple[str, ...] = (*DOWN[:1] * 3, DOWN[1])
    mid_block: str | None = MID[0]
    up_blocks: tuple[str, ...] = (UP[1], *UP[:1] * 3)
    time_size: int | None = None
    condition_size: int | None = None
    class_size: int | None = None
    dialect: UNetDialect = UNetDialect()

    axes = ("batch", "height", "width")  # of latents, before their channels
    num_texts = 1  # that a call brings
    mid_blocks = MID  # that are supported

    def __post_init__(self):
        require = Requirements("UNet", self)
        d, count = self.dialect, len(self.channels)
        of_blocks = {
            "layers (layers_per_block)": self.layers,
            "num_heads (attention_head_dim)": self.num_heads,
            "text_sizes (cross_attention_dim)": self.text_sizes,
            "depths (transformer_layers_per_block)": self.depths,
            "up_depths (reverse_transformer_layers_per_block)": self.up_depths or self.depths,
            "down_blocks (down_block_types)": self.down_blocks,
            "up_blocks (up_block_types)": self.up_blocks,
            "only_cross (only_cross_attention)": d.only_cross,
        }
        wrong = [f"{name} of {len(values)}" for name, values in of_blocks.items() if len(values) != count]
        require(
            count and not wrong,
            f"{count} channels (block_out_channels) and {', '.join(wrong)}",
            "one value for each block",
            "change the lists so that they are of one length",
        )
        for name, given, known in (("down_blocks", self.down_blocks, DOWN), ("up_blocks", self.up_blocks, UP)):
            require(
                set(given) <= set(known),
                f"{name} {', '.join(map(str, given))}",
                f"each one of {', '.join(known)}",
                "convert another checkpoint; other blocks are not supported",
            )
        require.one_of("mid_block", self.mid_blocks)
        require.one_of("dialect.activation", ACTIVATIONS)
        for name in ("dialect.time_activation", "dialect.time_post_activation", "dialect.out_activation"):
            require.one_of(name, (None, *ACTIVATIONS))
        require.one_of("dialect.class_embedding", (None, *CLASSES))
        require(
            not [each for each in self.channels if each % d.norm_groups],
            f"channels {list(self.channels)} in {d.norm_groups} groups",
            "groups that divide the channels",
            "change channels (block_out_channels) or norm_groups (norm_num_groups)",
        )
        require(
            all(0 < self.num_heads[i] <= self.channels[i] for _, i in self._reading()),
            f"{list(self.num_heads)} heads of {list(self.channels)} channels",
            "at least one channel a head (`attention_head_dim` is the number of heads)",
            "change num_heads",
        )
        require(
            self.channels[0] // 2 > d.freq_shift,
            f"freq_shift {d.freq_shift:g} with {self.channels[0] // 2} frequencies of the time",
            "a smaller one",
            "change freq_shift or channels",
        )
        require(
            d.class_embedding in (None, "timestep", "identity") or self.class_size,
            f"class_embedding {d.class_embedding!r} without class_size",
            "the number of classes, or the width of their vectors",
            "set class_size",
        )
        self._require_texts(require)
        for block in (*self.down, *self.up):
            require(
                not block.depths or len(block.depths) >= len(block.inputs),
                f"depths {list(block.depths)} of a block of {len(block.inputs)} residual blocks",
                "one for each",
                "change depths or up_depths",
            )

    def _require_texts(self, require: Requirements) -> None:
        sizes = {size for block, _ in self._reading() for size in block}
        require(
            len(sizes) <= 1 and None not in sizes and all(len(block) == 1 for block, _ in self._reading()),
            f"text_sizes {list(self.text_sizes)}",
            "one text, of one width for all blocks that read it",
            "change text_sizes (cross_attention_dim)",
        )

    def _reading(self) -> list[tuple[tuple[int | None, ...], int]]:
        """Returns the text sizes of each block with transformers, with its index."""
        read = [i for i, kind in enumerate(self.down_blocks) if kind == DOWN[0]]
        read += [len(self.channels) - 1 - i for i, kind in enumerate(self.up_blocks) if kind == UP[0]]
        read += [len(self.channels) - 1] if self.mid_block == MID[0] else []
        return [(self.text_sizes[i], i) for i in read]

    def text_of(self, transformer: int) -> int:
        """Returns the index of the text that a transformer reads, by its number after each residual block."""
        return 0

    @property
    def text_widths(self) -> tuple[int | None, ...]:
        """The width of each text of a call; None of a text that no block reads."""
        read = {self.text_of(j): size for block, _ in self._reading() for j, size in enumerate(block) if size}
        return tuple(read.get(i) for i in range(self.num_texts))

    @property
    def time_width(self) -> int:
        """The width of the time's embedding."""
        return self.time_size or 4 * self.channels[0]

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """The size of the latents that it was trained on, if its folder says so."""
        return None if self.sample_size is None else (self.sample_size[0], self.sample_size[-1])

    @property
    def family(self) -> str:
        """The class of the saved folder."""
        return self.dialect.family

    @property
    def spatial(self) -> UNetConfig:
        """The config of the layers that read single images: all of them."""
        return self

    @property
    def style(self) -> Style:
        """The settings that all blocks share."""
        d = self.dialect
        return Style(
            d.norm_groups, d.norm_eps, d.activation, d.scale_shift, d.upcast_attention, d.downsample_padding,
            self.dtype, self.remat,
        )  # fmt: skip

    @property
    def down(self) -> tuple[UNetBlock, ...]:
        """The blocks of the way down."""
        before = (self.channels[0], *self.channels)
        return tuple(
            self._block(i, kind == DOWN[0], (before[i], *[self.channels[i]] * (self.layers[i] - 1)), self.depths[i])
            for i, kind in enumerate(self.down_blocks)
        )

    @property
    def mid(self) -> UNetBlock | None:
        """The middle block."""
        if self.mid_block is None:
            return None
        attends, last = self.mid_block == MID[0], len(self.channels) - 1
        block = self._block(last, attends, (self.channels[-1],) * (1 + attends), self.depths[-1])
        return replace(block, only_cross=False, scale=self.dialect.mid_scale, resample=False)

    @property
    def up(self) -> tuple[UNetBlock, ...]:
        """The blocks of the way up, the smallest resolution first."""
        depths = self.depths[::-1] if self.up_depths is None else self.up_depths
        channels, blocks = self.channels[::-1], []
        for i, kind in enumerate(self.up_blocks):
            above, here, below = channels[max(i - 1, 0)], channels[i], channels[min(i + 1, len(channels) - 1)]
            layers = self.layers[::-1][i]
            inputs = tuple((here if j else above) + (here if j < layers else below) for j in range(layers + 1))
            block = self._block(len(channels) - 1 - i, kind == UP[0], inputs, depths[i])
            blocks.append(replace(block, resample=i < len(channels) - 1))
        return tuple(blocks)

    def _block(self, i: int, attends: bool, inputs: tuple[int, ...], depth: int | tuple[int, ...]) -> UNetBlock:
        depths = (depth,) * len(inputs) if isinstance(depth, int) else depth
        texts = tuple(None if size is None else self.text_of(j) for j, size in enumerate(self.text_sizes[i]))
        head_dim = self.dialect.head_dim or (self.channels[i] // self.num_heads[i] if attends else 0)
        return UNetBlock(
            inputs, self.channels[i], depths if attends else (), texts, self.num_heads[i], head_dim,
            self.dialect.only_cross[i], resample=i < len(self.channels) - 1,
        )  # fmt: skip

    def make(self) -> UNet:
        return UNet(self)


class Denoiser(nn.Module):
    """The UNet for any number of texts; the classes that are called define their order."""

    config: Any

    blocks = DownBlock, MidBlock, UpBlock  # their classes

    @nn.compact
    def denoise(self, latents, timesteps, texts: Sequence[TextStates], class_labels=None, timestep_cond=None):
        """Maps latents [B, H, W, in_channels] to dtype[B, H, W, out_channels], videos with their frames after B."""
        c = self.config.spatial
        d, dtype = c.dialect, jnp.dtype(c.dtype)
        down_block, mid_block, up_block = self.blocks
        latents, timesteps = checked_latents(self.config, latents, timesteps)
        texts = checked_texts(c, texts, len(latents))
        x = rearrange(latents.astype(dtype), "b ... h w c -> (b ...) h w c")
        style = replace(c.style, frames=len(x) // len(latents))
        time = repeat(self._time(timesteps, class_labels, timestep_cond), "b t -> (b f) t", f=style.frames)
        around = (d.conv_in_kernel - 1) // 2
        names = (None, None, "channels", "embed")
        x = 2 * x - 1 if d.center_input else x
        x = Conv2D(c.channels[0], d.conv_in_kernel, 1, around, names=names, dtype=dtype, name="conv_in")(x)
        x = self.begin(constrain(x, "batch", None, None, None), style)
        skips = [x]
        for i, block in enumerate(c.down):
            x, made = down_block(style, block, name=f"down_{i}")(x, time, texts)
            skips += made
        if c.mid is not None:
            x = mid_block(style, c.mid, name="mid")(x, time, texts)
        for i, block in enumerate(c.up):
            skips, read = skips[: -len(block.inputs)], skips[-len(block.inputs) :]
            # An image of odd height was halved to one of the same height as an even one: the skipped image decides.
            size = skips[-1].shape[1:3] if skips else None
            x = up_block(style, block, name=f"up_{i}")(x, time, texts, read, size)
        x = GroupNorm(d.norm_groups, d.norm_eps, dtype, name="norm_out")(x)
        x = ACTIVATIONS[d.out_activation or d.activation](x)
        around, names = (d.conv_out_kernel - 1) // 2, (None, None, "embed", "channels")
        x = Conv2D(c.out_channels, d.conv_out_kernel, 1, around, names=names, dtype=dtype, name="conv_out")(x)
        return x.reshape(*latents.shape[:-1], c.out_channels)

    def begin(self, x, style: Style):
        """Returns what the first block reads of the first convolution's output, dtype[B, H, W, C]."""
        return x

    def _time(self, timesteps, class_labels, timestep_cond):
        """Returns the embedding dtype[B, T] of the time and the class."""
        c = self.config.spatial
        d, dtype = c.dialect, jnp.dtype(c.dtype)
        how = dict(width=c.channels[0], flip_sin_to_cos=d.flip_sin_to_cos, freq_shift=d.freq_shift)
        if timestep_cond is not None and c.condition_size is None:
            raise ConfigError("timestep_cond of a UNet without condition_size", "None", "leave it out")
        time = TimeEmbedding(
            c.time_width, d.activation, d.time_post_activation, c.condition_size, dtype, name="time_embedding"
        )(embed_time(timesteps, **how), timestep_cond)
        if (class_labels is None) != (d.class_embedding is None):
            raise ConfigError(
                f"class_labels {'missing' if class_labels is None else 'given'}, class_embedding {d.class_embedding!r}",
                "class_labels for a UNet that embeds classes, and for no other",
                "add class_labels, or leave them out",
            )
        if class_labels is None:
            embedded = None
        elif d.class_embedding == "index":
            names = ("vocab", "embed")
            embedded = Embedding(c.class_size, c.time_width, names, dtype=dtype, name="class_embedding")(class_labels)
        elif d.class_embedding == "timestep":
            embed = TimeEmbedding(c.time_width, d.activation, dtype=dtype, name="class_embedding")
            embedded = embed(embed_time(class_labels, **how))
        elif d.class_embedding == "projection":
            embedded = TimeEmbedding(c.time_width, dtype=dtype, name="class_embedding")(class_labels)
        elif d.class_embedding == "simple_projection":
            linear = dict(names=("channels", "embed"), use_bias=True, dtype=dtype, name="class_embedding")
            embedded = Linear((c.time_width,), **linear)(class_labels)
        else:
            embedded = class_labels.astype(dtype)
        if embedded is not None:
            time = jnp.concatenate([time, embedded], axis=-1) if d.class_concat else time + embedded
        return time if d.time_activation is None else ACTIVATIONS[d.time_activation](time)


class UNet(Denoiser):
    """UNet with one text condition (reference: `UNet2DConditionModel`)."""

    def __call__(self, latents, timesteps, text, text_mask=None, class_labels=None, timestep_cond=None):
        """Predicts the noise, or the velocity, of noised latents.

        Args:
            latents: float[B, H, W, in_channels] of any size.
            timesteps: int or float[B], or one number for all.
            text: float[B, L, E], the text encoder's output.
            text_mask: [B, L], 0 at positions to be ignored; None: all count.
            class_labels: of each row, for a UNet that embeds classes: int[B], or vectors [B, C].
            timestep_cond: float[B, condition_size], for a UNet that has it.

        Returns:
            dtype[B, H, W, out_channels]

        Raises:
            ConfigError: arrays of other shapes.
        """
        return self.denoise(latents, timesteps, [TextStates(text, text_mask)], class_labels, timestep_cond)


def checked_latents(c: Any, latents, timesteps, what: str = "UNet") -> tuple[jax.Array, jax.Array]:
    """Returns the latents, and the timesteps as [B]. Raises ConfigError: other shapes than a call takes."""
    if latents.ndim != len(c.axes) + 1 or latents.shape[-1] != c.in_channels or not all(latents.shape):
        raise ConfigError(
            f"{what}: latents of shape {list(latents.shape)}",
            f"[{', '.join(c.axes)}, {c.in_channels}]",
            "give latents with the channels last, as many as in_channels",
        )
    timesteps = jnp.asarray(timesteps)
    if timesteps.shape not in ((), (1,), (len(latents),)):
        raise ConfigError(
            f"{what}: timesteps of shape {list(timesteps.shape)} for {len(latents)} rows of latents",
            "one number, or one for each row",
            "change the timesteps",
        )
    return latents, jnp.broadcast_to(timesteps, (len(latents),))


def checked_texts(c: Any, texts: Sequence[TextStates], rows: int, what: str = "UNet") -> tuple[TextStates, ...]:
    """Returns the texts in the computation's dtype. Raises ConfigError: other shapes than a call takes."""
    for i, (text, width) in enumerate(zip(texts, c.text_widths, strict=True)):
        name = f"text_{i}" if i else "text"
        shape = text.states.shape
        if len(shape) != 3 or shape[0] != rows or not shape[1] or width not in (None, shape[2]):
            raise ConfigError(
                f"{what}: {name} of shape {list(shape)}",
                f"[{rows}, length, {'any' if width is None else width}]",
                f"give the states of the text encoder that the {what} was trained with",
            )
        if text.mask is not None and text.mask.shape != shape[:2]:
            raise ConfigError(
                f"{what}: {name}_mask of shape {list(text.mask.shape)}",
                f"{list(shape[:2])}, as {name}",
                "give a mask with a number for each position",
            )
    return tuple(TextStates(text.states.astype(jnp.dtype(c.dtype)), text.mask) for text in texts)
