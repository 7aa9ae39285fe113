"""The part of the Assistant that gives the probabilities of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mllm_jax.data.message import Conversation, Example, Message
from mllm_jax.data.message import conversations as read_conversations
from mllm_jax.data.processing.media import Encoded
from mllm_jax.errors import DataError
from mllm_jax.generation.decode_step import on_mesh, steps_of
from mllm_jax.generation.program import placed_batch
from mllm_jax.models.processor import Processor
from mllm_jax.sharding.hosts import fetch

BATCH = 8
UNBOUNDED = 1 << 20  # tokens of a text if the model's config has no bound


class AnswerScores:
    """The call `score`, of an `Assistant` for a model that writes text."""

    model: nn.Module
    params: dict | None
    processor: Processor | None
    mesh: Mesh | None
    max_length: int | None
    llm: Any

    def score(
        self,
        conversations: Conversation | Sequence[Conversation],
        answers: str | Sequence[str],
        *,
        batch_size: int = BATCH,
    ) -> list[np.ndarray]:
        """Returns the natural log of the probability of each token of given answers.

        Returns:
            float32[n] for each conversation: the tokens of its answer and its end token.

        Raises:
            DataError: the numbers of answers and conversations differ, or one cannot be laid out or is too long.
            ConfigError: the model writes no text.
        """
        self._require_text()
        given, _ = read_conversations(conversations)
        said = [answers] if isinstance(answers, str) else list(answers)
        if len(given) != len(said):
            raise DataError(f"{len(given)} conversation(s), {len(said)} answer(s)", "one for each", "give as many")
        encoded = [self._answered(*pair) for pair in zip(given, said, strict=True)]
        self._require_tokens(encoded)
        out: dict[int, np.ndarray] = {}
        for chunk, batch in self.batches(encoded, batch_size, learnt=True):
            learnt = batch.pop("loss_weights") > 0
            scores = fetch(self._scored(self.params, placed_batch(batch, self.mesh)))
            out |= {i: scores[row][learnt[row]] for row, i in enumerate(chunk)}
        return [out[i] for i in range(len(encoded))]

    def _answered(self, messages: Sequence[Message], answer: str) -> Encoded:
        """Encodes a conversation with its answer as training does; only the answer carries loss."""
        longest = self.max_length or UNBOUNDED
        if self._is_plain(messages) and not self.llm.encoder_decoder:
            encoded = self.processor.answered(self.prompt(messages), answer)
        else:
            encoded = self.processor.encode(Example((*messages, Message("assistant", answer))), longest)
        if encoded.length > longest or encoded.dropped_turns:
            raise DataError(
                f"a conversation and its answer of more than {longest} tokens, media included",
                f"at most {longest}",
                "shorten them, or raise max_length if the model can read more",
            )
        *_, last = np.flatnonzero(encoded.loss_weights)
        before = np.flatnonzero(encoded.loss_weights[:last] == 0)
        first = before[-1] + 1 if len(before) else 0
        return replace(
            encoded, loss_weights=np.where(np.arange(len(encoded.loss_weights)) < first, 0, encoded.loss_weights)
        )

    @cached_property
    def _scored(self):
        """Compiled: (params, batch) -> float32[B, T], the log probability of each token after those before it."""
        targets = "decoder_tokens" if self.llm.encoder_decoder else "tokens"
        steps = steps_of(self.model, by_layer=False)

        def scored(params, batch):
            with on_mesh(self.mesh):
                logits = steps.logits(params, batch)[:, :-1].astype(jnp.float32)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[targets][:, 1:, None], axis=-1)[..., 0]
            return jnp.pad(chosen, [(0, 0), (1, 0)])

        return jax.jit(scored)
