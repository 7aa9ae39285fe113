"""Golden shardings of the shipped models at their real sizes on a mesh of 256 devices; nothing is allocated.

A line is a parameter: each dimension's size and mesh axes. If a change is intended: `UPDATE_GOLDENS=1 pytest
tests/sharding/test_config_goldens.py`, then read the diff of goldens/configs/.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import jax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh

from mllm_jax.models.registry import abstract_init
from mllm_jax.sharding.logical import AXES, data_parallel
from mllm_jax.sharding.mesh import param_shardings

ROOT = Path(__file__).parents[2]
GOLDENS = Path(__file__).parent / "goldens" / "configs"
CONFIGS = ("llava15_7b", "internvl3_8b", "qwen25vl_7b", "instructblip_vicuna7b")
MESH = AbstractMesh((1, 64, 1, 4), AXES)


def boxed_params(name: str):
    """Returns the shapes of the model's parameters with their logical names."""
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"golden_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.model().make()
    return abstract_init(model, model.config.batch_spec().empty(), method="touch")


def lines(boxed, parts=()) -> dict[str, str]:
    """Returns {path: "4096/fsdp x 11008/tensor"}."""
    shapes, places = (
        jax.tree.leaves_with_path(nn.meta.unbox(boxed)),
        jax.tree.leaves(param_shardings(boxed, MESH, parts)),
    )
    found = {}
    for (path, leaf), sharding in zip(shapes, places, strict=True):
        spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
        sizes = [
            f"{n}/{'+'.join([a] if isinstance(a, str) else a)}" if a else str(n)
            for n, a in zip(leaf.shape, spec, strict=True)
        ]
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = " x ".join(sizes)
    return found


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    return request.param, boxed_params(request.param)


def test_shardings_are_the_golden_ones(case):
    name, boxed = case
    found, file = lines(boxed), GOLDENS / f"{name}.json"
    if os.environ.get("UPDATE_GOLDENS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert file.is_file(), f"{file.name} is missing: run once with UPDATE_GOLDENS=1"
    golden = json.loads(file.read_text())
    changed = {p: (golden.get(p), found.get(p)) for p in golden.keys() | found.keys() if golden.get(p) != found.get(p)}
    assert not changed, "path: (golden, now)\n" + "\n".join(f"{path}: {pair}" for path, pair in sorted(changed.items()))


def test_little_is_held_by_every_device(case):
    """Checks that only norms, biases and tables are whole on each of 256 devices: below 1 % of all parameters."""
    _, boxed = case
    leaves, places = jax.tree.leaves(nn.meta.unbox(boxed)), jax.tree.leaves(param_shardings(boxed, MESH))
    whole = sum(leaf.size for leaf, place in zip(leaves, places, strict=True) if not any(place.spec))
    assert whole < 0.01 * sum(leaf.size for leaf in leaves)


def test_a_data_parallel_encoder_has_no_tensor_axis_and_leaves_the_rest_alone(case):
    _, boxed = case
    before, after = lines(boxed), lines(boxed, (data_parallel("encoder_image"),))
    tower = {path for path in before if path.startswith("encoder_image/")}
    assert any("/tensor" in before[path] for path in tower)
    assert not any("tensor" in after[path] for path in tower)
    assert {p: x for p, x in after.items() if p not in tower} == {p: x for p, x in before.items() if p not in tower}
    assert {path: x.replace("/tensor", "") for path, x in before.items() if path in tower} == {
        path: x for path, x in after.items() if path in tower
    }
