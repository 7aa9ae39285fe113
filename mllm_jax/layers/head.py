"""The output head: from a language model's last hidden states to logits, and its loss in chunks."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.sharding.cpu import check_sum
from mllm_jax.sharding.fsdp import GatherPlan, gather, gather_plan, row_axes, scatter_sum, with_gathered
from mllm_jax.sharding.logical import active_mesh, constrain, split_sizes


@struct.dataclass
class HeadInputs:
    """The last hidden states of a language model, and the matrix that maps them to logits.

    Attributes:
        x: dtype[B, S, E], after the last norm and all scaling.
        matrix: float32[E, V], or [V, E] if it is the token embedding table.
        tied: whether the matrix is the embedding table.
    """

    x: jax.Array
    matrix: jax.Array
    tied: bool = struct.field(pytree_node=False, default=False)

    @property
    def names(self) -> tuple[str, str]:
        """Returns the logical names of the matrix's dimensions."""
        return ("vocab", "embed") if self.tied else ("embed", "vocab")

    @property
    def vocab_size(self) -> int:
        return self.matrix.shape[0 if self.tied else 1]

    def logits(self) -> jax.Array:
        """Returns float32[B, S, V]."""
        product = partial(_product, tied=self.tied)
        logits = with_gathered(product, self.x, self.matrix, self.names, self.x.dtype)
        return constrain(logits.astype(jnp.float32), "batch", "seq", "vocab")


def head_inputs(x: jax.Array, embedding: Embedding, linear: Linear | None) -> HeadInputs:
    """Returns the inputs of a head that is a linear map without bias, or, if it is None, the embedding table."""
    matrix = embedding.embedding if linear is None else linear.get_variable("params", "kernel")
    return HeadInputs(x, matrix, tied=linear is None)


def _product(x, matrix, *, tied: bool, **how):
    return jax.lax.dot_general(x, matrix, (((x.ndim - 1,), (1 if tied else 0,)), ((), ())), **how)


class Scores(NamedTuple):
    """Sums over all positions: of weight * loss, of weight where no logit is above the target's, and of weight."""

    loss: jax.Array
    right: jax.Array
    weight: jax.Array


def logits_bytes(head: HeadInputs) -> int:
    """Returns the bytes of the float32 logits that one device would hold at a time."""
    shape = (*head.x.shape[:2], head.vocab_size)
    return 4 * math.prod(shape) // math.prod(split_sizes(("batch", "seq", "vocab"), shape))


def head_cross_entropy(head: HeadInputs, targets: jax.Array, weights: jax.Array, z_loss: float, chunks: int) -> Scores:
    """Computes the cross-entropy of a head in chunks: the logits of all positions never exist together.

    The gradient is computed in the same pass, so nothing is computed twice. Only `loss` has a gradient. Positions with
    a weight come first in the chunks; chunks without any are left out.

    Args:
        targets: int[B, S].  weights: float32[B, S].
        z_loss: weight of log(Z)^2.
        chunks: number of pieces that each device's positions are cut into.
    """
    return Scores(*_scores(head.x, head.matrix, targets, weights, (head.tied, head.names, z_loss, chunks)))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scores(x, matrix, targets, weights, how):
    return _on_mesh(x, matrix, targets, weights, how, ())


def _forward(x, matrix, targets, weights, how):
    wanted = tuple(name for name, each in (("x", x), ("matrix", matrix)) if each.perturbed)
    values = (each.value for each in (x, matrix, targets, weights))
    loss, right, weight, *gradients = _on_mesh(*values, how, wanted)
    return (loss, right, weight), dict(zip(wanted, gradients, strict=True))


