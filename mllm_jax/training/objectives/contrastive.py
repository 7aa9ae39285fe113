"""Contrastive training of an image encoder and a text encoder: softmax (CLIP) and sigmoid (SigLIP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from mllm_jax.errors import ConfigError
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.sharding.logical import active_mesh, partition_spec
from mllm_jax.training.objectives.checks import check_captions, check_features, require_model
from mllm_jax.training.objectives.ring import RingPlan, pair_loss

if TYPE_CHECKING:
    from mllm_jax.training.config import Stage

KINDS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Contrastive:
    """Contrasts each image with all texts of the batch and each text with all images, over all devices.

    Pairs of different rows with equal texts are not negatives of each other and are left out.

    Attributes:
        kind: "softmax" (InfoNCE in both directions, arXiv 2103.00020) or "sigmoid" (arXiv 2303.15343).
        chunk: number of texts whose logits a device holds at a time: rows / devices x chunk numbers for any batch.
    """

    kind: str = "softmax"
    chunk: int = 1024

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"contrastive kind {self.kind!r}", f"one of {KINDS}", "change the objective")
        if self.chunk < 1:
            raise ConfigError(f"contrastive chunk {self.chunk}", "at least 1", "change the objective")

    def check(self, stage: Stage, model: Any) -> None:
        """Raises ConfigError: the model is no dual encoder, or one made for the other loss."""
        require_model(stage, model, DualEncoderConfig)
        if self.kind != model.kind:
            raise ConfigError(
                f"stage {stage.name!r}: the {self.kind} loss for a dual encoder of kind {model.kind!r}",
                "the loss that the model's scale and bias are made for",
                "make objective.kind and model.kind equal",
            )
        check_features(stage, model, read=False)
        check_captions(stage, model.captions, model.text)

    def loss(self, apply, params, batch, key):
        """Computes the mean over the batch's pairs; `weight` is their number.

        `recall_at_1` is the share of images that are closer to their own text than to any other; a tie is a miss.
        """
        image, text, scale, bias = apply(params, batch, method="embed_pairs")
        code = text_codes(batch["tokens"], batch["segments"], text.shape[1])
        pairs = jnp.maximum((code[..., 1] != 0).sum(), 1).astype(jnp.float32)
        total, hits = pair_loss(self._plan(image.shape), image, text, code, scale, bias)
        return total / pairs, {"recall_at_1": hits / pairs, "logit_scale": scale, "weight": pairs}

    def _plan(self, shape: tuple[int, ...]) -> RingPlan:
        active = active_mesh()
        if active is None:
            return RingPlan(self.kind, self.chunk)
        mesh, rules = active
        axes = partition_spec(("batch", None, None), shape, mesh, rules)[0] or ()
        return RingPlan(self.kind, self.chunk, mesh, (axes,) if isinstance(axes, str) else axes)


def text_codes(tokens, segments, count: int):
    """Returns two numbers for each text of each row, equal for equal texts: uint32[B, count, 2]; 0 without a text.

    Together they have 63 bits: in a batch of 100,000 texts, two share them with a probability below 1e-9.
    """
    member = segments[:, None] == jnp.arange(1, count + 1)[None, :, None]
    position = jnp.cumsum(member, axis=-1)
    codes = []
    for factor in (2654435761, 2246822519):
        powers = jnp.cumprod(jnp.full(tokens.shape[1] + 1, factor, jnp.uint32))[position]
        terms = jnp.where(member, (tokens[:, None].astype(jnp.uint32) + 1) * powers, 0)
        codes.append(terms.sum(axis=-1, dtype=jnp.uint32))
    code = jnp.stack([codes[0], codes[1] | 1], axis=-1)
    return jnp.where(member.any(axis=-1, keepdims=True), code, 0)
