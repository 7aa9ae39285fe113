"""The native model folder: config and parameters come back equal, on any mesh, or the folder is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from toy_hub import SHAPES, abstract, nest, parameters

from mllm_jax.checkpoints.leaves import flatten
from mllm_jax.checkpoints.native import is_native, read_native, read_native_config, write_native
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.sharding.mesh import MeshConfig, make_mesh

CONFIG = DecoderConfig(vocab_size=16, hidden_size=8, num_heads=2, num_kv_heads=1)


@pytest.fixture
def folder(tmp_path):
    beside = tmp_path / "beside"
    beside.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "notes.txt", "modeling_x.py"):
        (beside / name).write_text(name)
    write_native(tmp_path / "model", CONFIG, jax.tree.map(jax.numpy.asarray, nest(parameters())), companions=beside)
    return tmp_path / "model"


def same(tree, dtype=np.float32) -> None:
    found = flatten(tree)[0]
    expected = parameters(dtype)
    assert found.keys() == expected.keys()
    assert all(leaf.dtype == dtype and np.array_equal(leaf, expected[path]) for path, leaf in found.items())


def test_it_comes_back(folder):
    assert is_native(folder) and not is_native(folder.parent)
    assert read_native_config(folder) == CONFIG
    same(read_native(folder, abstract()))
    assert {p.name for p in folder.iterdir()} == {
        *("model.json", "params", "tokenizer.json", "chat_template.jinja", "generation_config.json")
    }
    assert (folder / "tokenizer.json").read_text() == "tokenizer.json"


def test_it_comes_back_on_a_mesh_and_keeps_its_dtype(tmp_path, devices):
    write_native(tmp_path / "half", CONFIG, jax.tree.map(jax.numpy.asarray, nest(parameters(np.float16))))
    params = read_native(tmp_path / "half", abstract(), mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
    same(params, np.float16)
    assert params["layers"]["q"]["kernel"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)
    assert params["layers"]["q"]["kernel"].addressable_shards[0].data.shape == (3, 2, 2, 4)


def test_a_taken_name_is_refused_and_a_model_replaced_only_on_request(folder):
    params = jax.tree.map(jax.numpy.asarray, nest(parameters(np.float16)))
    with pytest.raises(CheckpointError, match="is not empty"):
        write_native(folder, CONFIG, params)
    same(read_native(folder, abstract()))
    write_native(folder, CONFIG, params, overwrite=True)
    same(read_native(folder, abstract()), np.float16)
    assert not list(folder.parent.glob("model.*")), "something remains"


def test_a_config_that_is_no_plain_data_writes_nothing(tmp_path):
    with pytest.raises(ConfigError):
        write_native(tmp_path / "model", object(), nest(parameters()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"format": 2, "config": {}}',
        '{"format": 1}',
        '{"format": 1, "config": {"class": "os:x"}}',
    ],
)
def test_a_damaged_config_is_refused(folder, text):
    (folder / "model.json").unlink() if text is None else (folder / "model.json").write_text(text)
    with pytest.raises((CheckpointError, ConfigError)) as refusal:
        read_native_config(folder)
    assert refusal.value.todo and ("model.json" in refusal.value.given or "os:x" in refusal.value.given)


def test_another_config_version_names_what_it_does_not_know(folder):
    stored = json.loads((folder / "model.json").read_text())
    stored["config"]["quantum"] = 1
    (folder / "model.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="quantum"):
        read_native_config(folder)


def test_a_flipped_bit_is_noticed(folder):
    path = max((p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="corrupt"):
        read_native(folder, abstract())


def test_a_missing_file_and_another_module_are_noticed(folder):
    other = abstract()
    other["head"]["bias"] = other["patch"].pop("bias")
    with pytest.raises(CheckpointError, match=r"(?s)head/bias: absent.*patch/bias") as refusal:
        read_native(folder, other)
    assert f"2 of {len(SHAPES) + 1} leaves" in refusal.value.given
    (folder / "params" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        read_native(folder, abstract())
