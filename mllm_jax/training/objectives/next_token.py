"""Next-token prediction on packed rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mllm_jax.layers.head import HeadInputs, head_cross_entropy, logits_bytes
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.training.objectives.checks import check_features, require_model

if TYPE_CHECKING:
    from mllm_jax.training.config import Stage

# Named scope under which the FLOPs of the head are counted: see `mllm_jax.training.flops`.
HEAD = "llm/head"


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of each token that carries loss, given the tokens before it in its own segment.

    Attributes:
        z_loss: weight of log(Z)^2, which keeps the logits' normaliser near 1 (PaLM, arXiv 2204.02311, section 5).
        logits_mib: maximum of float32 logits on a device at a time, in MiB. If all logits take more, loss and gradient
            of the head are computed in chunks of that size.
    """

    z_loss: float = 0.0
    logits_mib: float = 128.0

    def check(self, stage: Stage, model: Any) -> None:
        """Raises ConfigError: a model that generates no text."""
        require_model(stage, model, MultimodalConfig)
        check_features(stage, model, read=True)

    def loss(self, apply, params, batch, key):
        """Computes the mean over the tokens that carry loss.

        Returns:
            (float32, metrics): `weight` is the number of these tokens, the weight of means over several batches.
        """
        return self.of_head(apply(params, batch, method="head_inputs"), batch)

    def of_head(self, head: HeadInputs, batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the loss and the metrics of a batch from the inputs of the output head."""
        # The target of an encoder-decoder carries loss; its encoder's text is given.
        side = "decoder_" if "decoder_tokens" in batch else ""
        segments = batch[f"{side}segments"]
        weights = _next(batch["loss_weights"]) * (_next(segments) == segments)
        targets = _next(batch[f"{side}tokens"])
        chunks = math.ceil(logits_bytes(head) / (self.logits_mib * 2**20))
        # All sums go over the devices in one collective. A separate sum of the weights waits for nothing: one device of
        # a CPU may start it while the others start a gather, and all wait for ever (jaxlib 0.10.2).
        with jax.named_scope(HEAD):
            if chunks > 1:
                loss, right, total = head_cross_entropy(head, targets, weights, self.z_loss, chunks)
            else:
                nll, log_z, right = cross_entropy(head.logits(), targets)
                each = nll + self.z_loss * jnp.square(log_z) if self.z_loss else nll
                columns = jnp.stack([each, right, jnp.ones_like(each)], -1)
                loss, right, total = (columns * weights[..., None]).sum(axis=(0, 1))
        count = jnp.maximum(total, 1e-9)
        return loss / count, {"token_accuracy": right / count, "weight": total}


@jax.custom_vjp
def cross_entropy(logits, targets):
    """Computes -log softmax(logits)[targets], with a gradient that passes over the logits once.

    Args:
        logits: float32[..., V].  targets: int[...].

    Returns:
        float32[...]; the logarithm of the normaliser float32[...]; whether no logit is above the target's bool[...].
    """
    return _forward(logits, targets)[0]


def _forward(logits, targets):
    highest = logits.max(axis=-1)
    log_z = highest + jnp.log(jnp.exp(logits - highest[..., None]).sum(axis=-1))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (log_z - chosen, log_z, chosen >= highest), (logits, log_z, targets)


def _backward(kept, cotangents):
    logits, log_z, targets = kept
    nll, normaliser, _ = cotangents
    here = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    probability = jnp.exp(logits - log_z[..., None])
    return probability * (nll + normaliser)[..., None] - jnp.where(here, nll[..., None], 0), None


cross_entropy.defvjp(_forward, _backward)


def _next(x):
    """Returns the next position's value in each row [B, S]; zero after the last."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
