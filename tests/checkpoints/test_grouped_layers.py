"""Layers that repeat in groups: the hub numbers all layers; here each index in the group has its own parameters."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mllm_jax.checkpoints.hf import read_weights, write_weights
from mllm_jax.checkpoints.table import Table, Weight
from mllm_jax.errors import CheckpointError

TABLE = Table(
    (
        Weight("layers.{layer*2+0}.weight", "layers/first/kernel", "o i -> i o"),
        Weight("layers.{layer*2+1}.weight", "layers/second/kernel", "o i -> i o"),
        Weight("layers.{layer*2+0}.cross.weight", "layers/first/cross", "o i -> i o"),
    )
)
ABSTRACT = {
    "layers": {
        "first": {
            "kernel": jax.ShapeDtypeStruct((3, 4, 5), np.float32),
            "cross": jax.ShapeDtypeStruct((3, 4, 2), np.float32),
        },
        "second": {"kernel": jax.ShapeDtypeStruct((3, 4, 5), np.float32)},
    }
}


def stored() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {f"layers.{i}.weight": rng.normal(size=(5, 4)).astype(np.float32) for i in range(6)}
    return made | {f"layers.{i}.cross.weight": rng.normal(size=(2, 4)).astype(np.float32) for i in (0, 2, 4)}


def test_groups_both_ways(tmp_path):
    made = stored()
    save_file(made, tmp_path / "model.safetensors")
    params = read_weights(tmp_path, TABLE, ABSTRACT)
    for group in range(3):
        first, second = params["layers"]["first"], params["layers"]["second"]
        np.testing.assert_array_equal(first["kernel"][group], made[f"layers.{2 * group}.weight"].T)
        np.testing.assert_array_equal(first["cross"][group], made[f"layers.{2 * group}.cross.weight"].T)
        np.testing.assert_array_equal(second["kernel"][group], made[f"layers.{2 * group + 1}.weight"].T)
    write_weights(tmp_path / "again", TABLE, params)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == made.keys() and all((again[name] == made[name]).all() for name in made)


def test_a_layer_of_the_wrong_kind_is_named(tmp_path):
    made = stored()
    made["layers.1.cross.weight"] = made.pop("layers.2.cross.weight")
    save_file(made, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        read_weights(tmp_path, TABLE, ABSTRACT)
    assert "layers.1.cross.weight: unknown" in str(refusal.value)
    assert "layers.2.cross.weight: missing" in str(refusal.value)
