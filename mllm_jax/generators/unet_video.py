"""Zeroscope's UNet of videos (ModelScope's, arXiv 2308.06571), diffusers' `UNet3DConditionModel`.

Each frame goes through the blocks of Stable Diffusion's UNet, and layers between them (unet_temporal.py) read the same
position of all frames. unet_video_hub.py reads and writes its folders.
"""

from __future__ import annotations

from dataclasses import dataclass

from mllm_jax.generators.unet import DOWN, UP, Denoiser, UNetConfig, UNetDialect
from mllm_jax.generators.unet_blocks import ACTIVATIONS, Style, TextStates
from mllm_jax.generators.unet_temporal import TemporalTransformer, VideoDownBlock, VideoMidBlock, VideoUpBlock
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.requirements import Requirements

FAMILY = "UNet3DConditionModel"
# Each kind of block by the kind of its layers over images.
VIDEO_DOWN = {"CrossAttnDownBlock3D": DOWN[0], "DownBlock3D": DOWN[1]}
VIDEO_UP = {"CrossAttnUpBlock3D": UP[0], "UpBlock3D": UP[1]}
_CROSS_DOWN, _DOWN = VIDEO_DOWN
_CROSS_UP, _UP = VIDEO_UP
FIRST_HEADS = 8  # of the transformer over frames before all blocks, whatever the channels are


@dataclass(frozen=True)
class VideoUNetConfig(WithCompute):
    """Sizes of a UNet of videos; the defaults are Zeroscope's. Lists go from the largest resolution to the smallest.

    Attributes:
        sample_size: height and width of the latents that it was trained on, or one number for both; it takes others,
            and any number of frames.
        channels: of each block.
        layers: residual blocks of each block on the way down; on the way up it has one more.
        head_dim: width of each head; a block has channels // head_dim of them.
        text_size: width of the text.
        norm_groups, norm_eps: of the group norms.
        activation: of the residual blocks and of the time's embedding.
        downsample_padding, mid_scale: see `Style` and `UNetDialect`.
        condition_size: width of a further vector that `timestep_cond` brings.
    """

    sample_size: tuple[int, ...] | None = (32,)
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    head_dim: int = 64
    text_size: int = 1024
    down_blocks: tuple[str, ...] = (*[_CROSS_DOWN] * 3, _DOWN)
    up_blocks: tuple[str, ...] = (_UP, *[_CROSS_UP] * 3)
    norm_groups: int = 32
    norm_eps: float = 1e-5
    activation: str = "silu"
    downsample_padding: int = 1
    mid_scale: float = 1.0
    condition_size: int | None = None

    family = FAMILY
    axes = ("batch", "frames", "height", "width")  # of latents, before their channels

    def __post_init__(self):
        require = Requirements("video UNet", self)
        for name, given, known in (
            ("down_blocks", self.down_blocks, VIDEO_DOWN),
            ("up_blocks", self.up_blocks, VIDEO_UP),
        ):
            require(
                set(given) <= set(known),
                f"{name} {', '.join(map(str, given))}",
                f"each one of {', '.join(known)}",
                "convert another checkpoint; other blocks are not supported",
            )
        require.one_of("activation", ACTIVATIONS)
        require(
            self.head_dim > 0 and self.layers > 0,
            f"head_dim {self.head_dim} (attention_head_dim), layers {self.layers} (layers_per_block)",
            "numbers from 1 on",
            "change them",
        )
        reading = [c for c, kind in zip(self.channels, self.down_blocks, strict=False) if kind == _CROSS_DOWN]
        reading += [c for c, kind in zip(self.channels[::-1], self.up_blocks, strict=False) if kind == _CROSS_UP]
        require(
            all(width >= self.head_dim for width in (*reading, *self.channels[-1:])),
            f"heads of width {self.head_dim} in {list(self.channels)} channels",
            "at least as many channels as a head has (`attention_head_dim` is the width of a head)",
            "change head_dim",
        )
        self.spatial  # noqa: B018 - refuses sizes that do not fit

    @property
    def spatial(self) -> UNetConfig:
        """The config of the layers that read single images."""
        c, count = self, len(self.channels)
        return UNetConfig(
            sample_size=c.sample_size,
            in_channels=c.in_channels,
            out_channels=c.out_channels,
            channels=c.channels,
            layers=(c.layers,) * count,
            num_heads=tuple(width // c.head_dim for width in c.channels),
            text_sizes=((c.text_size,),) * count,
            depths=(1,) * count,
            down_blocks=tuple(VIDEO_DOWN[kind] for kind in c.down_blocks),
            up_blocks=tuple(VIDEO_UP[kind] for kind in c.up_blocks),
            condition_size=c.condition_size,
            dialect=UNetDialect(
                norm_groups=c.norm_groups,
                norm_eps=c.norm_eps,
                activation=c.activation,
                only_cross=(False,) * count,
                linear_projection=True,
                downsample_padding=c.downsample_padding,
                mid_scale=c.mid_scale,
                head_dim=c.head_dim,
                out_activation="silu",
                family=FAMILY,
            ),
            compute=c.compute,
        )

    @property
    def text_widths(self) -> tuple[int | None, ...]:
        """The width of each text of a call."""
        return (self.text_size,)

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """The size of the latents that it was trained on, if its folder says so."""
        return self.spatial.height_and_width

    def make(self) -> VideoUNet:
        return VideoUNet(self)


class VideoUNet(Denoiser):
    """UNet of videos with one text condition (reference: `UNet3DConditionModel`).

    The reference's dropout of 0.1 between its convolutions over time, in training, is not done.
    """

    config: VideoUNetConfig

    blocks = VideoDownBlock, VideoMidBlock, VideoUpBlock

    def __call__(self, latents, timesteps, text, timestep_cond=None):
        """Predicts the noise, or the velocity, of noised latents.

        Args:
            latents: float[B, F, H, W, in_channels] of any size and any number of frames.
            timesteps: int or float[B], or one number for all.
            text: float[B, L, E], the text encoder's output, which all frames of a video read.
            timestep_cond: float[B, condition_size], for a UNet that has it.

        Returns:
            dtype[B, F, H, W, out_channels]

        Raises:
            ConfigError: arrays of other shapes.
        """
        return self.denoise(latents, timesteps, [TextStates(text)], None, timestep_cond)

    def begin(self, x, style: Style):
        return TemporalTransformer(style, FIRST_HEADS, self.config.head_dim, 1, name="transformer_in")(x)
