"""How the next token is chosen from the logits."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mllm_jax.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Greedy by default.

    Attributes:
        temperature: 0 is greedy.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens whose probabilities add up to p (nucleus sampling, arXiv 1904.09751).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(f"{self}", "temperature >= 0, top_k >= 0, 0 < top_p <= 1", "change the option")


def choose(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """float32[B, V] -> int32[B]"""
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        probabilities = jax.nn.softmax(ordered, axis=-1)
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        least = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
