"""Fingerprints of weights: one number per leaf, the same on every mesh."""

from __future__ import annotations

import hashlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.checkpoints.leaves import PyTree, dtype_of, flatten, listed, storable
from mllm_jax.errors import CheckpointError
from mllm_jax.sharding.hosts import fetch


def fingerprint(params: PyTree) -> dict[str, int]:
    """Computes a 32-bit checksum of each leaf's bits, dtype and shape: path -> uint32, for any sharding and platform.

    It is computed on the leaf's devices, as a wrap-around sum over elements of a hash of (bits, position), so nothing
    is gathered. It detects accidents (other weights, a swapped or shifted leaf), not attacks.
    """
    leaves = storable(flatten(params)[0])
    sums = {path: _checksum(leaf, np.uint32(_salt(leaf))) for path, leaf in leaves.items()}
    return {path: int(value) for path, value in jax.device_get(sums).items()}


def short_fingerprint(params: PyTree) -> str:
    """Returns 16 characters that depend on every bit of the parameters, for metadata.

    The bytes are read on the host, which needs no compilation: a drawing takes it once for each model.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(storable(flatten(params)[0]).items()):
        # A copy, because JAX keeps the host's copy of an array as long as the array exists.
        array = fetch(jnp.copy(leaf)) if isinstance(leaf, jax.Array) else np.asarray(leaf)
        crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        digest.update(f"{path} {array.dtype}{list(array.shape)} {crc:08x}\n".encode())
    return digest.hexdigest()[:16]


def check_fingerprint(params: PyTree, expected: dict[str, int], source: str, **refusal: str) -> None:
    """Raises CheckpointError for weights with another fingerprint than `expected`; see `compare_fingerprints`."""
    compare_fingerprints(fingerprint(params), expected, source, **refusal)


def compare_fingerprints(
    actual: dict[str, int],
    expected: dict[str, int],
    source: str,
    *,
    wanted: str = "the same weights that the checkpoint was trained with",
    todo: str = "put them back, or start over with --fresh",
) -> None:
    """Compares fingerprints, leaf by leaf.

    Args:
        source: name of the weights of `actual`, such as "the frozen weights beside stage align".
        wanted, todo: the other two parts of the error.

    Raises:
        CheckpointError: leaves differ; names at most ten and gives their number.
    """
    wrong = []
    for path in sorted(actual.keys() | expected.keys()):
        if path not in expected:
            wrong.append(f"{path}: unknown")
        elif path not in actual:
            wrong.append(f"{path}: absent")
        elif actual[path] != expected[path]:
            wrong.append(f"{path}: {actual[path]:08x}, expected {expected[path]:08x}")
    if wrong:
        total = len(actual.keys() | expected.keys())
        raise CheckpointError(f"{source}: {len(wrong)} of {total} leaves differ{listed(wrong)}", wanted, todo)


def _salt(leaf: object) -> int:
    return zlib.crc32(f"{dtype_of(leaf)}{tuple(np.shape(leaf))}".encode())


def _mix(x: jax.Array) -> jax.Array:
    """Applies a bijection of uint32 that mixes every bit (the finaliser of MurmurHash3, Appleby, public domain)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def _checksum(x: jax.Array, salt: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        width = min(x.dtype.itemsize * 8, 32)  # 64-bit leaves become two words in a new last axis
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    position, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):  # no reshape: it would gather a sharded leaf
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    # A plain weighted sum would miss swaps of floats whose low bits are zero; hashing each term does not.
    return _mix(jnp.sum(_mix(bits ^ _mix(position + np.uint32(0x9E3779B9))), dtype=jnp.uint32) ^ salt)
