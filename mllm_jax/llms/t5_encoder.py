"""T5's encoder alone, `T5EncoderModel`: a text encoder of generators (arXiv 1910.10683)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.checkpoints.table import Table, families, token_sample
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.linear import Embedding
from mllm_jax.llms import t5
from mllm_jax.llms.t5 import T5Config, T5Encoder

FAMILY = "T5EncoderModel"


@dataclass(frozen=True)
class T5EncoderConfig(WithCompute):
    """The config of T5's encoder.

    Attributes:
        t5: the sizes; those of the decoder are kept for the saved folder.
    """

    t5: T5Config = T5Config()

    family = FAMILY  # the Hugging Face architecture of the saved folder

    @property
    def vocab_size(self) -> int:
        return self.t5.vocab_size

    @property
    def hidden_size(self) -> int:
        """The width of the states."""
        return self.t5.hidden_size

    def make(self) -> T5EncoderModel:
        return T5EncoderModel(self)


@struct.dataclass
class T5EncoderOutput:
    """The output of T5's encoder.

    Attributes:
        last_hidden_state: dtype[B, L, E] after the last norm.
    """

    last_hidden_state: jax.Array


class T5EncoderModel(nn.Module):
    """T5's embedding and encoder (reference: `T5EncoderModel`)."""

    config: T5EncoderConfig

    @nn.compact
    def __call__(self, tokens, mask=None) -> T5EncoderOutput:
        """Encodes one text a row.

        Args:
            tokens: int[B, L].
            mask: int[B, L], 0 at positions that no token may see; None: all are seen.
        """
        c = within(self.config.t5, self.config.compute)
        table = Embedding(c.vocab_size, c.hidden_size, init_std=1.0, dtype=jnp.dtype(c.dtype), name="token_embedding")
        # A token at a masked position sees itself and others at such positions, which nobody reads.
        segments = None if mask is None else jnp.asarray(mask != 0, jnp.int32)
        return T5EncoderOutput(T5Encoder(c, name="encoder")(table(tokens), None, segments))


def from_hf_config(values: dict) -> T5EncoderConfig:
    """Reads config.json of `T5EncoderModel`. Raises ConfigError: an unsupported option."""
    # The class sets it to false, and folders have either.
    return T5EncoderConfig(change_fields(t5.from_hf_config(values | dict(is_encoder_decoder=True)), family=FAMILY))


def to_hf_config(config: T5EncoderConfig) -> dict:
    """Returns config.json of `T5EncoderModel`."""
    return t5.to_hf_config(config.t5) | kind_of(FAMILY) | dict(is_encoder_decoder=False)


def table(config: T5EncoderConfig) -> Table:
    """Returns the table of the weights: those of T5 without decoder and head, which the reference ignores too."""
    whole = t5.table(config.t5)
    weights = tuple(w for w in whole.weights if w.path.startswith(("token_embedding/", "encoder/")))
    return Table(weights, ((r"^(decoder|lm_head)\..*", "decoder"),), (*whole.ignored, "decoder"))


FAMILIES = families(
    {FAMILY: "T5's encoder"}, from_hf=from_hf_config, to_hf=to_hf_config, table=table, sample=token_sample
)
