"""Blockwise attention, and ring attention over rows that a mesh splits along the sequence (context parallelism).

Each device keeps its queries. Keys and values are passed around the ring of the devices that share a row, so that each
query meets each key. A running softmax needs the scores of one block only (Ring Attention, arXiv 2310.01889). The
backward pass goes around once more and recomputes the scores. No device holds an array of the size of a whole row, or
of its square.

Under a causal mask a late piece of a row sees far more keys than an early one. Queries, keys and values are therefore
redistributed before the ring: device i of n gets pieces i and 2n-1-i of 2n, so that all devices do equal work at every
turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, PartitionSpec

from mllm_jax.layers.splash import filled
from mllm_jax.sharding.logical import active_mesh, axes_of, partition_spec

BLOCK = 1024  # queries, and keys, compared at a time
LEAST = jnp.finfo(jnp.float32).min
_GROUPED = "b s (k g) h -> b s k g h"  # query heads grouped by their key head


@dataclass(frozen=True)
class RowSplit:
    """The mesh axes that split rows of the batch, positions along a row, query heads and key heads."""

    mesh: Mesh
    batch: tuple[str, ...]
    seq: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]

    @property
    def size(self) -> int:
        """Returns the number of devices that share a row."""
        return _size(self.mesh, self.seq)


@dataclass(frozen=True)
class _How:
    """Static facts of one ring.

    Attributes:
        turns: number of devices whose keys each device visits; fewer than all if a window ends sooner.
        skip: whether blocks in which no query sees a key are left out; correct only if each query sees itself.
        deal: whether halves of the rows' pieces are swapped; see `_deal`.
        q_block, k_block: queries and keys of a block.
    """

    axes: tuple[str, ...]
    size: int
    turns: int
    causal: bool
    skip: bool
    deal: bool
    q_block: int
    k_block: int


def row_split(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> RowSplit | None:
    """Returns how the surrounding `use_mesh` splits rows for attention from q [B, S, N, H] to k [B, T, K, H].

    Returns:
        None if it splits no rows, or if the number of queries or keys is not divisible: the partitioner then gathers
        what is split.
    """
    active = active_mesh()
    if active is None:
        return None
    mesh, rules = active
    q = partition_spec(("batch", "seq", "heads", None), q_shape, mesh, rules)
    k = partition_spec(("batch", "seq", "kv_heads", None), k_shape, mesh, rules)
    if q[1] is None or q[:2] != k[:2]:
        return None
    return RowSplit(mesh, *(axes_of(each) for each in (*q[:3], k[2])))


def context_attention(
    split: RowSplit,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: str = "full",
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    q_index: jax.Array | None = None,
    window: int | jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Computes `mllm_jax.layers.attention.attention` on rows split by `split`, with the same values and gradients.

    Positions are passed around with the keys, so that masks, windows and segments have the same meaning as on whole
    rows. A block of scores is left out if the causal mask, the window or the segments hide all of it. A `bias` is split
    by its queries and heads but whole along its keys: only its size still grows with S x T / devices on each device
    (T5's relative positions, the mask of ChatGLM-6B).

    Args:
        q, k, v, ...: whole, as `attention` takes them.
        block: queries, and keys, compared at a time.
    """
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    k, v, kv_heads, pick = _keys_beside(split, q.shape[2], k, v)
    same_rows = q_segments is k_segments and q_index is None and q.shape[1] == k.shape[1]
    queries, keys = (x.shape[1] // split.size for x in (q, k))
    deal = mask == "causal" and window is None and bias is None and same_rows and queries % 2 == 0
    turns = split.size
    if same_rows and isinstance(window, int):
        turns = min(turns, 1 + -(-(window - 1) // queries))
    blocks = (_block(n // 2 if deal else n, block) for n in (queries, keys))
    how = _How(split.seq, split.size, turns, mask == "causal", same_rows, deal, *blocks)

    rows = PartitionSpec(split.batch, split.seq)
    spec_q, spec_k = PartitionSpec(*rows, split.heads, None), PartitionSpec(*rows, kv_heads, None)
    more = dict(q_segments=q_segments, k_segments=k_segments, q_index=q_index, window=window, bias=bias)
    more = {name: jnp.asarray(x) for name, x in more.items() if x is not None}
    specs = {name: PartitionSpec() if name == "window" else rows for name in more}
    if bias is not None:
        spread = (axes if n > 1 else () for axes, n in zip((split.batch, split.heads), bias.shape[:2], strict=True))
        specs["bias"] = PartitionSpec(*spread, split.seq, None)
    if q_index is not None and q_index.shape[0] == 1:
        specs["q_index"] = PartitionSpec(None, split.seq)

    def local(q, k, v, more):
        if pick is not None:
            own = jax.lax.axis_index(split.heads) // pick
            k, v = (jax.lax.dynamic_slice_in_dim(x, own, 1, axis=2) for x in (k, v))
        segments = more.get("q_segments"), more.get("k_segments")
        q = rearrange(q, _GROUPED, k=k.shape[2])
        if deal:
            q, k, v, segments = jax.tree.map(partial(_deal, how), (q, k, v, segments))
        here = jax.lax.axis_index(split.seq)
        q_positions = more["q_index"] if "q_index" in more else _positions(how, here, queries)[None]
        y = _ring(how, q, k, v, more.get("bias"), (q_positions, *segments, more.get("window"), here))
        y = _deal(how, y, home=True) if deal else y
        return rearrange(y, "b s k g h -> b s (k g) h")

    # The specs say which values are equal on several devices; each device computes its own result.
    on_all = jax.shard_map(
        local,
        mesh=split.mesh,
        in_specs=(spec_q, spec_k, spec_k, specs),
        out_specs=spec_q,
        axis_names={*split.batch, *split.seq, *split.heads},
        check_vma=False,
    )
    return on_all(q, k, v, more)


def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: str = "full",
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    q_index: jax.Array | None = None,
    window: int | jax.Array | None = None,
    scale: float | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Computes `attention` in memory linear in the length (arXiv 2112.05682, 2205.14135), as a ring of one device.

    Blocks that the causal mask, the window or the segments hide are left out if each query sees itself. A query that
    sees no key gets a mean of some values.

    Args:
        q, k, v, ...: as `attention` takes them.
        block: queries, and keys, compared at a time.
    """
    (rows, queries), keys = q.shape[:2], k.shape[1]
    same_rows = q_segments is k_segments and q_index is None and queries == keys
    whole = [n if n <= block else -(-n // block) * block for n in (queries, keys)]
    if q_segments is None and whole != [queries, keys]:
        q_segments, k_segments = jnp.zeros((rows, queries), jnp.int32), jnp.zeros((rows, keys), jnp.int32)

    if q_segments is not None:  # padding is a segment that no text has
        q_segments, k_segments = filled(q_segments, whole[0], -1), filled(k_segments, whole[1], -1)
    positions = jnp.arange(whole[0])[None] if q_index is None else filled(q_index, whole[0])
    group = rearrange(filled(q * (q.shape[-1] ** -0.5 if scale is None else scale), whole[0]), _GROUPED, k=k.shape[2])
    how = _How((), 1, 1, mask == "causal", same_rows, False, *(min(n, block) for n in whole))
    here = jnp.int32(0)
    y = _ring(
        how, group, filled(k, whole[1]), filled(v, whole[1]), None, (positions, q_segments, k_segments, window, here)
    )
    return rearrange(y, "b s k g h -> b s (k g) h")[:, :queries]


def _keys_beside(split: RowSplit, num_heads: int, k, v):
    """Returns keys and values such that each device has those of its query heads.

    Returns:
        (k, v, the axes that split their heads, None or the number of neighbours on `heads` that share a whole head).
    """
    if split.kv_heads == split.heads:
        return k, v, split.heads, None
    group, here = num_heads // k.shape[2], num_heads // _size(split.mesh, split.heads)
    if not split.kv_heads and group % here == 0:
        return k, v, (), group // here
    return *(jnp.repeat(x, group, axis=2) for x in (k, v)), split.heads, None


def _deal(how: _How, x, home: bool = False):
    """Swaps halves of [B, S, ...] between devices, so that each has an early and a late half; `home` swaps them back.

    Device i of n holds halves 2i and 2i+1. Half h goes to the device j with h = j or h = 2n-1-j. The order of a
    device's two halves does not matter, since positions are passed along.
    """
    n = how.size

    def send(half, second):
        to = [(i, min(2 * i + second, 2 * n - 1 - (2 * i + second))) for i in range(n)]
        return jax.lax.ppermute(half, how.axes, [(b, a) for a, b in to] if home else to)

    return jnp.concatenate([send(half, i) for i, half in enumerate(jnp.split(x, 2, axis=1))], axis=1)


def _positions(how: _How, device, count: int):
    """Returns int[count]: the positions in the row of what device number `device` holds."""
    if not how.deal:
        return device * count + jnp.arange(count)
    half, last = jnp.arange(count // 2), 2 * how.size - 1
    early, late = device * (count // 2) + half, (last - device) * (count // 2) + half
    return jnp.where(device % 2 == 0, jnp.concatenate([early, late]), jnp.concatenate([late, early]))


# ---- the ring, as one device sees it


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how: _How, q, k, v, bias, facts):
    """Computes attention of this device's queries to the keys of all devices.

    Args:
        q: [B, S, K, G, H], scaled.  k, v: [B, T, K, H].
        bias: None, or float[B, N, S, all keys], where B and N may be 1.
        facts: positions int[B or 1, S] of the queries; segments int[B, S] and int[B, T] of queries and keys, or None
            twice; window or None; this device's number in the ring.
    """
    return _forward(how, q, k, v, bias, facts)[0]


def _forward(how: _How, q, k, v, bias, facts):
    q_position, q_segment, k_segment, window, here = facts
    fixed = (_cut(q, how.q_block), _cut_bias(bias, how.q_block), *_cut((q_position, q_segment), how.q_block))
    shape = (fixed[0].shape[0], q.shape[0], *q.shape[2:4], how.q_block)
    sums = jnp.full(shape, LEAST), jnp.zeros(shape), jnp.zeros((*shape, v.shape[-1]))

    def visit(sums, keys):
        def one(_, given):
            (q, bias, *q_side), sums = given

            def meet(sums, keys):
                k, v, *k_side = keys

                def add(sums):
                    top, total, y = sums
                    scores, _ = _scores(how, q, k, bias, (*q_side, *k_side, window))
                    new = jnp.maximum(top, scores.max(axis=-1))
                    p, keep = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
                    more = jnp.einsum("bkgst,btkh->bkgsh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
                    return new, total * keep + p.sum(axis=-1), y * keep[..., None] + more

                return _where_seen(how, (*q_side, *k_side, window), add, sums), None

            return None, jax.lax.scan(meet, sums, keys)[0]

        return jax.lax.scan(one, None, (fixed, sums))[1]

    sums, _ = _round(how, here, visit, sums, _cut((k, v, k_segment), how.k_block))
    top, total, y = sums
    y = rearrange(y / total[..., None], "c b k g s h -> b (c s) k g h").astype(q.dtype)
    return y, (q, k, v, bias, facts, y, top, total)


def _backward(how: _How, kept, dy):
    q, k, v, bias, facts, y, top, total = kept
    q_position, q_segment, k_segment, window, here = facts
    inner = (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(axis=-1)
    dy, inner = _cut((dy.astype(v.dtype), inner), how.q_block)
    inner = rearrange(inner, "c b s k g -> c b k g s 1")
    fixed = (_cut(q, how.q_block), _cut_bias(bias, how.q_block), *_cut((q_position, q_segment), how.q_block))
    fixed = (fixed, (dy, inner, top, total))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), fixed[0][:2])
    keys = _cut((k, v, k_segment), how.k_block)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), keys[:2])

    def visit(own, keys):
        def one(own, keys):
            (k, v, *k_side), sums = keys

            def meet(sums, given):
                ((q, bias, *q_side), (dy, inner, top, total)), own = given

                def add(found):
                    (dq, dbias), (dk, dv) = found
                    scores, seen = _scores(how, q, k, bias, (*q_side, *k_side, window))
                    p = jnp.exp(scores - top[..., None]) / total[..., None]
                    dp = jnp.einsum("bskgh,btkh->bkgst", dy, v, preferred_element_type=jnp.float32)
                    ds = p * (dp - inner)
                    ds = ds if seen is None else jnp.where(seen, ds, 0)
                    if bias is not None:
                        at, there = _columns(dbias, k_side[0])
                        dbias = jax.lax.dynamic_update_slice_in_dim(dbias, there + _like(ds, there), at, axis=-1)
                    ds, full = ds.astype(q.dtype), dict(preferred_element_type=jnp.float32)
                    dq = dq + jnp.einsum("bkgst,btkh->bskgh", ds, k, **full)
                    dk = dk + jnp.einsum("bkgst,bskgh->btkh", ds, q, **full)
                    dv = dv + jnp.einsum("bkgst,bskgh->btkh", p.astype(dy.dtype), dy, **full)
                    return (dq, dbias), (dk, dv)

                own, sums = _where_seen(how, (*q_side, *k_side, window), add, (own, sums))
                return sums, own

            sums, own = jax.lax.scan(meet, sums, (fixed, own))
            return own, sums

        return jax.lax.scan(one, own, keys)

    (dq, dbias), (dk, dv) = _round(how, here, visit, zeros, keys, sums)
    dq, dk, dv = (rearrange(x, "c b s ... -> b (c s) ...") for x in (dq, dk, dv))
    if bias is not None:
        dbias = rearrange(dbias, "c b n s t -> b n (c s) t").astype(bias.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None


_ring.defvjp(_forward, _backward)


def _round(how: _How, here, visit, own, keys, sums=None):
    """Passes keys to every device in turn, and returns what they have collected to their own device.

    Args:
        here: this device's number.
        visit: (own, (k, v, positions int[1, T], segments)) -> own, or, if keys collect sums, (own, (the same, sums)) ->
            (own, sums).
    """

    def meet(own, keys, sums, turn):
        k, v, segments = keys
        positions = _positions(how, (here - turn) % how.size, k.shape[0] * how.k_block)[None]
        keys = (k, v, _cut(positions, how.k_block), segments)
        return (visit(own, keys), None) if sums is None else visit(own, (keys, sums))

    def one(carry, turn):
        own, keys, sums = carry
        coming = _move(how, 1, keys)  # transferred while this device computes
        own, sums = meet(own, keys, sums, turn)
        return (own, coming, _move(how, 1, sums)), None

    (own, keys, sums), _ = jax.lax.scan(one, (own, keys, sums), jnp.arange(how.turns - 1))
    own, sums = meet(own, keys, sums, how.turns - 1)
    return own, _move(how, 1 - how.turns, sums)


def _move(how: _How, steps: int, tree):
    """Sends every device's arrays to the device `steps` further along the ring."""
    if steps % how.size == 0:
        return tree
    to = [(i, (i + steps) % how.size) for i in range(how.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, how.axes, to), tree)


def _scores(how: _How, q, k, bias, facts):
    """Returns a block's scores float32[B, K, G, s, t], LEAST where hidden, and what is visible (None: everything)."""
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        there = _columns(bias, facts[2])[1]
        heads = dict(k=q.shape[2]) if there.shape[1] > 1 else dict(k=1)
        scores = scores + rearrange(there, "b (k g) s t -> b k g s t", **heads)
    seen = visible(how.causal, *facts)
    return (scores, None) if seen is None else (jnp.where(seen, scores, LEAST), seen)


def visible(causal: bool, q_position, q_segment, k_position, k_segment, window):
    """Returns bool[B, 1, 1, S, T]: the keys that a query sees, given int[B or 1, S] and int[B or 1, T]; None: all."""
    seen = None
    if causal:
        distance = q_position[:, :, None] - k_position[:, None, :]
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if q_segment is not None:
        same = q_segment[:, :, None] == k_segment[:, None, :]
        seen = same if seen is None else seen & same
    return None if seen is None else seen[:, None, None]


def _where_seen(how: _How, facts, add, sums):
    """Returns add(sums), or sums unchanged if no query of the block sees a key of it."""
    if not how.skip:
        return add(sums)
    q_position, q_segment, k_position, k_segment, window = facts
    meets = jnp.bool_(True)
    if how.causal:
        meets &= k_position.min() <= q_position.max()
        if window is not None:
            meets &= q_position.min() - k_position.max() < window
    if q_segment is not None:
        low = jnp.maximum(q_segment.min(axis=1), k_segment.min(axis=1))
        meets &= (low <= jnp.minimum(q_segment.max(axis=1), k_segment.max(axis=1))).any()
    return jax.lax.cond(meets, add, lambda sums: sums, sums)


def _columns(bias, k_position):
    """Returns the index of a block's keys in a bias [B, N, s, all keys], and that part of the bias."""
    at = k_position[0, 0]
    return at, jax.lax.dynamic_slice_in_dim(bias, at, k_position.shape[1], axis=-1)


def _like(ds, bias):
    """Sums the gradient of the scores [B, K, G, s, t] to the shape of a bias [B, N, s, t]."""
    ds = rearrange(ds, "b k g s t -> b (k g) s t")
    return ds.sum(axis=[axis for axis in (0, 1) if bias.shape[axis] == 1], keepdims=True)


def _cut(tree, block: int):
    """Reshapes [B, S, ...] to [blocks, B, block, ...]."""
    return jax.tree.map(lambda x: rearrange(x, "b (c s) ... -> c b s ...", s=block), tree)


def _cut_bias(bias, block: int):
    """Reshapes [B, N, S, T] to [blocks, B, N, block, T]."""
    return None if bias is None else rearrange(bias, "b n (c s) t -> c b n s t", s=block)


def _block(length: int, most: int) -> int:
    """Returns the largest block of at most `most` that divides a length; the length itself if only tiny ones do."""
    fewest = -(-length // most)
    return next((length // n for n in range(fewest, 4 * fewest + 1) if length % n == 0), length)


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
