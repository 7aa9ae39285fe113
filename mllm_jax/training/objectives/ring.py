"""Contrastive sums over all pairs of a sharded batch: exact, with memory in proportion to one device's share of it.

Every device keeps its images. The texts travel round a ring of all devices, so that each text meets each image; a
chunk of their logits exists at a time. The backward pass goes round once more and recomputes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, PartitionSpec

NEVER = -1e9  # logit of a pair that is left out


@dataclass(frozen=True)
class RingPlan:
    """Settings of the sums.

    Attributes:
        kind: "softmax" or "sigmoid".
        chunk: number of texts whose logits exist at a time.
        mesh, axes: the mesh axes that split the rows; no axes: the rows are not split.
    """

    kind: str
    chunk: int
    mesh: Mesh | None = None
    axes: tuple[str, ...] = ()


class Texts(NamedTuple):
    """The part that travels: vectors, codes (see `pair_loss`) and the values that each text collects on its way."""

    vector: jax.Array
    code: jax.Array
    collected: tuple[jax.Array, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def pair_loss(plan: RingPlan, image, text, code, scale, bias):
    """Computes the loss of each image against all texts and of each text against all images, summed over real pairs.

    Args:
        image, text: float32[B, C, P]: pairs are at the same index.
        code: uint32[B, C, 2], equal for equal texts, which are no negatives of each other; 0, 0: no pair.
        scale, bias: of the similarity, float32 scalars.

    Returns:
        (float32 sum, float32 number of images that are closer to their own text than to any other).
    """
    return _forward(plan, image, text, code, scale, bias)[0]


def _forward(plan: RingPlan, image, text, code, scale, bias):
    def local(image, text, code, scale, bias):
        shape = code.shape[:2]
        image, text, code = (rearrange(x, "b c p -> (b c) p") for x in (image, text, code))
        there = _there(code)
        zeros, low = jnp.zeros(len(image)), jnp.full(len(image), NEVER)

        def meet(rows, texts: Texts, own):
            true, rival, *total = rows
            logits, _ = _logits(image, code, texts, own, scale, bias)
            true = true + jnp.where(own, logits, 0).sum(axis=1)
            rival = jnp.maximum(rival, jnp.where(own, NEVER, logits).max(axis=1))
            if plan.kind == "sigmoid":
                total = (total[0] + jax.nn.softplus(jnp.where(own, -logits, logits)).sum(axis=1),)
                return (true, rival, *total), texts
            total, collected = _add(*total, logits, axis=1), _add(*texts.collected, logits, axis=0)
            return (true, rival, *total), texts._replace(collected=collected)

        partial_sums = (zeros,) if plan.kind == "sigmoid" else (low, zeros)
        texts = Texts(text, code, () if plan.kind == "sigmoid" else (low, zeros))
        (true, rival, *total), texts = _round(plan, meet, (zeros, low, *partial_sums), texts)
        if plan.kind == "sigmoid":
            loss, normalisers = total[0], ()
        else:
            normalisers = tuple(largest + jnp.log(rest) for largest, rest in (total, texts.collected))
            loss = (normalisers[0] + normalisers[1]) / 2 - true
        sums = jnp.where(there, loss, 0).sum(), (there & (true > rival)).sum().astype(jnp.float32)
        if plan.axes:
            sums = jax.lax.psum(sums, plan.axes)
        return sums, tuple(x.reshape(shape) for x in normalisers)

    split, whole = PartitionSpec(plan.axes), PartitionSpec()
    outs = (whole, whole), () if plan.kind == "sigmoid" else (split, split)
    sums, normalisers = _spread(plan, local, 3, outs)(image, text, code, scale, bias)
    return sums, (image, text, code, scale, bias, *normalisers)


def _backward(plan: RingPlan, kept, cotangents):
    def local(image, text, code, *rest):
        *normalisers, scale, bias, weight = rest
        shape = image.shape
        image, text, code = (rearrange(x, "b c p -> (b c) p") for x in (image, text, code))
        weights = weight * _there(code)
        normalisers = [x.reshape(-1) for x in normalisers]

        def meet(rows, texts: Texts, own):
            d_image, d_bias = rows
            d_text, *others = texts.collected
            logits, allowed = _logits(image, code, texts, own, scale, bias)
            if plan.kind == "sigmoid":
                slope = weights[:, None] * jnp.where(allowed, jax.nn.sigmoid(logits) - own, 0)
            else:
                slope = weights[:, None] * (jnp.exp(logits - normalisers[0][:, None]) / 2 - own)
                slope += others[1] * jnp.exp(logits - others[0]) / 2
            d_text = d_text + slope.T @ image
            return (d_image + slope @ texts.vector, d_bias + slope.sum()), texts._replace(collected=(d_text, *others))

        others = () if plan.kind == "sigmoid" else (normalisers[1], weights)
        texts = Texts(text, code, (jnp.zeros_like(text), *others))
        (d_image, d_bias), texts = _round(plan, meet, (jnp.zeros_like(image), jnp.zeros(())), texts)
        d_scalars = (image * d_image).sum(), d_bias
        if plan.axes:
            d_scalars = jax.lax.psum(d_scalars, plan.axes)
        return (scale * d_image).reshape(shape), (scale * texts.collected[0]).reshape(shape), *d_scalars

    image, text, code, scale, bias, *normalisers = kept
    split, whole = PartitionSpec(plan.axes), PartitionSpec()
    spread = _spread(plan, local, 3 + len(normalisers), (split, split, whole, whole))
    d_image, d_text, d_scale, d_bias = spread(image, text, code, *normalisers, scale, bias, cotangents[0])
    return d_image, d_text, None, d_scale, d_bias


pair_loss.defvjp(_forward, _backward)


def _there(code):
    return code[:, 1] != 0


def _logits(image, code, texts: Texts, own, scale, bias):
    """Returns float32[n, m] of the images and a chunk of texts, NEVER for pairs left out; bool[n, m]: the others."""
    differ = (code[:, None] != texts.code[None]).any(axis=-1)
    allowed = own | (differ & _there(code)[:, None] & _there(texts.code)[None])
    return jnp.where(allowed, scale * (image @ texts.vector.T) + bias, NEVER), allowed


def _add(largest, total, logits, axis: int):
    """Adds exp(logits) to the sums over an axis, which are kept as (largest logit, sum relative to it)."""
    now = jnp.maximum(largest, logits.max(axis=axis))
    fresh = jnp.exp(logits - jnp.expand_dims(now, axis)).sum(axis=axis)
    return now, total * jnp.exp(largest - now) + fresh


def _spread(plan: RingPlan, local, num_split: int, out_specs):
    """Runs `local` on every device's rows: its first arguments are split, the others are scalars."""
    if not plan.axes:
        return local

    def on_all(*args):
        specs = (PartitionSpec(plan.axes),) * num_split + (PartitionSpec(),) * (len(args) - num_split)
        # jax need not check that outputs are equal on all devices: the sums above go over the axes.
        return jax.shard_map(local, mesh=plan.mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(*args)

    return on_all


def _round(plan: RingPlan, meet, rows, texts: Texts):
    """Moves the texts past every device, chunk by chunk, and back home.

    Args:
        meet: (rows, texts, own bool[n, m]) -> (rows, texts) with the values that both have collected.
    """
    n = len(texts.vector)
    count = -(-n // plan.chunk)
    width = -(-n // count)
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, count * width - n)] + [(0, 0)] * (x.ndim - 1)), texts)
    chunks = jax.tree.map(lambda x: x.reshape(count, width, *x.shape[1:]), padded)
    row, column = jnp.arange(n)[:, None], jnp.arange(width)[None]

    def visit(rows, chunks, at_home):
        def one(rows, given):
            start, texts = given
            return meet(rows, texts, at_home & (row == start + column))

        starts = jnp.arange(count) * width
        if count == 1:  # a loop would prevent fusion by the compiler
            rows, texts = one(rows, jax.tree.map(lambda x: x[0], (starts, chunks)))
            return rows, jax.tree.map(lambda x: x[None], texts)
        return jax.lax.scan(one, rows, (starts, chunks))

    devices = math.prod(plan.mesh.shape[axis] for axis in plan.axes) if plan.axes else 1
    if devices == 1:
        rows, chunks = visit(rows, chunks, True)
    else:
        ring = [(i, (i + 1) % devices) for i in range(devices)]

        def turn(carry, number):
            rows, chunks = visit(*carry, number == 0)
            return (rows, jax.tree.map(lambda x: jax.lax.ppermute(x, plan.axes, ring), chunks)), None

        (rows, chunks), _ = jax.lax.scan(turn, (rows, chunks), jnp.arange(devices))
    return rows, jax.tree.map(lambda x: x.reshape(count * width, *x.shape[2:])[:n], chunks)
