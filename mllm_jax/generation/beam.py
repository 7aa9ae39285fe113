"""Beam search as in transformers' `generate(num_beams=n)`, as one compiled loop.

A step looks at the best few of the num_beams * vocabulary continuations: enough that num_beams of them continue even
if all of the best end. Of the first num_beams, those that end join the finished beams, which are ordered by
log probability / length^penalty. A prompt is done when its best running beam, scored at its current length, is below
its worst finished beam.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import struct
from jax.sharding import Mesh

from mllm_jax.generation.decode_step import Batch, Steps, on_mesh
from mllm_jax.generation.sampling import penalise, seen_tokens

NEVER = -1e9  # below every score, and finite: it can be added to one


@struct.dataclass
class Beams:
    """B prompts with K running and K finished beams each.

    state: the model's, of B*K rows.  step: int32 tokens added.
    running, finished: int32[B, K, N].  running_scores: float32[B, K] log probabilities.
    finished_scores: float32[B, K].  finished_lengths: int32[B, K].  is_finished: bool[B, K].
    hopeful: bool[B], True if a running beam may still win.  seen: bool[B*K, V] or None.
    running_masses, finished_masses: float32[B, K] sums of the log of the probability that masks left over; 0 without.
    """

    state: Any
    step: jax.Array
    running: jax.Array
    running_scores: jax.Array
    finished: jax.Array
    finished_scores: jax.Array
    finished_lengths: jax.Array
    is_finished: jax.Array
    hopeful: jax.Array
    seen: jax.Array | None
    running_masses: jax.Array
    finished_masses: jax.Array


@struct.dataclass
class Rule:
    """length_penalty: float32.  early_stopping: bool. See `Options`."""

    length_penalty: jax.Array
    early_stopping: jax.Array


def beam_search(
    steps: Steps,
    mesh: Mesh | None,
    params: dict,
    batch: Batch,
    limits: jax.Array,
    stops: jax.Array,
    rule: Rule,
    *,
    room: int,
    new: int,
    beams: int,
    num_stops: int,
    repetition_penalty: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the best beam of each prompt; to be compiled.

    Args:
        limits, stops: see `Asked`.
        room, new: see `Program`.
        num_stops: the most end tokens of a prompt; more of them need more continuations.

    Returns:
        tokens int32[B, new], lengths int32[B], and log probabilities float32[B] among the tokens that may follow.
    """
    asked = dict(limits=limits, stops=stops, rule=rule, num_stops=num_stops, repetition_penalty=repetition_penalty)
    begun = begin_beams(steps, mesh, params, batch, **asked, room=room, new=new, beams=beams)
    return best_beam(advance_beams(steps, mesh, params, begun, new, **asked)[0], rule)


def begin_beams(
    steps: Steps,
    mesh: Mesh | None,
    params: dict,
    batch: Batch,
    *,
    limits: jax.Array,
    stops: jax.Array,
    rule: Rule,
    num_stops: int,
    repetition_penalty: float,
    room: int,
    new: int,
    beams: int,
) -> Beams:
    """Reads the prompts and adds the first token of each beam; see `beam_search`."""
    with on_mesh(mesh):
        logits, state = steps.prefill(params, batch, room)
        prompts = logits.shape[0]
        each = jnp.repeat(jnp.arange(prompts), beams)
        scores = jnp.full((prompts, beams), NEVER)
        start = Beams(
            state=steps.take(state, each),
            step=jnp.int32(0),
            running=jnp.zeros((prompts, beams, new), jnp.int32),
            # All beams begin equal: only the first may be continued.
            running_scores=scores.at[:, 0].set(0.0),
            finished=jnp.zeros((prompts, beams, new), jnp.int32),
            finished_scores=scores,
            finished_lengths=jnp.zeros((prompts, beams), jnp.int32),
            is_finished=jnp.zeros((prompts, beams), bool),
            hopeful=limits > 0,
            seen=seen_tokens(*steps.said(batch), logits.shape[1])[each] if repetition_penalty != 1 else None,
            running_masses=jnp.zeros((prompts, beams)),
            finished_masses=jnp.zeros((prompts, beams)),
        )
        how = dict(steps=steps, limits=limits, stops=stops, num_stops=num_stops, penalty=repetition_penalty, rule=rule)
        return _add(start, repeat(logits, "b v -> (b k) v", k=beams), **how)


