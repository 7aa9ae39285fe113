"""The training of a P-Former (arXiv 2307.07063, section 3.2) with captions, their prompts, and an LLM."""

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
    """The config of a P-Former and the frozen LLM that it prompts.

    Attributes:
        prompter: the P-Former; `PromptGuidedConfig` reads the trained one as its part "prompter".
        llm: any LLM whose vocabulary is that of the captions.
        projection_size: width of the space in which captions are distinguished.
        init_temperature: the initial divisor of similarities; it is learned.
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
        """The number of prompts, which stand for the image of a caption."""
        return self.prompter.num_queries

    image_size = 1  # the model reads no images
    encoder_decoder = False  # captions are laid out for a decoder, whatever the LLM is
    family = None

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters."""
        parts = {"prompter": self.prompter.for_llm(self.llm), "llm": self.llm}
        return {name: within(part, self.compute) for name, part in parts.items()}

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """The number of tokens of each embedding, by its path in an experiment."""
        return {f"model.{name}.vocab_size": part.vocab_size for name, part in self.parts.items()}

    @property
    def dtype(self) -> str:
        """The dtype of most of the computation."""
        return self.parts["prompter"].dtype

    def batch_spec(self, rows: int = 1, length: int = 8, slots: Mapping[str, int] = NO_MEDIA) -> BatchSpec:
        """Returns the arrays of a batch: captions without images."""
        return text_spec(rows, min(length, self.prompter.max_length))

    def make(self) -> PFormerPretraining:
        return PFormerPretraining(self)


@struct.dataclass
class PromptedTexts:
    """The P-Former's outputs for captions.

    Attributes:
        prompts: float32[B, Q, E].
        nearest: float32[B, Q, E], the LLM's token embedding nearest to each prompt; no gradient.
        text: float32[B, D], unit vectors.
        temperature: float32, the divisor of similarities.
        row: prompts and captions as the LLM reads them.
    """

    prompts: jax.Array
    nearest: jax.Array
    text: jax.Array
    temperature: jax.Array
    row: dict


class PFormerPretraining(nn.Module):
    """A module that maps captions to prompts, and prompts to the LLM's logits."""

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
        """Encodes the captions of a batch, one a row.

        Args:
            batch: tokens, segments int[B, L], 0 in segments at padding; `masked` bool[B, L], the tokens that the
                P-Former may not read; `llm_tokens`, `llm_segments` int[B, K], the same captions for the LLM, if it has
                its own tokenizer.
        """
        c = self.config
        first = self.prompter.read(batch["tokens"], batch["segments"], batch.get("masked"))
        prompts = self.prompter.prompt(first)
        caption = (batch.get(f"llm_{name}", batch[name]) for name in ("tokens", "segments"))
        row = caption_row(c.llm, prompts, *caption)
        prompts, text = prompts.astype(jnp.float32), as_unit_vectors(self.text_projection(first))
        return PromptedTexts(prompts, self.nearest(prompts), text, self.temperature, row)

    def nearest(self, x):
        """Returns the LLM's nearest token embedding, float32[..., E] of float32[..., E], without a gradient."""
        # The [..., V] distances are no larger than the LLM's logits.
        table = self.llm.embed(jnp.arange(self.config.llm.vocab_size)).astype(jnp.float32)
        table, x = jax.lax.stop_gradient((table, x))
        # In full precision, because the nearest embeddings differ by little.
        distance = jnp.square(table).sum(axis=-1) - 2 * jnp.matmul(x, table.T, precision="highest")
        return jnp.take(table, distance.argmin(axis=-1), axis=0)

    def __call__(self, batch) -> MultimodalOutput:
        """Computes next-token logits of a `row` of `encode_texts`."""
        return MultimodalOutput(self._language(batch))

    def head_inputs(self, batch) -> HeadInputs:
        """Returns the inputs of the LLM's output head for a `row`."""
        return self._language(batch, project=False)

    def _language(self, batch, **more):
        here = batch["media_index"] >= 0
        prompts = jnp.take_along_axis(batch["media"], jnp.maximum(batch["media_index"], 0)[..., None], axis=1)
        text = self.llm.embed(batch["tokens"])
        embeddings = jnp.where(here[..., None], prompts.astype(text.dtype), text)
        target = {name: batch[name] for name in ("decoder_tokens", "decoder_segments") if name in batch}
        return self.llm(batch["tokens"], None, batch["segments"], embeddings=embeddings, **target, **more)

    # ---- for training

    def touch(self, batch):
        """Runs every part once, so that `init` creates all parameters."""
        return self(self.encode_texts(batch).row)
