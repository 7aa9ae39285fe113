"""A fingerprint is the same on every mesh and changes with every bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax.checkpoints.training import check_fingerprint, fingerprint
from mllm_jax.errors import CheckpointError


def test_fingerprint_is_the_same_on_every_sharding():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    devices = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint32, jnp.int8, jnp.bool_):
        x = jax.random.randint(jax.random.key(0), (16, 6, 4), -100, 100).astype(dtype)
        expected = fingerprint({"x": x})
        assert expected == fingerprint({"x": np.asarray(x)})
        for spec in (P("data"), P("tensor", None, "data"), P(None, "tensor"), P(("data", "tensor")), P()):
            assert fingerprint({"x": jax.device_put(x, NamedSharding(devices, spec))}) == expected
    assert fingerprint({"a": {"b": [jnp.float32(0)]}}).keys() == {"a/b/0"}


def test_fingerprint_sees_every_small_change():
    x = np.array(jax.random.normal(jax.random.key(0), (300, 256)).astype(jnp.bfloat16).astype(jnp.float32))
    flipped, swapped = x.copy(), x.copy()
    flipped.view(np.uint32)[17, 3] ^= 1
    swapped.reshape(-1)[[0, 65536]] = swapped.reshape(-1)[[65536, 0]]  # low bits all zero, a difference of 2**16
    negative_zero = np.zeros((2, 2), np.float32), np.full((2, 2), -0.0, np.float32)
    variants = [
        x,
        flipped,
        swapped,
        x[::-1],
        x.reshape(256, 300),
        x.view(np.int32),
        x.astype(jnp.bfloat16),
        *negative_zero,
    ]
    sums = [fingerprint({"x": v})["x"] for v in variants]
    assert len(set(sums)) == len(sums) and all(0 <= s < 2**32 for s in sums)


def test_check_fingerprint_counts_all_and_names_ten():
    params = {f"p{i:02d}": jnp.full(4, i) for i in range(20)}
    expected = fingerprint(params)
    check_fingerprint(params, expected, "snapshot align")
    changed = {**{k: v + 1 for k, v in params.items()}, "new": jnp.ones(1)}
    del changed["p03"]
    with pytest.raises(CheckpointError) as caught:
        check_fingerprint(changed, expected, "snapshot align")
    text = str(caught.value)
    assert (
        "21 of 21" in text
        and "snapshot align" in text
        and "… and 11 more" in text
        and text.count(", expected ") == 8
        and "p03: absent" in text
    )