def _backward(how, gradients, cotangents):
    slope = cotangents[0]
    if isinstance(slope, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    found = {name: (slope * gradient).astype(gradient.dtype) for name, gradient in gradients.items()}
    return found.get("x"), found.get("matrix"), None, None


_scores.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_mesh(x, matrix, targets, weights, how, wanted):
    """Returns (loss, right, weight, and the gradients in `wanted`); every device computes its own rows."""
    tied, names, z_loss, chunks = how
    local = partial(_local, tied=tied, z_loss=z_loss, chunks=chunks, wanted=wanted)
    active = active_mesh()
    if active is None:
        return local(x, matrix, targets, weights, rows=(), gathered=(), dim=0)
    plan = gather_plan(matrix.shape, names, x.shape) or GatherPlan(active[0], row_axes(x.shape), (), 0)
    # The positions of a row stay split as they are; a mesh axis splits one dimension only.
    context = plan.mesh.shape["context"]
    along = ("context",) if "context" not in plan.rows and context > 1 and x.shape[1] % context == 0 else ()
    if not plan.rows + along:
        return local(x, matrix, targets, weights, rows=(), gathered=(), dim=0)
    rows, whole = PartitionSpec(plan.rows, *along), PartitionSpec()
    shard = plan.shard if plan.gathered else whole
    return jax.shard_map(
        partial(local, rows=(*plan.rows, *along), gathered=plan.gathered, dim=plan.dim),
        mesh=plan.mesh,
        in_specs=(rows, shard, rows, rows),
        out_specs=(whole, whole, whole, *({"x": rows, "matrix": shard}[name] for name in wanted)),
        axis_names=frozenset((*plan.rows, *along)),
        check_vma=False,
    )(x, matrix, targets, weights)


def _local(x, matrix, targets, weights, *, tied, z_loss, chunks, wanted, rows, gathered, dim):
    dtype, shape = x.dtype, x.shape
    whole = matrix.astype(dtype)
    whole = gather(whole, gathered, dim) if gathered else whole
    count = math.prod(targets.shape)
    chunks = min(chunks, count)
    size = -(-count // chunks)
    # Positions that carry loss come first: chunks without any, as most of images and questions, are not computed. All
    # devices compute as many chunks as the device that needs most.
    flat = weights.reshape(count)
    order = jnp.argsort(flat == 0, stable=True)
    needed = -(-(flat != 0).sum() // size)
    if rows:
        # This maximum depends on x, so that no device can start it before the collectives that compute x: CPU devices
        # run independent collectives in any order, and would then wait for each other forever.
        needed = jax.lax.pmax(jnp.where(jnp.isnan(x[0, 0, 0]), chunks, needed), rows)

    def cut(each, width=()):
        each = each.reshape(count, *width)[order]
        each = jnp.pad(each, [(0, chunks * size - count)] + [(0, 0)] * len(width))
        return each.reshape(chunks, size, *width)

    def compute(carry, chunk):
        loss, right, slope = carry
        x, targets, weights = chunk
        logits = _product(x, whole, tied=tied, preferred_element_type=jnp.float32)
        highest = logits.max(axis=-1, keepdims=True)
        raised = jnp.exp(logits - highest)
        total = raised.sum(axis=-1, keepdims=True)
        log_z = (highest + jnp.log(total))[:, 0]
        here = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
        chosen = jnp.where(here, logits, 0).sum(axis=-1)
        loss += (weights * (log_z - chosen + z_loss * jnp.square(log_z))).sum()
        right += (weights * (chosen >= highest[:, 0])).sum()
        dx = None
        if wanted:
            scale = weights * (1 + 2 * z_loss * log_z)
            dlogits = raised * (scale[:, None] / total) - jnp.where(here, weights[:, None], 0)
            dlogits = dlogits.astype(dtype)
        if "x" in wanted:
            dx = _product(dlogits, whole, tied=not tied)
        if "matrix" in wanted:
            pair = (dlogits, x) if tied else (x, dlogits)
            slope += jax.lax.dot_general(*pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (loss, right, slope), dx

    def skip(carry, chunk):
        return carry, jnp.zeros_like(chunk[0]) if "x" in wanted else None

    def body(carry, numbered):
        number, chunk = numbered
        return jax.lax.cond(number < needed, compute, skip, carry, chunk)

    zero = jnp.float32(0)
    start = zero, zero, jnp.zeros(whole.shape, jnp.float32) if "matrix" in wanted else None
    xs = jnp.arange(chunks), (cut(x, shape[-1:]), cut(targets), cut(weights))
    (loss, right, slope), dx = jax.lax.scan(body, start, xs)
    out = [loss, right, weights.sum()]
    if rows:
        out = list(jax.lax.psum(tuple(out), rows))
    if "x" in wanted:
        out.append(dx.reshape(-1, shape[-1])[jnp.argsort(order)].reshape(shape))
    if "matrix" in wanted:
        # Communicated in the dtype that the model computes in, like every other gradient.
        others = tuple(axis for axis in rows if axis not in gathered)
        if rows:
            check_sum(dtype, active_mesh()[0])
        slope = scatter_sum(slope.astype(dtype), gathered, dim) if gathered else slope
        slope = jax.lax.psum(slope.astype(dtype), others) if others else slope
        out.append(slope.astype(jnp.float32))
    return tuple(out)
