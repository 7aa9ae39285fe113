"""Objectives of the P-Former and of the training that it guides (arXiv 2307.07063, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mllm_jax.errors import ConfigError
from mllm_jax.models.pformer_pretraining import PFormerPretrainingConfig
from mllm_jax.models.prompt_guided import PromptGuidedConfig
from mllm_jax.training.objectives.checks import check_features, require_model
from mllm_jax.training.objectives.contrastive import text_codes
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.partition import trains

if TYPE_CHECKING:
    from mllm_jax.training.config import Stage


@dataclass(frozen=True)
class PFormerObjective:
    """The sum of three losses on captions, one a row, of which the P-Former reads a masked version.

    Contrast: each caption against all of the batch, so that they stay apart. Nearness: the mean squared distance of
    prompts to the nearest embedded token of the LLM. Language: the LLM predicts the whole caption after its prompts.

    Attributes:
        mask_ratio: share of tokens that each step masks anew, except the first, which becomes the prompts.
        label_smoothing: of the contrast.
        gathered_gradient: whether the captions on the other side of the contrast get a gradient too. False is how the
            published model was trained: they were gathered from all devices without one.
        equal_texts: whether rows with equal captions count as one, and need not stay apart.
    """

    mask_ratio: float = 0.25
    label_smoothing: float = 0.1
    gathered_gradient: bool = False
    equal_texts: bool = False

    def __post_init__(self):
        if not (0 <= self.mask_ratio < 1 and 0 <= self.label_smoothing < 1):
            raise ConfigError(
                f"mask_ratio {self.mask_ratio}, label_smoothing {self.label_smoothing}",
                "shares from 0 to less than 1",
                "change the objective",
            )

    def check(self, stage: Stage, model: Any) -> None:
        """Raises ConfigError: the model is no P-Former with its LLM, rows are no captions, or the LLM is trained."""
        require_model(stage, model, PFormerPretrainingConfig)
        check_features(stage, model, read=False)
        _check_captions(stage, model, "layout 'caption'", slots=None)
        _check_frozen(stage, "llm")

    def loss(self, apply, params, batch, key):
        """Computes the sum of the losses' means.

        Returns:
            (float32, metrics): each loss, the share of tokens that the LLM predicts correctly, and `weight`, the
            number of captions.

        Raises:
            ConfigError: a batch of one caption, which has no negatives.
        """
        rows = batch["tokens"].shape[0]
        if rows < 2:
            raise ConfigError("P-Former training on one row", "at least two: captions are contrasted", "raise rows")
        made = apply(params, batch | {"masked": self.mask(batch, key)}, method="encode_texts")
        others = made.text if self.gathered_gradient else jax.lax.stop_gradient(made.text)
        log_p = jax.nn.log_softmax(made.text @ others.T / made.temperature)
        contrast = -(log_p * self._targets(batch)).sum(axis=1).mean()
        nearness = jnp.square(made.prompts - made.nearest).mean()
        language, metrics = NextToken().loss(apply, params, made.row, key)
        metrics |= {"loss_contrast": contrast, "loss_nearness": nearness, "loss_language": language}
        return contrast + nearness + language, metrics | {
            "temperature": made.temperature,
            "weight": jnp.float32(rows),
        }

    def mask(self, batch, key):
        """Draws bool[B, L], the masked tokens: never padding, and never the first of a row."""
        drawn = jax.random.bernoulli(key, self.mask_ratio, batch["tokens"].shape)
        return drawn.at[:, 0].set(False) & (batch["segments"] > 0)

    def _targets(self, batch):
        """Returns float32[B, B], the smoothed share of each caption in the target of each row."""
        rows = batch["tokens"].shape[0]
        same = jnp.eye(rows, dtype=bool)
        if self.equal_texts:
            code = text_codes(batch["tokens"], (batch["segments"] > 0).astype(jnp.int32), 1)[:, 0]
            same |= (code[:, None] == code).all(axis=-1)
        share = same / same.sum(axis=1, keepdims=True)
        return (1 - self.label_smoothing) * share + self.label_smoothing / rows


@dataclass(frozen=True)
class PromptGuided:
    """Next-token prediction of an image's caption, with its media tokens pulled towards the caption's prompts.

    The composition's `prompter` is the P-Former that makes the prompts, read from the run that trained it by
    `Pretrained("prompter", run, stage=...)`; it reads the whole caption and is frozen.

    Attributes:
        weight: of the mean squared distance of media tokens to prompts.
    """

    weight: float = 10.0

    def check(self, stage: Stage, model: Any) -> None:
        """Raises ConfigError: the model has no P-Former, rows are no captions of images, or the P-Former is trained."""
        require_model(stage, model, PromptGuidedConfig)
        check_features(stage, model.model, read=True)
        _check_captions(stage, model, "layout 'caption', and 1 slot: the image of the caption", slots={"image": 1})
        _check_frozen(stage, "prompter")

    def loss(self, apply, params, batch, key):
        """Computes the sum of both losses.

        Returns:
            (float32, metrics): each loss, the latter with its weight, and those of `NextToken`.
        """
        made = apply(params, batch, method="guide")
        prompts = jax.lax.stop_gradient(made.prompts.astype(jnp.float32))
        alignment = self.weight * jnp.square(made.media.astype(jnp.float32) - prompts).mean()
        language, metrics = NextToken().loss(apply, params, made.row, key)
        return language + alignment, metrics | {"loss_language": language, "loss_alignment": alignment}


def _check_captions(stage: Stage, model: Any, expected: str, slots: Mapping[str, int] | None) -> None:
    """Checks that rows are captions for the P-Former; where it guides, each with one image."""
    for mixture in stage.mixtures:
        if mixture.layout != "caption" or slots not in (None, mixture.slots):
            raise ConfigError(
                f"stage {stage.name!r}: layout {mixture.layout!r} with slots {dict(mixture.slots)}",
                expected,
                "change the stage's mixture",
            )
        if mixture.length > model.prompter.max_length:
            raise ConfigError(
                f"stage {stage.name!r}: captions of {mixture.length} positions for a P-Former of"
                f" {model.prompter.max_length}",
                "rows that fit its positions",
                "lower the mixture's length, or raise max_length of the model's prompter",
            )


def _check_frozen(stage: Stage, part: str) -> None:
    if trains(stage.trainable, part):
        raise ConfigError(
            f"stage {stage.name!r}: trainable {stage.trainable}", f"{part}/* frozen", "change the stage's trainable"
        )
