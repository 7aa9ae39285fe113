"""The part of a multimodal model that produces media: hidden states of signal tokens -> conditions -> generators."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.layers.context_gather import take_along_rows
from mllm_jax.layers.head import HeadInputs
from mllm_jax.models.diffused import Diffused, OfMedia, diffuse


class Produces(OfMedia):
    """Methods of `Multimodal` for its output branches, whose parts are `output_projector` and `generator`."""

    def head_and_conditions(self, batch) -> tuple[HeadInputs, dict[str, Any]]:
        """Applies the LLM and the output projectors to a batch.

        Args:
            batch: also has `<modality>_signals` int[B, M, N], the positions of the signal tokens of M media, -1 in
                empty slots, for each modality to produce; others have no condition.

        Returns:
            The inputs of the LLM's output head; by modality the conditions [B, M, tokens, width], or a tuple of these
            for a generator with several.
        """
        head = self.head_inputs(batch)
        found = {m: f"{m}_signals" for m in self.config.outputs}
        return head, {m: self._condition(m, head.x, batch, batch[name]) for m, name in found.items() if name in batch}

    def _condition(self, modality: str, hidden, batch, positions):
        """Applies the output projector of a modality to the hidden states at the positions of signals."""
        where = rearrange(jnp.maximum(positions, 0), "b m n -> b (m n)")
        split = {"m": positions.shape[1]}
        states = rearrange(take_along_rows(hidden, where), "b (m n) e -> (b m) n e", **split)
        ids = jnp.take_along_axis(batch["tokens"], where, axis=1)
        embeddings = rearrange(self.llm.embed(ids), "b (m n) e -> (b m) n e", **split)
        mask = rearrange(positions >= 0, "b m n -> (b m) n")
        mask |= ~mask.any(axis=1, keepdims=True)  # an attention to nothing has no value
        made = self.output_projector[modality](states, embeddings, mask)
        return jax.tree.map(lambda x: rearrange(x, "(b m) ... -> b m ...", **split), made)

    def conditions(self, batch) -> dict[str, Any]:
        """Returns the conditions of generators, see `head_and_conditions`."""
        return self.head_and_conditions(batch)[1]

    def diffused(self, batch) -> tuple[HeadInputs | None, dict[str, Diffused]]:
        """Noises the targets of generators and denoises them under the conditions of output projectors.

        Args:
            batch: also has, for each modality to produce, `<modality>_latents` and `<modality>_noise`
                float32[B, M, ...], the result of `targets` and normally distributed numbers; `<modality>_level`
                float32[B, M] in [0, 1), the timestep as a share of all; `<modality>_dropped` bool[B, M], media whose
                condition is that of an empty caption.

        Returns:
            The inputs of the LLM's output head; the results by modality.
        """
        head, conditions = self.head_and_conditions(batch)
        return head, {m: diffuse(self.generator[m], m, batch, condition) for m, condition in conditions.items()}
