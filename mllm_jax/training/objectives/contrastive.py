"""Contrastive training of a picture and a text tower: softmax (CLIP) and sigmoid (SigLIP)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mllm_jax.errors import ConfigError

KINDS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Contrastive:
    """Each picture against all texts of the batch and the reverse.

    Pairs of different rows with equal texts are not negatives of each other and are left out.

    Attributes:
        kind: "softmax" (InfoNCE both ways, arXiv 2103.00020) or "sigmoid" (arXiv 2303.15343).
    """

    kind: str = "softmax"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"contrastive kind {self.kind!r}", f"one of {KINDS}", "change the objective")

    def loss(self, apply, params, batch, key):
        """The mean over the batch; `weight` is the number of pairs."""
        image, text, scale, bias = apply(params, batch, method="embed_pairs")
        logits = scale * image @ text.T + bias
        rows = logits.shape[0]
        own = jnp.eye(rows, dtype=bool)
        code = _text_code(batch["tokens"])
        logits = jnp.where((code[:, None] == code[None, :]) & ~own, -1e9, logits)
        if self.kind == "sigmoid":
            loss = -jax.nn.log_sigmoid(jnp.where(own, logits, -logits)).sum() / rows
        else:
            rows_loss = jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)
            columns_loss = jax.nn.logsumexp(logits, axis=0) - jnp.diagonal(logits)
            loss = (rows_loss + columns_loss).mean() / 2
        recall = (logits.argmax(axis=1) == jnp.arange(rows)).mean()
        return loss, {"recall_at_1": recall, "logit_scale": scale, "weight": jnp.float32(rows)}


def _text_code(tokens):
    """A number for each row that is equal for equal texts (uint32[B], a polynomial with wrap-around)."""
    powers = jnp.cumprod(jnp.full(tokens.shape[1], 2654435761, jnp.uint32))
    return (tokens.astype(jnp.uint32) * powers).sum(axis=1, dtype=jnp.uint32)
