"""The choice of the next token from the logits."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mllm_jax.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Sampling options; greedy by default. The filters act in the order of the attributes, as in transformers.

    Attributes:
        repetition_penalty: divides positive logits of tokens that the prompt or the answer already holds, and
            multiplies negative ones (CTRL, arXiv 1909.05858); 1 is none.
        temperature: divides the logits; 0 is greedy.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens whose probabilities add up to p (nucleus sampling, arXiv 1904.09751).
        min_p: only tokens at least min_p times as likely as the likeliest (arXiv 2407.01082).
        seed: a sampled answer depends on the seed and the prompt's position in the list only.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        right = self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1
        if not right or self.repetition_penalty <= 0:
            raise ConfigError(
                f"{self}",
                "temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, repetition_penalty > 0",
                "change the option",
            )


def penalise(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Makes seen tokens less likely: float[..., V], bool[..., V] -> float[..., V]."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def seen_tokens(tokens: jax.Array, said: jax.Array, vocab_size: int) -> jax.Array:
    """Returns bool[B, V]: the tokens int32[B, S] where `said` bool[B, S] is True."""
    place = jnp.where(said, tokens, vocab_size)  # past the end, where writes are dropped
    return jnp.zeros((len(place), vocab_size), bool).at[jnp.arange(len(place))[:, None], place].set(True, mode="drop")


def filtered(logits: jax.Array, sampling: Sampling, seen: jax.Array | None = None) -> jax.Array:
    """Returns the logits that the next token is drawn from: -inf for tokens that a filter forbids.

    Args:
        logits: float32[B, V].
        seen: bool[B, V] tokens of the prompt and of the answer so far; only a repetition penalty needs it.

    Returns:
        float32[B, V].
    """
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        # With top_k only the k likeliest need an order: no sort of the whole vocabulary.
        count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
        ordered = jax.lax.top_k(logits, count)[0]
        least = ordered[:, -1:]
        if sampling.top_p < 1:
            probabilities = jax.nn.softmax(ordered, axis=-1)
            kept = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
            least = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def row_keys(seeds: jax.Array | int, indices: jax.Array) -> jax.Array:
    """Returns a random key for each prompt: int[B] seeds or one for all, int[B] positions in the list -> key[B]."""
    seeds = jnp.broadcast_to(jnp.asarray(seeds), indices.shape)
    return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(seeds, indices)


def choose(
    logits: jax.Array, keys: jax.Array | None, steps: jax.Array | int, sampling: Sampling, seen: jax.Array | None = None
) -> jax.Array:
    """Chooses the next token of each row.

    Args:
        logits: float32[B, V].
        keys: key[B], one a row (see `row_keys`); not read when greedy.
        steps: int[B] or one for all: the number of this token in its answer.
        seen: as in `filtered`.

    Returns:
        int32[B].
    """
    logits = filtered(logits, sampling, seen)
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(steps), keys.shape))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
