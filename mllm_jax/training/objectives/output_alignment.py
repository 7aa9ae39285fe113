"""Learning to produce media: the tokens of answers, and conditions close to those of the generator's text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mllm_jax.errors import ConfigError
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.training.objectives.alignment_losses import KINDS, condition_loss
from mllm_jax.training.objectives.checks import check_features, require_model, require_targets
from mllm_jax.training.objectives.next_token import NextToken

if TYPE_CHECKING:
    from mllm_jax.training.config import Stage


@dataclass(frozen=True)
class OutputAlignment(NextToken):
    """Next-token prediction plus the distance of conditions to those of captions (NExT-GPT, arXiv 2309.05519, 4.2).

    The condition that an output projector makes of a medium's signal tokens is compared with the output of the
    generator's frozen text encoder for the medium's caption. No generator runs.

    Attributes:
        kind: "l2", the mean Euclidean distance of vectors, or "mse".
        weight: of the distance; that of the token loss is 1.
    """

    kind: str = "l2"
    weight: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS or self.weight <= 0:
            raise ConfigError(
                f"output alignment of kind {self.kind!r}, weight {self.weight}",
                f"one of {', '.join(KINDS)}, and a positive weight",
                "change it",
            )

    def check(self, stage: Stage, model: Any) -> None:
        """Raises ConfigError: a model that produces no media, a trained generator, or a stage without slots."""
        require_model(stage, model, MultimodalConfig)
        require_targets(stage, model, frozen=True)
        check_features(stage, model, read=True)

    def loss(self, apply, params, batch, key):
        """Computes both losses.

        Returns:
            (float32, metrics): `condition_distance` is the mean over media, conditions and modalities; `weight` is the
            number of tokens that carry loss. Over pieces of a batch the distances are averaged by it too.
        """
        head, conditions = apply(params, batch, method="head_and_conditions")
        targets = jax.lax.stop_gradient(apply(params, batch, method="caption_conditions"))
        total, metrics = self.of_head(head, batch)
        found = []
        for modality, target in targets.items():
            there = (batch[f"{modality}_signals"] >= 0).any(axis=-1)
            pairs = zip(jax.tree.leaves(conditions[modality]), jax.tree.leaves(target), strict=True)
            found.append(mean([self._distance(*pair, there) for pair in pairs]))
        distance = mean(found) if found else jnp.zeros(())
        return total + self.weight * distance, metrics | {"token_loss": total, "condition_distance": distance}

    def _distance(self, condition: jax.Array, target: jax.Array, there: jax.Array) -> jax.Array:
        """Returns the mean distance of conditions [B, M, L, E]; bool[B, M] has the slots with a medium."""
        mask = jnp.broadcast_to(there[..., None], target.shape[:-1])
        return condition_loss(condition, target, self.kind, mask)


def mean(found: list[jax.Array]) -> jax.Array:
    """Returns the mean of scalars."""
    return sum(found) / len(found)
