"""The part of a multimodal model that produces media: hidden states of signal tokens -> conditions -> generators."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.layers.context_gather import take_along_rows
from mllm_jax.layers.head import HeadInputs
from mllm_jax.models.output import text_part


class Produces:
    """Methods of `Multimodal` for its output branches, whose parts are `output_projector` and `generator`."""

    def head_and_conditions(self, batch) -> tuple[HeadInputs, dict[str, jax.Array]]:
        """Applies the LLM and the output projectors to a batch.

        Args:
            batch: also has `<modality>_signals` int[B, M, N], the positions of the signal tokens of M media, -1 in
                empty slots, for each modality to produce; others have no condition.

        Returns:
            The inputs of the LLM's output head; by modality the conditions [B, M, tokens, width].
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

    def conditions(self, batch) -> dict[str, jax.Array]:
        """Returns the conditions of generators, see `head_and_conditions`."""
        return self.head_and_conditions(batch)[1]

    def caption_conditions(self, batch) -> dict[str, jax.Array]:
        """Returns the conditions that the generators' own text encoders make of `<modality>_captions` int[B, M, L]."""
        found = {}
        for modality, output in self.config.outputs.items():
            if output.text is not None and (captions := batch.get(f"{modality}_captions")) is not None:
                encoder = self.encoder[text_part(modality).removeprefix("encoder_")]
                flat = rearrange(captions, "b m l -> (b m) l")
                made = encoder.states(flat)
                found[modality] = rearrange(made, "(b m) ... -> b m ...", m=captions.shape[1])
        return found

    def targets(self, batch) -> dict[str, jax.Array]:
        """Returns the latents [B, M, ...] of `<modality>_targets`, which generators learn to denoise."""
        found = {}
        for modality, generator in self.generator.items():
            if (targets := batch.get(f"{modality}_targets")) is not None:
                made = generator.learned(rearrange(targets, "b m ... -> (b m) ..."))
                found[modality] = rearrange(made, "(b m) ... -> b m ...", m=targets.shape[1])
        return found

    def produced(self, batch) -> tuple[Any, ...]:
        """Runs every part that produces media once, so that `init` creates all parameters."""
        made, texts, latents = self.conditions(batch), self.caption_conditions(batch), self.targets(batch)
        outputs = []
        for modality, each in latents.items():
            inputs = dict(latents=each[:, 0], timesteps=jnp.zeros(len(each), jnp.int32), condition=made[modality][:, 0])
            outputs.append(self.generator[modality].decode(self.denoise(dict(modality=modality, **inputs))))
        return made, texts, *outputs

    def denoise(self, batch) -> jax.Array:
        """Applies the generator of a modality.

        Args:
            batch: `modality`, and `latents` [N, ...], `timesteps` [N] and `condition` [N, L, E] in place of a batch.
        """
        return self.generator[batch["modality"]](batch["latents"], batch["timesteps"], batch["condition"])
