"""What trains a P-Former (arXiv 2307.07063, section 3.2): captions, their prompts, and the LLM that is prompted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mllm_jax.data.batch import NO_MEDIA, BatchSpec, text_spec
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.head import HeadInputs
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.norms import as_unit_vectors
from mllm_jax.models.caption_row import caption_row
from mllm_jax.models.multimodal import MultimodalOutput
from mllm_jax.projectors.pformer import PFormerConfig
from mllm_jax.projectors.qformer import INIT_STD


@dataclass(frozen=True)
class PFormerPretrainingConfig(WithCompute):
    """A P-Former and the LLM that it prompts, which learns nothing.

    Attributes:
        prompter: what a run trained is read by `PromptGuidedConfig` as its part "prompter".
        llm: any LLM whose vocabulary is that of the captions.
        projection_size: width of the space in which captions are told apart.
        init_temperature: what similarities are divided by at the start; it is learnt.
    """

    prompter: PFormerConfig
    llm: Any
    projection_size: int = 256
    init_temperature: float = 0.07

    def __post_init__(self):
        if (width := self.parts["prompter"].output_size) != self.llm.hidden_size:
            raise ConfigError(
                f"prompter.output_size {width}",
                f"the LLM's hidden_size {self.llm.hidden_size}",
                "make the two equal",
            )

    @property
    def media_tokens(self) -> int:
        """Tokens that stand for what a caption describes: the prompts."""
        return self.prompter.num_queries

    image_size = 1  # it reads no images
    encoder_decoder = False  # of the captions that it learns from, whatever its LLM is
    family = None

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters."""
        parts = {"prompter": self.prompter.beside(self.llm), "llm": self.llm}
        return {name: within(part, self.compute) for name, part in parts.items()}

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """How many tokens each embedding holds, by its place in an experiment."""
        return {f"model.{name}.vocab_size": part.vocab_size for name, part in self.parts.items()}

    @property
    def dtype(self) -> str:
        """What most of the model computes in."""
        return self.parts["prompter"].dtype

    def batch_spec(self, rows: int = 1, length: int = 8, slots: Mapping[str, int] = NO_MEDIA) -> BatchSpec:
        """The arrays of a batch: captions without images."""
        return text_spec(rows, min(length, self.prompter.max_length))

    def make(self) -> PFormerPretraining:
        return PFormerPretraining(self)


@struct.dataclass
class PromptedTexts:
    """Captions as the P-Former has them.

    Attributes:
        prompts: float32[B, Q, E].
        nearest: float32[B, Q, E], of the LLM's embedded tokens the one nearest to each prompt; no gradient.
        text: float32[B, D], unit vectors.
        temperature: float32, what similarities are divided by.
        row: prompts and captions as the LLM reads them.
    """

    prompts: jax.Array
    nearest: jax.Array
    text: jax.Array
    temperature: jax.Array
    row: dict


class PFormerPretraining(nn.Module):
    """Captions to prompts, and prompts to the LLM's answer."""

    config: PFormerPretrainingConfig

    def setup(self):
        c = self.config
        made = {name: part.make() for name, part in c.parts.items()}
        self.prompter, self.llm = made["prompter"], made["llm"]
        self.text_projection = Linear(
            (c.projection_size,), ("channels", "embed"), use_bias=True, init_std=INIT_STD, dtype=jnp.dtype(c.dtype)
        )
        constant = nn.initializers.constant(c.init_temperature)
        self.temperature = self.param("temperature", constant, (), jnp.float32)

    def encode_texts(self, batch) -> PromptedTexts:
        """The captions of a batch, one a row.

        Args:
            batch: tokens, segments int[B, L], 0 in segments at padding; `masked` bool[B, L], what the P-Former may not
                read of them; `llm_tokens`, `llm_segments` int[B, K], the same captions to the LLM, where it has a
                tokenizer of its own.
        """
        c = self.config
        first = self.prompter.read(batch["tokens"], batch["segments"], batch.get("masked"))
        prompts = self.prompter.prompt(first)
        caption = (batch.get(f"llm_{name}", batch[name]) for name in ("tokens", "segments"))
        row = caption_row(c.llm, prompts, *caption)
        prompts, text = prompts.astype(jnp.float32), as_unit_vectors(self.text_projection(first))
        return PromptedTexts(prompts, self.nearest(prompts), text, self.temperature, row)

    def nearest(self, x):
        """float32[..., E] -> float32[..., E], the LLM's embedded token at the least distance, without a gradient."""
        # [..., V] numbers, no more than the LLM's logits.
        table = self.llm.embed(jnp.arange(self.config.llm.vocab_size)).astype(jnp.float32)
        table, x = jax.lax.stop_gradient((table, x))
        # In full precision also where products are not by default: the near ones differ by little.
        distance = jnp.square(table).sum(axis=-1) - 2 * jnp.matmul(x, table.T, precision="highest")
        return jnp.take(table, distance.argmin(axis=-1), axis=0)

    def __call__(self, batch) -> MultimodalOutput:
        """Next-token logits of a `row` of `encode_texts`."""
        return MultimodalOutput(self._language(batch))

    def head_inputs(self, batch) -> HeadInputs:
        """What the LLM's output head makes the logits of a `row` from."""
        return self._language(batch, project=False)

    def _language(self, batch, **more):
        here = batch["media_index"] >= 0
        placed = jnp.take_along_axis(batch["media"], jnp.maximum(batch["media_index"], 0)[..., None], axis=1)
        text = self.llm.embed(batch["tokens"])
        embeddings = jnp.where(here[..., None], placed.astype(text.dtype), text)
        target = {name: batch[name] for name in ("decoder_tokens", "decoder_segments") if name in batch}
        return self.llm(batch["tokens"], None, batch["segments"], embeddings=embeddings, **target, **more)

    # ---- what training asks of a model

    def touch(self, batch):
        """Runs every part once: what `init` traces so that all parameters exist."""
        return self(self.encode_texts(batch).row)