def advance_beams(
    steps: Steps,
    mesh: Mesh | None,
    params: dict,
    begun: Beams,
    most: int | jax.Array,
    *,
    limits: jax.Array,
    stops: jax.Array,
    rule: Rule,
    num_stops: int,
    repetition_penalty: float,
) -> tuple[Beams, jax.Array]:
    """Adds tokens while a prompt is open and the beams have at most `most`; see `beam_search`.

    Returns:
        The beams, and bool[]: whether a prompt is open.
    """
    how = dict(steps=steps, limits=limits, stops=stops, num_stops=num_stops, penalty=repetition_penalty, rule=rule)

    def is_open(b):
        return (~_closed(b, rule)).any() & (b.step < limits.max())

    def body(b):
        last = jax.lax.dynamic_slice_in_dim(b.running, b.step - 1, 1, axis=2)
        logits, state = steps.step(params, b.state, rearrange(last, "b k 1 -> (b k)"))
        return _add(b.replace(state=state), logits, **how)

    with on_mesh(mesh):
        end = jax.lax.while_loop(lambda b: is_open(b) & (b.step <= most), body, begun)
        return end, is_open(end)


def best_beam(b: Beams, rule: Rule) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the tokens, the length and the log probability of each prompt's best beam."""
    lengths = b.finished_lengths[:, 0]
    total = b.finished_scores[:, 0] * lengths.astype(jnp.float32) ** rule.length_penalty
    return b.finished[:, 0], lengths, total - b.finished_masses[:, 0]


def _closed(b: Beams, rule: Rule) -> jax.Array:
    """Returns bool[B]: True where the finished beams are final."""
    return (b.is_finished.all(axis=1) & rule.early_stopping) | ~b.hopeful


def _add(b: Beams, logits, *, steps: Steps, limits, stops, num_stops: int, penalty: float, rule: Rule) -> Beams:
    """Adds a token to each running beam."""
    prompts, beams = b.running_scores.shape
    logprobs = logits if steps.masked else jax.nn.log_softmax(logits)
    masses = b.running_masses
    if steps.masked:
        masses += rearrange(jax.nn.logsumexp(logits, axis=-1), "(b k) -> b k", k=beams)
    if b.seen is not None:
        logprobs = penalise(logprobs, b.seen, penalty)
    vocab = logprobs.shape[-1]
    total = rearrange(logprobs, "(b k) v -> b k v", k=beams) + b.running_scores[:, :, None]
    scores, place = jax.lax.top_k(rearrange(total, "b k v -> b (k v)"), max(2, 1 + num_stops) * beams)
    parent, token = place // vocab, (place % vocab).astype(jnp.int32)
    continued = jax.lax.dynamic_update_slice_in_dim(
        jnp.take_along_axis(b.running, parent[:, :, None], axis=1), token[:, :, None], b.step, axis=2
    )
    length = b.step + 1
    ends = (token[:, :, None] == stops[:, None]).any(axis=-1) | (length >= limits)[:, None]

    # Continuations that ended join the finished beams; those after the first num_beams can only continue.
    joins = ends & (jnp.arange(ends.shape[1]) < beams)
    new_scores = scores / length.astype(jnp.float32) ** rule.length_penalty
    new_scores = new_scores + NEVER * _closed(b, rule)[:, None] + NEVER * ~joins
    merged_scores = jnp.concatenate([b.finished_scores, new_scores], axis=1)
    finished_scores, best = jax.lax.top_k(merged_scores, beams)

    def keep(old, new):
        merged = jnp.concatenate([old, jnp.broadcast_to(new, old.shape[:1] + ends.shape[1:] + old.shape[2:])], axis=1)
        return jnp.take_along_axis(merged, best.reshape(best.shape + (1,) * (old.ndim - 2)), axis=1)

    is_finished = keep(b.is_finished, joins)
    masses = jnp.take_along_axis(masses, parent, axis=1)
    finished_masses = keep(b.finished_masses, masses)

    # The best that did not end continue.
    running_scores, on = jax.lax.top_k(scores + NEVER * ends, beams)
    parent = jnp.take_along_axis(parent, on, axis=1)
    running = jnp.take_along_axis(continued, on[:, :, None], axis=1)
    running_masses = jnp.take_along_axis(masses, on, axis=1)
    chosen = rearrange(parent + beams * jnp.arange(prompts)[:, None], "b k -> (b k)")
    seen = None
    if b.seen is not None:
        token = rearrange(jnp.take_along_axis(token, on, axis=1), "b k -> (b k)")
        seen = b.seen[chosen].at[jnp.arange(prompts * beams), token].set(True)
    possible = running_scores[:, 0] / length.astype(jnp.float32) ** rule.length_penalty
    worst = jnp.where(is_finished, finished_scores.min(axis=1, keepdims=True), NEVER)
    return Beams(
        state=steps.exchange(b.state, chosen),
        step=length,
        running=running,
        running_scores=running_scores,
        finished=keep(b.finished, continued),
        finished_scores=finished_scores,
        finished_lengths=keep(b.finished_lengths, length),
        is_finished=is_finished,
        hopeful=b.hopeful & (possible[:, None] > worst).any(axis=1),
        seen=seen,
        running_masses=running_masses,
        finished_masses=finished_masses,
    )
