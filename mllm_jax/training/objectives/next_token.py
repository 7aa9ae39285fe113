"""Next-token prediction on packed rows."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of each learnt token given what stands before it in its own segment.

    Attributes:
        z_loss: weight of log(Z)^2, which keeps the logits' normaliser near 1 (PaLM, arXiv 2204.02311, section 5).
    """

    z_loss: float = 0.0

    def loss(self, apply, params, batch, key):
        """The mean over learnt tokens.

        Returns:
            (float32, metrics): `weight` is the number of learnt tokens, what means over several batches go by.
        """
        logits = apply(params, batch).logits[:, :-1]
        # An encoder-decoder learns its target; what its encoder reads is given.
        side = "decoder_" if "decoder_tokens" in batch else ""
        tokens, segments = batch[f"{side}tokens"], batch[f"{side}segments"]
        targets = tokens[:, 1:]
        same = segments[:, 1:] == segments[:, :-1]
        weights = batch["loss_weights"][:, 1:] * same
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        total = weights.sum()
        count = jnp.maximum(total, 1e-9)
        loss = ((log_z - target_logits) * weights).sum() / count
        accuracy = ((logits.argmax(axis=-1) == targets) * weights).sum() / count
        regular = self.z_loss * (jnp.square(log_z) * weights).sum() / count if self.z_loss else 0.0
        return loss + regular, {"token_accuracy": accuracy, "weight": total}
