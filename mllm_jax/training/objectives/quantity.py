"""Next-token prediction with the quantity loss of a projector that fires media tokens (CIF, arXiv 1905.11235)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from mllm_jax.errors import ConfigError
from mllm_jax.models.sound_targets import answer_lengths
from mllm_jax.training.objectives.next_token import NextToken

if TYPE_CHECKING:
    from mllm_jax.training.config import Stage


@dataclass(frozen=True)
class QuantityGuided(NextToken):
    """Next-token prediction of transcripts, in which each sound learns to fire as many media tokens as its transcript.

    The target length of a sound is the number of tokens that carry loss in its segment of the row, less `ends`: with
    one sound and one answer, the tokens of the transcript. Several sounds of a segment share them in proportion to
    their lengths. The weights of each sound are scaled to its target length, if the projector's `scale` is set: it
    fires that number of media tokens from the first step on, or one less, which rounding decides as in the reference.
    The quantity loss is the mean distance of the unscaled sums to the target lengths. Sounds of segments without an
    answer are not scaled, and have no quantity loss.

    Attributes:
        quantity: weight of the quantity loss.
        ends: the number of tokens in each segment that carry loss and are not of the transcript: 1 is the end of text.
    """

    quantity: float = 1.0
    ends: int = 1

    def check(self, stage: Stage, model: Any) -> None:
        """Raises ConfigError: a model that generates no text, or without a projector that fires."""
        super().check(stage, model)
        if not model.fires:
            raise ConfigError(
                f"stage {stage.name!r}: {type(self).__name__} for a model whose projectors do not fire",
                "a branch with a CFormerProjectorConfig",
                "take NextToken, or change the projector",
            )

    def loss(self, apply, params, batch, key):
        """Computes the sum of both losses.

        Returns:
            (float32, metrics): those of `NextToken`, each loss without its weight, `fired`, the mean number of media
            tokens of a sound, and `cut`, the share of fires that the projector's bound left out. Over several batches
            all of them are weighted by `weight`, the number of tokens that carry loss.
        """
        head, heard = apply(params, batch | {"answer_lengths": answer_lengths(batch, self.ends)}, method="hear")
        language, metrics = self.of_head(head, batch)
        targets, quantity, fires, count = (
            jnp.concatenate([getattr(each, name) for each in heard], axis=1)
            if heard
            else jnp.zeros((len(batch["tokens"]), 0))
            for name in ("targets", "quantity", "fires", "count")
        )
        used = targets > 0
        sounds = jnp.maximum(used.sum(), 1)
        loss = jnp.where(used, jnp.abs(quantity - targets), 0).sum() / sounds
        kept, total = (jnp.where(used, each, 0).sum() for each in (count, fires))
        facts = dict(fired=kept / sounds, cut=1 - kept / jnp.maximum(total, 1))
        return language + self.quantity * loss, metrics | facts | {"loss_language": language, "loss_quantity": loss}
