"""AudioLDM-2's projection model (arXiv 2308.05734): the states of two text encoders as one row for a language model."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import Fields, check_written, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Family, Table, Weight, linear
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.requirements import Requirements
from mllm_jax.sharding.logical import constrain

FAMILY = "AudioLDM2ProjectionModel"
MOST = 1 << 16  # of a width and a length


@dataclass(frozen=True)
class AudioLDM2ProjectionConfig(WithCompute):
    """Sizes of AudioLDM-2's projection model; the defaults are those of its base model.

    Attributes:
        text_size, text_1_size: widths of the first text's vectors (CLAP) and of the second's (Flan-T5).
        hidden_size: width of the language model.
        learned_positions: whether vectors of positions are added to the second text, as for its speech model. Every
            second text then has `max_length` vectors.
        max_length: number of these positions; None without them.
    """

    text_size: int = 512
    text_1_size: int = 1024
    hidden_size: int = 768
    learned_positions: bool = False
    max_length: int | None = None

    family = FAMILY  # the class of the saved folder

    def __post_init__(self):
        Requirements("AudioLDM-2's projection model", self)(
            not self.learned_positions or self.max_length is not None,
            "learned_positions (use_learned_position_embedding) without max_length (max_seq_length)",
            "the number of positions",
            "set max_length",
        )

    def make(self) -> AudioLDM2Projection:
        return AudioLDM2Projection(self)


class AudioLDM2Projection(nn.Module):
    """A linear map of each text, with learned vectors before and after it (reference: `AudioLDM2ProjectionModel`)."""

    config: AudioLDM2ProjectionConfig

    @nn.compact
    def __call__(self, clap, t5, clap_mask=None, t5_mask=None) -> tuple[jax.Array, jax.Array | None]:
        """Joins two texts.

        Args:
            clap: float[B, K, text_size]; CLAP's projected vector is K = 1.
            t5: float[B, L, text_1_size].
            clap_mask, t5_mask: [B, K] and [B, L], 0 at positions to be ignored; None: all count.

        Returns:
            The states dtype[B, K + L + 4, hidden_size]: start, first text, end, start, second text, end; and their
            mask [B, K + L + 4], which is None if neither text has one.

        Raises:
            DataError: texts or masks of other shapes.
        """
        c = self.config
        x, mask = self._within("", clap, clap_mask, c.text_size)
        if c.learned_positions:
            if t5.ndim != 3 or t5.shape[1] != c.max_length:
                raise DataError(
                    f"a second text of shape {list(t5.shape)}",
                    f"{c.max_length} vectors, one for each learned position",
                    "pad or shorten it",
                )
            init = nn.with_logical_partitioning(nn.initializers.zeros, (None, "channels"))
            t5 = t5 + self.param("positions_1", init, (c.max_length, c.text_1_size), jnp.float32).astype(t5.dtype)
        y, mask_1 = self._within("_1", t5, t5_mask, c.text_1_size)
        if mask is None and mask_1 is None:
            return jnp.concatenate([x, y], axis=1), None
        mask = jnp.ones(x.shape[:2], mask_1.dtype) if mask is None else mask
        mask_1 = jnp.ones(y.shape[:2], mask.dtype) if mask_1 is None else mask_1
        return jnp.concatenate([x, y], axis=1), jnp.concatenate([mask, mask_1], axis=1)

    def _within(self, name: str, x, mask, width: int) -> tuple[jax.Array, jax.Array | None]:
        """Maps a text to the language model's width, and puts it and its mask between a start and an end."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        if x.ndim != 3 or x.shape[-1] != width or (mask is not None and mask.shape != x.shape[:2]):
            raise DataError(
                f"a text{name} of shape {list(x.shape)}" + ("" if mask is None else f", a mask {list(mask.shape)}"),
                f"[rows, length, {width}], and a mask [rows, length] or none",
                "change them",
            )
        x = Linear((c.hidden_size,), ("channels", "embed"), use_bias=True, dtype=dtype, name=f"projection{name}")(x)
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        ends = (self.param(f"{end}{name}", init, (c.hidden_size,), jnp.float32) for end in ("start", "end"))
        start, end = (jnp.broadcast_to(vector.astype(dtype), (len(x), 1, c.hidden_size)) for vector in ends)
        x = constrain(jnp.concatenate([start, x, end], axis=1), "batch", None, None)
        return x, None if mask is None else jnp.pad(mask, ((0, 0), (1, 1)), constant_values=1)


# ---- diffusers folders

_POSITIONS = "use_learned_position_embedding"
_FIELDS: Fields = {
    "text_size": ("text_encoder_dim", "size", ..., MOST),
    "text_1_size": ("text_encoder_1_dim", "size", ..., MOST),
    "hidden_size": ("langauge_model_dim", "size", ..., MOST),  # the class spells it so
    "max_length": ("max_seq_length", "size", None, MOST),
}


def from_hf_config(values: dict) -> AudioLDM2ProjectionConfig:
    """Reads config.json of `AudioLDM2ProjectionModel`; every option is honoured or refused by name.

    Raises:
        ConfigError: an unsupported option. `use_learned_position_embedding` is true or null: the class has the
            positions with false as well, which nobody means.
    """
    what = f"config.json of {FAMILY}"
    options = ConfigOptions(values, what)
    fields = read_fields(options, _FIELDS)
    learned = _POSITIONS in options and options.only(_POSITIONS, True)
    options.done()
    if learned and fields["max_length"] is None:
        raise ConfigError(f"{what} with {_POSITIONS}=True", "max_seq_length beside it", "restore it from its origin")
    return AudioLDM2ProjectionConfig(**fields, learned_positions=learned)


def to_hf_config(config: AudioLDM2ProjectionConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`."""
    written = kind_of(FAMILY) | write_fields(config, _FIELDS) | {_POSITIONS: True if config.learned_positions else None}
    return check_written(config, written, from_hf_config, "a projection model")


def table(config: AudioLDM2ProjectionConfig) -> Table:
    """Returns the table of the weights."""
    weights = []
    for name in ("", "_1"):
        weights += linear(f"projection{name}", f"projection{name}")
        weights += [Weight(f"sos_embed{name}", f"start{name}"), Weight(f"eos_embed{name}", f"end{name}")]
    if config.learned_positions:
        weights.append(Weight("learnable_positional_embedding", "positions_1", "1 e l -> l e"))
    return Table(tuple(weights))


def sample(config: AudioLDM2ProjectionConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    length = config.max_length if config.learned_positions else 1
    return jnp.zeros((1, 1, config.text_size)), jnp.zeros((1, length, config.text_1_size))


FAMILIES = (
    Family(
        name="AudioLDM-2's projection model",
        architectures=(FAMILY,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
        oracle=f"diffusers {FAMILY}",
    ),
)
