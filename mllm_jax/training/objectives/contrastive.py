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
        """The mean over the batch's pairs; `weight` is their number."""
        image, text, scale, bias = apply(params, batch, method="embed_pairs")
        code = _text_codes(batch["tokens"], batch["segments"], text.shape[1]).ravel()
        image, text = (x.reshape(-1, x.shape[-1]) for x in (image, text))
        there = code != 0
        pairs = jnp.maximum(there.sum(), 1).astype(jnp.float32)
        logits = scale * image @ text.T + bias
        own = jnp.eye(code.shape[0], dtype=bool)
        rival = (code[:, None] != code[None, :]) & there[:, None] & there[None, :]
        logits = jnp.where(rival | own, logits, -1e9)
        if self.kind == "sigmoid":
            loss = -jax.nn.log_sigmoid(jnp.where(own, logits, -logits)).sum(axis=1)
        else:
            rows_loss = jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)
            columns_loss = jax.nn.logsumexp(logits, axis=0) - jnp.diagonal(logits)
            loss = (rows_loss + columns_loss) / 2
        recall = jnp.where(there, logits.argmax(axis=1) == jnp.arange(code.shape[0]), False).sum() / pairs
        return jnp.where(there, loss, 0).sum() / pairs, {"recall_at_1": recall, "logit_scale": scale, "weight": pairs}


def _text_codes(tokens, segments, count: int):
    """A number for each text of each row that is equal for equal texts, 0 where there is none: uint32[B, count]."""
    member = segments[:, None] == jnp.arange(1, count + 1)[None, :, None]
    place = jnp.cumsum(member, axis=-1)
    powers = jnp.cumprod(jnp.full(tokens.shape[1] + 1, 2654435761, jnp.uint32))[place]
    code = jnp.where(member, (tokens[:, None].astype(jnp.uint32) + 1) * powers, 0).sum(axis=-1, dtype=jnp.uint32)
    return jnp.where(member.any(axis=-1), code | 1, 0)
