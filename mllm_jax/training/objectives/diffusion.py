"""Learning to denoise: a generator, or the output projector in front of it, or both (arXiv 2006.11239)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from einops import rearrange

from mllm_jax.errors import ConfigError
from mllm_jax.models.diffused import Diffused
from mllm_jax.models.generator_only import GeneratorOnlyConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.output import slots_of
from mllm_jax.training.objectives.checks import check_features, require_model, require_targets
from mllm_jax.training.objectives.diffusion_losses import diffusion_loss, min_snr_weights
from mllm_jax.training.objectives.next_token import NextToken

if TYPE_CHECKING:
    from mllm_jax.training.config import Stage


@dataclass(frozen=True)
class Diffusion(NextToken):
    """The squared error of what a generator predicts from noised targets: noise, velocity or flow, by its scheduler.

    In a multimodal model the condition is that of its output projector, and the token loss of answers is added
    (MetaQuery, arXiv 2504.06256, trains the connector so, and NExT-GPT adds it to its alignment). In a
    `GeneratorOnlyConfig` the condition is that of the generator's text encoder, and there is no other loss.

    Attributes:
        weight: of the squared error; that of the token loss is 1.
        drop: share of media whose condition is that of an empty caption, for guidance.
        min_snr: gamma of min-SNR weights (arXiv 2303.09556); None: all noise levels have the same weight.
    """

    weight: float = 1.0
    drop: float = 0.1
    min_snr: float | None = None

    def __post_init__(self):
        if not 0 <= self.drop < 1 or self.weight <= 0:
            raise ConfigError(f"drop {self.drop}, weight {self.weight}", "0 <= drop < 1, weight > 0", "change it")

    def check(self, stage: Stage, model: Any) -> None:
        """Raises ConfigError: a model that produces no media, or a stage without slots for them."""
        require_model(stage, model, MultimodalConfig, GeneratorOnlyConfig)
        require_targets(stage, model)
        check_features(stage, model, read=False)
        known = {slots_of(modality) for modality in model.outputs}
        others = {name for m in stage.mixtures for name, count in m.slots.items() if count} - known
        if isinstance(model, GeneratorOnlyConfig) and others:
            raise ConfigError(
                f"stage {stage.name!r}: slots {sorted(others)} for generators alone",
                f"slots {sorted(known)} alone, and data whose questions have no media",
                "take the other sources and slots out of the stage's data",
            )

    def loss(self, apply, params, batch, key):
        """Computes the losses.

        Returns:
            (float32, metrics): `diffusion_loss` is the mean over media and modalities. `weight` is the number of tokens
            that carry loss, or of media without a token loss.
        """
        targets = jax.lax.stop_gradient(apply(params, batch, method="targets"))
        for number, (modality, latents) in enumerate(sorted(targets.items())):
            keys = jax.random.split(jax.random.fold_in(key, number), 3)
            batch = {
                **batch,
                f"{modality}_latents": latents,
                f"{modality}_noise": jax.random.normal(keys[0], latents.shape),
                f"{modality}_level": jax.random.uniform(keys[1], latents.shape[:2]),
                f"{modality}_dropped": jax.random.bernoulli(keys[2], self.drop, latents.shape[:2]),
            }
        head, made = apply(params, batch, method="diffused")
        there = {modality: (batch[f"{modality}_signals"] >= 0).any(axis=-1) for modality in made}
        error = sum(self._error(each, there[modality]) for modality, each in made.items()) / len(made)
        if head is None:
            return self.weight * error, {"diffusion_loss": error, "weight": sum(x.sum() for x in there.values()) * 1.0}
        tokens, metrics = self.of_head(head, batch)
        return tokens + self.weight * error, metrics | {"diffusion_loss": error, "token_loss": tokens}

    def _error(self, made: Diffused, there: jax.Array) -> jax.Array:
        """Returns the mean error of one modality.

        Args:
            there: bool[B, M], slots with a medium.
        """
        weights = None
        if self.min_snr is not None:
            weights = min_snr_weights(made.snr, self.min_snr, made.prediction).reshape(-1)
        output, target = (rearrange(x, "b m ... -> (b m) ...") for x in (made.output, made.target))
        return diffusion_loss(output, target, weights, there.reshape(-1))
