"""The autoencoder of latent diffusion (arXiv 2112.10752) as diffusers' `AutoencoderKL`: of images or of log-mel frames.

Its latents are neither scaled nor shifted. A diffusion model works on `config.scaled(latents)`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import product

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.errors import DataError
from mllm_jax.generators.basic import Conv2D
from mllm_jax.generators.vae_blocks import ImageDecoder, ImageEncoder
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.requirements import Requirements

LOG_VARIANCES = (-30.0, 20.0)  # limits of the encoder's log-variances
OVERLAP = 0.25  # of a tile with the next one


@dataclass(frozen=True)
class AutoencoderKLConfig(WithCompute):
    """Sizes of an autoencoder; the defaults are Stable Diffusion 1.5's.

    Attributes:
        block_channels: width of each block of the encoder; the decoder has the same blocks, the last one first.
        layers_per_block: residual blocks in each block of the encoder; the decoder has one more.
        sample_size: side of the images of the training, and of the tiles of `decode_tiled`; also height and width.
        scaling_factor, shift_factor, latents_mean, latents_std: what `scaled` applies to latents.
        force_upcast: whether float16 overflows, so that float32 is computed instead.
        middle_attention: whether the positions of an image attend to each other at the smallest size.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    activation: str = "silu"
    norm_groups: int = 32
    sample_size: tuple[int, ...] = (512,)
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    middle_attention: bool = True

    family = "AutoencoderKL"  # the class of the saved folder

    def __post_init__(self):
        require = Requirements("autoencoder", self)
        widths, groups = self.block_channels, self.norm_groups
        require(widths, "no block_channels", "a width for each block", "set block_channels")
        require(
            all(width % groups == 0 for width in widths),
            f"block_channels {list(widths)} in norm_groups {groups}",
            "widths that the number of groups divides",
            "change block_channels or norm_groups",
        )
        for name in ("latents_mean", "latents_std"):
            numbers = getattr(self, name)
            require(
                numbers is None or len(numbers) == self.latent_channels,
                f"{name} of {len(numbers or ())} numbers",
                f"latent_channels={self.latent_channels} numbers",
                f"change {name}",
            )
        require(
            0 not in (self.scaling_factor, *(self.latents_std or ())),
            f"scaling_factor {self.scaling_factor}, latents_std {self.latents_std}",
            "numbers other than 0: latents are divided by them",
            "restore config.json from its origin",
        )

    @property
    def factor(self) -> int:
        """Pixels of an image's side for each position of its latents."""
        return 2 ** (len(self.block_channels) - 1)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of the activations; see `force_upcast`."""
        return jnp.dtype("float32" if self.force_upcast and self.dtype == "float16" else self.dtype)

    def scaled(self, latents: jax.Array) -> jax.Array:
        """Returns latents [..., latent_channels] as a diffusion model of this autoencoder reads them."""
        shift, scale = self._affine()
        return (latents - shift) * scale

    def unscaled(self, latents: jax.Array) -> jax.Array:
        """Returns the inverse of `scaled`, the input of `decode`."""
        shift, scale = self._affine()
        return latents / scale + shift

    def _affine(self):
        if self.latents_mean is None or self.latents_std is None:
            return self.shift_factor or 0.0, self.scaling_factor
        return jnp.asarray(self.latents_mean), self.scaling_factor / jnp.asarray(self.latents_std)

    def make(self) -> AutoencoderKL:
        return AutoencoderKL(self)


class AutoencoderKL(nn.Module):
    """Encoder to the mean and log-variance of latents, and decoder (reference: diffusers' `AutoencoderKL`)."""

    config: AutoencoderKLConfig

    def setup(self):
        c = self.config
        self.encoder, self.decoder = ImageEncoder(c), ImageDecoder(c)
        if c.quant_conv:
            self.quant_conv = Conv2D(2 * c.latent_channels, 1, dtype=c.compute_dtype)
        if c.post_quant_conv:
            self.post_quant_conv = Conv2D(c.latent_channels, 1, dtype=c.compute_dtype)

    def __call__(self, images):
        """Returns the decoded means of the images' latents."""
        return self.decode(self.encode(images)[0])

    def encode(self, images) -> tuple[jax.Array, jax.Array]:
        """Encodes images.

        Args:
            images: float[B, H, W, in_channels] in [-1, 1], or log-mel frames [B, T, M, 1]; any height and width from
                `factor` on. Rows and columns beyond a multiple of `factor` are cut.

        Returns:
            The mean and the log-variance of the latents, dtype[B, H // factor, W // factor, latent_channels] each.

        Raises:
            DataError: images of another shape.
        """
        c = self.config
        _require_shape(images, c.in_channels, c.factor, "images")
        moments = self.encoder(images)
        if c.quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCES)

    def decode(self, latents):
        """Decodes latents.

        Args:
            latents: float[B, h, w, latent_channels], not scaled.

        Returns:
            Images dtype[B, factor * h, factor * w, out_channels], about in [-1, 1].

        Raises:
            DataError: latents of another shape.
        """
        _require_shape(latents, self.config.latent_channels, 1, "latents")
        return self.decoder(self.post_quant_conv(latents) if self.config.post_quant_conv else latents)

    def decode_tiled(self, latents, tile: int | None = None):
        """Decodes latents in overlapping tiles, one after the other, and blends them as diffusers' `enable_tiling`.

        The memory for activations is that of one tile. The result differs from that of `decode`, because no tile sees
        the others. Latents that fit into one tile are decoded whole.

        Args:
            latents: as for `decode`.
            tile: side of a tile in pixels; None means the config's sample_size.

        Raises:
            DataError: latents of another shape, or a tile without a position.
        """
        c = self.config
        _require_shape(latents, c.latent_channels, 1, "latents")
        pixels = c.sample_size[0] if tile is None else tile
        side = pixels // c.factor
        step, blended = int(side * (1 - OVERLAP)), int(pixels * OVERLAP)
        if step < 1:
            raise DataError(
                f"tiles of {pixels} pixels",
                f"at least {2 * c.factor} pixels, two positions of latents",
                "pass a larger tile",
            )
        height, width = latents.shape[1:3]
        if max(height, width) <= side:
            return self.decode(latents)
        rows, columns = range(0, height, step), range(0, width, step)
        tiles = self._decoded(latents, list(product(rows, columns)), side)
        kept = pixels - blended
        lines, above = [], {}
        for row in rows:
            line, left = [], None
            for column in columns:
                x = tiles[row, column]
                if row:
                    x = _blend(above[column], x, blended, axis=1)
                if column:
                    x = _blend(left, x, blended, axis=2)
                above[column] = left = x
                line.append(x[:, :kept, :kept])
            lines.append(jnp.concatenate(line, axis=2))
        return jnp.concatenate(lines, axis=1)

    def _decoded(self, latents, corners, side: int) -> dict:
        """Returns the decoded tile at each corner; tiles of one size share one compiled decoder, which runs in turn."""
        height, width = latents.shape[1:3]
        by_size = defaultdict(list)
        for row, column in corners:
            by_size[min(side, height - row), min(side, width - column)].append((row, column))
        decode = nn.scan(
            lambda module, carry, z: (carry, module.decode(z)),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        found = {}
        for (rows, columns), group in by_size.items():
            parts = jnp.stack([latents[:, row : row + rows, column : column + columns] for row, column in group])
            found |= dict(zip(group, decode(self, None, parts)[1], strict=True))
        return found


def _require_shape(x: jax.Array, channels: int, least: int, what: str) -> None:
    if x.ndim != 4 or x.shape[-1] != channels or min(x.shape[1:3]) < least:
        raise DataError(
            f"autoencoder: {what} of shape {list(x.shape)}",
            f"[B, height, width, {channels}], height and width at least {least}",
            "pass arrays with channels last and of the size that the config has",
        )


def _blend(before: jax.Array, after: jax.Array, extent: int, axis: int) -> jax.Array:
    """Returns a tile whose first rows (axis 1) or columns (axis 2) change gradually from the end of the one before."""
    extent = min(extent, before.shape[axis], after.shape[axis])
    if extent == 0:
        return after
    weight = (jnp.arange(extent, dtype=after.dtype) / extent).reshape(-1, *(1,) * (3 - axis))
    end = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    start, rest = jnp.split(after, [extent], axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis=axis)
