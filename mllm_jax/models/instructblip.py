"""InstructBLIP (arXiv 2305.06500): BLIP-2 with Vicuna or Flan-T5, whose Q-Former also reads the instruction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mllm_jax.checkpoints.table import Table, families
from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.errors import DataError
from mllm_jax.models.blip2 import Blip2Config, QueryLayout, faithful, read_parts, settle, table_of, write_parts
from mllm_jax.projectors.qformer_hub import qformer_weights

FAMILY = "InstructBlipForConditionalGeneration"
# The subfolder with the Q-Former's own tokenizer, that of BERT.
TOKENIZER = "qformer_tokenizer"
# The language model's token at a query's position.
IMAGE = "<image>"
# Instructions are padded to a multiple of this, so that several lengths share one compilation.
BUCKET = 16


@dataclass(frozen=True)
class InstructBlipConfig(Blip2Config):
    """The config of InstructBLIP: `projector` has a vocabulary, and batches with images have `query_tokens`."""

    family: str | None = FAMILY


def from_hf_config(values: dict) -> InstructBlipConfig:
    """Reads config.json of InstructBlipForConditionalGeneration; each option is honoured or refused by name."""
    return InstructBlipConfig(**read_parts(values, FAMILY, ("llama", "t5", "opt"), text=None))


def to_hf_config(config: InstructBlipConfig) -> dict:
    """Writes config.json; refuses options that the family does not have."""
    return faithful(config, write_parts(config, "instructblip"), from_hf_config)


def table(config: InstructBlipConfig) -> Table:
    return table_of(config, qformer_weights(config.image.projector, norm="qformer.embeddings.layernorm"))


class InstructLayout(QueryLayout):
    """BLIP-2's layout for queries that also read the row's text."""

    def __init__(self, config: InstructBlipConfig, folder: Path):
        super().__init__(config, folder)
        self._tokenizer = ChatTokenizer.load(folder / TOKENIZER)
        self.instruction_length = config.instruction_length

    def instruction(self, text: str, bounded: bool) -> np.ndarray:
        ids = self._tokenizer.encode(text.replace(IMAGE, ""))  # without positions of images
        if bounded and len(ids) > self.instruction_length:
            raise DataError(
                f"an instruction of {len(ids)} tokens ({text[:60]!r})",
                f"at most {self.instruction_length}, as the Q-Former was trained",
                "shorten the question, or drop the record",
            )
        return np.asarray(ids)


FAMILIES = families(
    {FAMILY: "InstructBLIP"},
    from_hf=from_hf_config,
    to_hf=to_hf_config,
    table=table,
    layout=InstructLayout,
    settle=settle,
)
