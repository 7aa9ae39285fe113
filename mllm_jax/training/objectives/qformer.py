"""BLIP-2's first stage (arXiv 2301.12597, section 3.2): contrast, matching and captioning at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mllm_jax.errors import ConfigError
from mllm_jax.models.blip2_stage1 import QFormerPretrainingConfig, similarity
from mllm_jax.training.objectives.checks import check_captions, check_features, require_model
from mllm_jax.training.objectives.contrastive import text_codes

if TYPE_CHECKING:
    from mllm_jax.training.config import Stage

# Score of a pair that must not be drawn.
_NEVER = -10_000.0


@dataclass(frozen=True)
class QFormerStage1:
    """The sum of three losses on pairs of images and texts, one pair a row, over the whole batch.

    Contrast (ITC): each image against all texts and each text against all images, by the nearest query. Matching (ITM):
    each pair, and each text with a wrong image and each image with a wrong text, drawn by similarity. Captioning (ITG):
    each text from its image's queries.

    Attributes:
        label_smoothing: of contrast and captioning.
        gathered_gradient: whether the vectors on the other side of the contrast get a gradient too. False is how the
            published models were trained: they were gathered from all devices without one.
        equal_texts: whether pairs of rows with equal texts are positives. A batch may also mark them by `image_ids`
            int[B], equal for rows that show one image.
    """

    label_smoothing: float = 0.1
    gathered_gradient: bool = False
    equal_texts: bool = False

    def check(self, stage: Stage, model: Any) -> None:
        """Raises ConfigError: another model than that of BLIP-2's first stage."""
        require_model(stage, model, QFormerPretrainingConfig)
        check_features(stage, model, read=False)
        check_captions(stage, 1, model.projector)

    def loss(self, apply, params, batch, key):
        """Computes the sum of the losses' means.

        Returns:
            (float32, metrics): each loss, `recall_at_1` of images' own texts, `matching_accuracy`, and `weight`, the
            number of pairs.

        Raises:
            ConfigError: a batch of one pair, which has no negatives.
        """
        if batch["tokens"].shape[0] < 2:
            raise ConfigError("BLIP-2's first stage on one row", "at least two: negatives are others'", "raise rows")
        pairs = apply(params, batch, method="encode_pairs")
        same, targets = self._same(batch)
        to_text, to_image = self._similarities(pairs)
        itc = 0.5 * (_cross_entropy(to_text, targets).mean() + _cross_entropy(to_image, targets).mean())
        picks = self.negatives(key, jnp.where(same, _NEVER, to_image), jnp.where(same, _NEVER, to_text))
        itm, matched = self._matching(apply, params, batch, pairs, picks)
        itg = self._captioning(apply, params, batch, pairs)
        best = (to_text.argmax(axis=1) == jnp.arange(len(same))).mean()
        metrics = {"loss_itc": itc, "loss_itm": itm, "loss_itg": itg, "recall_at_1": best, "matching_accuracy": matched}
        return itc + itm + itg, metrics | {"temperature": pairs.temperature, "weight": jnp.float32(len(same))}

    def negatives(self, key, to_image, to_text):
        """Draws a wrong image for each text and a wrong text for each image, similar ones more often.

        Args:
            to_image, to_text: float32[B, B], logits of each text's images and of each image's texts.

        Returns:
            int[B], int[B], rows of images and of texts.
        """
        keys = jax.random.split(key)
        return jax.random.categorical(keys[0], to_image), jax.random.categorical(keys[1], to_text)

    def _same(self, batch):
        """Returns bool[B, B], which rows belong together, and float32[B, B], the smoothed share of each."""
        rows = batch["tokens"].shape[0]
        same = jnp.eye(rows, dtype=bool)
        if "image_ids" in batch:
            same |= batch["image_ids"][:, None] == batch["image_ids"]
        if self.equal_texts:
            code = text_codes(batch["tokens"], batch["segments"], 1)[:, 0]
            same |= (code[:, None] == code).all(axis=-1)
        share = same / same.sum(axis=1, keepdims=True)
        return same, (1 - self.label_smoothing) * share + self.label_smoothing / rows

    def _similarities(self, pairs):
        """Returns float32[B, B] of each image with all texts, and of each text with all images."""
        held = jax.lax.stop_gradient if not self.gathered_gradient else lambda x: x
        to_text = similarity(pairs.image, held(pairs.text))
        to_image = similarity(held(pairs.image), pairs.text).T
        return to_text / pairs.temperature, to_image / pairs.temperature

    def _matching(self, apply, params, batch, pairs, picks):
        """Computes the matching loss of pairs, then texts with wrong images, then images with wrong texts."""
        rows = batch["tokens"].shape[0]
        image, text = picks
        mixed = {name: jnp.concatenate([batch[name]] * 2 + [batch[name][text]]) for name in ("tokens", "segments")}
        mixed["features"] = jnp.concatenate([pairs.features, pairs.features[image], pairs.features])
        logits = apply(params, mixed, method="match")
        labels = (jnp.arange(3 * rows) < rows).astype(jnp.int32)
        loss = _cross_entropy(logits, jax.nn.one_hot(labels, 2)).mean()
        return loss, (logits.argmax(axis=1) == labels).mean()

    def _captioning(self, apply, params, batch, pairs):
        text = {name: batch[name] for name in ("tokens", "segments")}
        logits = apply(params, text | {"cache": pairs.cache}, method="write")[:, :-1]
        log_p = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        # Smoothed without a one-hot vector over the vocabulary.
        loss = -(1 - self.label_smoothing) * own - self.label_smoothing * log_p.mean(axis=-1)
        carries_loss = batch["segments"][:, 1:] == 1
        return (loss * carries_loss).sum() / jnp.maximum(carries_loss.sum(), 1)


def _cross_entropy(logits, targets):
    """Computes the cross-entropy [N] of logits [N, C] with target shares [N, C]."""
    return -(jax.nn.log_softmax(logits) * targets).sum(axis=-1)
