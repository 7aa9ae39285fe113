"""safetensors files against the reference library, and all kinds of damage."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_hub import write_raw

from mllm_jax.checkpoints.components import Component
from mllm_jax.checkpoints.safetensors_files import (
    DTYPES,
    Spec,
    copy_into,
    file_names,
    plan_files,
    read_folder,
    read_header,
    write_file,
)
from mllm_jax.errors import CheckpointError

SINGLE, INDEX = file_names(Component(Path()))


def refused(call, *arguments) -> str:
    with pytest.raises(CheckpointError) as refusal:
        call(*arguments)
    assert refusal.value.expected and refusal.value.todo
    return str(refusal.value)


# ---- a whole file


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tensors_are_mapped_as_the_library_wrote_them(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tensors = {
        f"t{i}": rng.normal(size=shape).astype(dtype) for i, shape in enumerate([(), (3,), (0, 4), (5, 7), (2, 3, 4)])
    }
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    entries = read_folder(tmp_path)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = entries[name].map()
        assert found.dtype == dtype and found.shape == tensor.shape and found.tobytes() == tensor.tobytes()
        assert not (found.size and found.flags.writeable)


def test_the_library_reads_what_is_written(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"b": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16), "a": rng.normal(size=(7,)).astype(np.float32)}
    specs = {name: Spec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    ((name, specs),) = plan_files(specs, 10**9).items()
    assert name == SINGLE and list(specs) == ["a", "b"], "wide dtypes first, so that none is misaligned"
    write_file(tmp_path / name, specs, (np.asfortranarray(tensors[n]) for n in specs))
    found = load_file(tmp_path / name)
    assert {n: (t.dtype, t.tobytes()) for n, t in found.items()} == {
        n: (t.dtype, t.tobytes()) for n, t in tensors.items()
    }
    header = (tmp_path / name).read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}
    assert int.from_bytes(header[:8], "little") % 8 == 0


def test_a_tensor_of_another_shape_than_planned_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="a: float32"):
        write_file(tmp_path / SINGLE, {"a": Spec(np.dtype("f4"), (2,))}, [np.zeros(3, np.float32)])


@pytest.mark.parametrize(
    "limit,expected",
    [
        (100, [["a", "b", "c"]]),
        (59, [["a", "b"], ["c"]]),
        (40, [["a", "b"], ["c"]]),
        (30, [["a"], ["b"], ["c"]]),
        (1, [["a"], ["b"], ["c"]]),
    ],
)
def test_files_stay_below_the_limit_where_they_can(limit, expected):
    files = plan_files({name: Spec(np.dtype("f4"), (5,)) for name in "abc"}, limit)
    assert [list(part) for part in files.values()] == expected
    count = len(expected)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert list(files) == ([SINGLE] if count == 1 else names)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
@pytest.mark.parametrize("shape", [(3, 40, 5), (1, 17, 33), (20, 1, 1), (0, 2, 3)])
def test_copying_along_other_axes_moves_every_number(shape, axes):
    view = np.arange(np.prod(shape), dtype=np.float32).reshape(shape).transpose(axes)
    out = np.full(view.shape, -1, ml_dtypes.bfloat16)
    copy_into(out, view)
    assert np.array_equal(out, view.astype(ml_dtypes.bfloat16))


# ---- damage

F4 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "truncated": ({"a": F4}, bytes(7), None, "7[0-9] bytes: truncated"),
    "longer": ({"a": F4}, bytes(9), None, "longer than its header says"),
    "gap": ({"a": F4 | {"data_offsets": [4, 12]}}, bytes(12), None, "leave a gap"),
    "hole": ({"a": F4, "b": F4 | {"data_offsets": [12, 20]}}, bytes(20), None, "bytes of b leave a gap"),
    "overlap": ({"a": F4, "b": F4 | {"data_offsets": [4, 12]}}, bytes(12), None, "bytes of b overlap"),
    "past the end": ({"a": F4, "b": F4 | {"data_offsets": [8, 16]}}, bytes(10), None, "truncated"),
    "reversed": ({"a": F4 | {"data_offsets": [8, 0]}}, bytes(8), None, "a: -8 bytes|not whole numbers"),
    "size": ({"a": F4 | {"shape": [3]}}, bytes(8), None, r"8 bytes for F32\[3\]"),
    "negative": ({"a": F4 | {"shape": [-2], "data_offsets": [0, -8]}}, b"", None, "not whole numbers"),
    "fraction": ({"a": F4 | {"shape": [2.0]}}, bytes(8), None, "not whole numbers"),
    "dtype": ({"a": F4 | {"dtype": "F33"}}, bytes(8), None, "a has the unknown dtype 'F33'"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), None, "KeyError: 'dtype'"),
    "three offsets": ({"a": F4 | {"data_offsets": [0, 4, 8]}}, bytes(8), None, "too many values"),
    "json": (b'{"a": ', b"", None, "the header of .*: Expecting value"),
    "list": (b"[]", b"", None, "the header of .* with a list"),
    "twice": (b'{"a": 1, "a": 2}', b"", None, "a name that occurs twice"),
    "bytes": (b"\xff\xfe\x00", b"", None, "the header of .*: .* codec"),
    "long header": ({"a": F4}, bytes(8), 2**60, "with a header of"),
}


@pytest.mark.parametrize("header,data,length,message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_by_its_header(tmp_path, header, data, length, message):
    write_raw(tmp_path / SINGLE, header, data, length)
    given = refused(read_folder, tmp_path)
    assert SINGLE in given and "fetch the file again" in given
    assert re.search(message, given), given


def test_every_cut_of_a_file_is_refused(tmp_path):
    save_file({"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float32)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    assert len(read_header(tmp_path / "whole")) == 2
    for size in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:size])
        refused(read_header, tmp_path / SINGLE)


# ---- folders


def sharded(folder, **weight_map: str):
    save_file({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}, folder / "1.safetensors")
    save_file({"c": np.ones(4, np.float32)}, folder / "2.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_index_leads_to_the_tensors_of_all_files(tmp_path):
    sharded(tmp_path, a="1.safetensors", b="1.safetensors", c="2.safetensors")
    assert {name: entry.shape for name, entry in read_folder(tmp_path).items()} == {"a": (2,), "b": (3,), "c": (4,)}


def test_missing_files_are_all_named(tmp_path):
    sharded(tmp_path, a="1.safetensors", b="1.safetensors", c="2.safetensors", d="3.safetensors")
    (tmp_path / "1.safetensors").unlink()
    assert "without 1.safetensors, 3.safetensors" in refused(read_folder, tmp_path)


def test_an_index_that_contradicts_its_files_is_refused_line_by_line(tmp_path):
    sharded(tmp_path, a="2.safetensors", b="1.safetensors", d="2.safetensors")
    given = refused(read_folder, tmp_path)
    assert "a: not in 2.safetensors" in given and "d: not in 2.safetensors" in given
    assert "a: in 1.safetensors, but in the index in 2.safetensors" in given
    assert "c: in 2.safetensors, but in the index in no file" in given and "b:" not in given


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"weight_map": {"a": 1}}'],
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    assert INDEX in refused(read_folder, tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/a.safetensors", "pytorch_model-1.bin"])
def test_an_index_cannot_lead_out_of_its_folder_or_to_a_pickle(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "files that are not safetensors" in refused(read_folder, tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "flax_model.msgpack"]
)
def test_pickles_are_refused_by_name_and_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / name).chmod(0)
    given = refused(read_folder, tmp_path)
    assert name in given and "run any code" in given


def test_no_folder_and_no_weights(tmp_path):
    assert "no such folder" in refused(read_folder, tmp_path / "gone")
    assert "no weights in it" in refused(read_folder, tmp_path)
