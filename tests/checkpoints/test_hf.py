"""The engine against weights made by hand: reading, writing, shards, spellings, and folders that it must refuse."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_hub import LAYERS, NAMES, SHAPES, TABLE, abstract, by_hand, nest, parameters, write_raw

from mllm_jax.checkpoints import hf
from mllm_jax.checkpoints.components import Component
from mllm_jax.checkpoints.hf import checksum, hub_tensors, open_weights, read_config, read_weights, write_weights
from mllm_jax.checkpoints.leaves import flatten
from mllm_jax.checkpoints.safetensors_files import file_names
from mllm_jax.checkpoints.table import Weight
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.sharding.logical import partition_spec
from mllm_jax.sharding.mesh import MeshConfig, make_mesh

SINGLE, INDEX = file_names(Component(Path()))
BF16 = np.dtype(ml_dtypes.bfloat16)


def save(folder: Path, stored: dict) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in stored.items()}, folder / SINGLE)
    return folder


def same(tree, expected: dict) -> None:
    found = flatten(tree)[0]
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == expected[path].dtype, path
        assert np.asarray(leaf).tobytes() == expected[path].tobytes(), path


@pytest.fixture
def refused(monkeypatch):
    """Returns the message of a refused reading; checks that nothing was allocated for a parameter."""

    def never(*_, **__):
        raise AssertionError("something was allocated before the refusal")

    def check(folder: Path, table=TABLE, **options) -> str:
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as refusal:
            patch.setattr(hf, "_aligned", never)
            patch.setattr(jax, "device_put", never)
            read_weights(folder, table, abstract(), **options)
        assert refusal.value.expected and refusal.value.todo
        return str(refusal.value)

    return check


# ---- reading and writing


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=str)
def test_what_is_stored_is_read(tmp_path, dtype):
    expected = parameters(dtype)
    reports = []
    same(read_weights(save(tmp_path, by_hand(expected)), TABLE, abstract(), report=reports.append), expected)
    (report,) = reports
    assert report.tensors == 4 + 3 * LAYERS
    assert report.bytes == sum(p.nbytes for p in expected.values())
    largest = max(p.nbytes for p in expected.values())
    assert largest <= report.peak_host_bytes <= 2 * largest and f"{report.peak_host_bytes:,} bytes" in str(report)


@pytest.mark.parametrize("stored", [np.float32, np.float16, BF16], ids=str)
@pytest.mark.parametrize("asked", ["float32", "bfloat16", jnp.float16], ids=str)
def test_another_dtype_is_rounded_once(tmp_path, stored, asked):
    params = parameters(stored)
    got = read_weights(save(tmp_path, by_hand(params)), TABLE, abstract(), dtype=asked)
    same(got, {path: p.astype(jnp.dtype(asked)) for path, p in params.items()})


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn", "bf16", 3])
def test_only_three_dtypes_can_be_asked_for(tmp_path, dtype):
    with pytest.raises(ConfigError, match="float32, bfloat16 or float16"):
        read_weights(save(tmp_path, by_hand(parameters())), TABLE, abstract(), dtype=dtype)


def test_parts_of_a_model_keep_dtypes_of_their_own(tmp_path):
    expected = {path: p.astype(np.float32 if "norm" in path else BF16) for path, p in parameters().items()}
    same(read_weights(save(tmp_path, by_hand(expected)), TABLE, abstract()), expected)
    write_weights(tmp_path / "again", TABLE, nest(expected))
    found = load_file(tmp_path / "again" / SINGLE)
    assert {str(t.dtype) for name, t in found.items() if "norm" in name} == {"float32"}
    assert {str(t.dtype) for name, t in found.items() if "norm" not in name} == {"bfloat16"}


@pytest.mark.parametrize("limit", [5 * 10**9, 2000, 1])
def test_what_is_written_is_what_the_hub_would_have(tmp_path, limit):
    params = parameters()
    write_weights(tmp_path / "out", TABLE, nest(params), config={"model_type": "toy"}, max_shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = by_hand(params)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert read_config(tmp_path / "out") == {"model_type": "toy"}
    same(read_weights(tmp_path / "out", TABLE, abstract()), params)
    assert (len(files) > 1) == (limit < 10**9) == (tmp_path / "out" / INDEX).exists()
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        assert index["weight_map"].keys() == expected.keys()
    if limit == 1:
        assert len(files) == len(expected)


def test_boxed_and_sharded_parameters_are_written_alike(tmp_path, devices):
    write_weights(tmp_path / "plain", TABLE, nest(parameters()))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = read_weights(tmp_path / "plain", TABLE, abstract(), mesh=mesh)
    boxed = jax.tree.map(
        lambda box, value: box.replace_boxed(value), abstract(), params, is_leaf=lambda x: hasattr(x, "names")
    )
    for name, tree in (("sharded", params), ("boxed", boxed)):
        write_weights(tmp_path / name, TABLE, tree)
        assert (tmp_path / name / SINGLE).read_bytes() == (tmp_path / "plain" / SINGLE).read_bytes()


def test_another_dtype_is_written_where_asked(tmp_path):
    params = parameters()
    write_weights(tmp_path / "out", TABLE, jax.tree.map(jnp.asarray, nest(params)), dtype="bfloat16")
    expected = by_hand({path: p.astype(BF16) for path, p in params.items()})
    assert {n: t.tobytes() for n, t in load_file(tmp_path / "out" / SINGLE).items()} == {
        n: t.tobytes() for n, t in expected.items()
    }


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=8, data=1), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8)], ids=str
)
def test_each_device_gets_its_slice(tmp_path, devices, mesh):
    expected = parameters()
    mesh = make_mesh(mesh)
    reports = []
    params = read_weights(save(tmp_path, by_hand(expected)), TABLE, abstract(), mesh=mesh, report=reports.append)
    same(params, expected)
    largest = 0
    for path, leaf in flatten(params)[0].items():
        assert leaf.sharding.spec == partition_spec(NAMES[path], SHAPES[path], mesh), path
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), expected[path][shard.index]), path
        if path != "patch/kernel":  # merged axes: einops copies this one
            largest = max(largest, leaf.addressable_shards[0].data.nbytes)
    assert largest <= reports[0].peak_host_bytes <= largest + expected["patch/kernel"].nbytes


def test_the_files_are_unmapped_when_the_parameters_are_there(tmp_path):
    """Checks that a process does not keep the file's memory and disk space."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc on this system")
    params = read_weights(save(tmp_path, by_hand(parameters())), TABLE, abstract())
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    entries = open_weights(tmp_path, TABLE, SHAPES)
    view = entries["head.weight"].map()[2:3]
    assert str(tmp_path) in Path("/proc/self/maps").read_text(), "the check sees no mapping"
    del view
    gc.collect()
    same(params, parameters())


# ---- names


def test_old_spellings_are_read_and_what_holds_nothing_is_passed_over(tmp_path):
    stored = {
        name.replace("model.", "transformer.", 1).replace("norm.weight", "norm.gamma"): tensor
        for name, tensor in by_hand(parameters()).items()
    }
    stored |= {f"transformer.layers.{i}.inv_freq": np.zeros(2, np.int64) for i in range(LAYERS)}
    stored["tied.weight"] = np.ones((3, 3), np.float32)
    same(read_weights(save(tmp_path, stored), TABLE, abstract()), parameters())


def test_names_that_the_table_knows_are_not_respelled(tmp_path):
    table = dataclasses.replace(TABLE, spellings=((r"^model\.", "other."),))
    same(read_weights(save(tmp_path, by_hand(parameters())), table, abstract()), parameters())


def test_everything_that_does_not_fit_is_in_one_message(tmp_path, refused):
    stored = by_hand(parameters())
    for layer in range(LAYERS):
        del stored[f"model.layers.{layer}.norm.weight"]
    del stored["model.layers.1.qkv.weight"]
    stored["head.weight"] = stored["head.weight"].T
    stored["model.patch.bias"] = np.zeros(8, np.int8)
    stored["model.embed.weight_scale"] = np.zeros(1, np.float32)
    stored["transformer.layers.3.norm.gamma"] = np.zeros(8, np.float32)  # one layer too many
    stored["transformer.patch.weight"] = stored["model.patch.weight"]
    message = refused(save(tmp_path, stored))
    lines = {line.strip() for line in message.splitlines()}
    assert {
        "model.layers.{0-2}.norm.weight: missing",
        "model.layers.1.qkv.weight: missing",
        "head.weight: shape [8, 16], expected [16, 8]",
        "model.patch.bias: dtype I8, expected one of F32, F16, BF16",
        "model.embed.weight_scale: unknown",
        "transformer.layers.3.norm.gamma (read as model.layers.3.norm.weight): unknown",
        "transformer.patch.weight (read as model.patch.weight): a duplicate of model.patch.weight",
    } < lines
    assert "9 of its tensors do not match" in message


@pytest.mark.parametrize("dtype", ["I8", "U8", "I64", "F64", "F8_E4M3", "F8_E5M2", "BOOL"])
def test_quantised_and_foreign_dtypes_are_refused(tmp_path, refused, dtype):
    bits = hf.st.BITS[dtype]
    header, data = {}, 0
    for name, tensor in by_hand(parameters()).items():
        size = tensor.size * (bits if name == "head.weight" else 32) // 8
        kind = dtype if name == "head.weight" else "F32"
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [data, data + size]}
        data += size
    write_raw(tmp_path / SINGLE, header, bytes(data))
    assert f"head.weight: dtype {dtype}, expected one of F32, F16, BF16" in refused(tmp_path)


# ---- memory


def test_a_model_larger_than_the_host_is_refused_before_anything_is_allocated(tmp_path, refused, monkeypatch):
    save(tmp_path, by_hand(parameters()))
    needed = sum(p.nbytes for p in parameters().values())
    monkeypatch.setattr(hf, "_free_host_bytes", lambda: needed - 1)
    message = refused(tmp_path)
    assert f"the host: {needed:,} bytes needed, {needed - 1:,} free" in message
    monkeypatch.setattr(hf, "_free_host_bytes", lambda: needed // 2)
    read_weights(tmp_path, TABLE, abstract(), dtype="bfloat16")
    message = refused(tmp_path, mesh=make_mesh(MeshConfig(data=8)))
    assert f"the host: {8 * needed:,} bytes needed" in message, "eight devices of one host"


def test_a_model_larger_than_a_device_is_refused():
    class Device:
        platform = "gpu"

        def __init__(self, name, stats):
            self.name, self.stats = name, stats

        def __str__(self):
            return self.name

        def memory_stats(self):
            return self.stats

    small, large, silent = (
        Device("small", {"bytes_limit": 100, "bytes_in_use": 60}),
        Device("large", {"bytes_limit": 10**6, "bytes_in_use": 0}),
        Device("silent", None),
    )
    source = SimpleNamespace(shape=(4, 8), dtype=np.dtype("f4"))

    def room(*devices):
        sharding = SimpleNamespace(addressable_devices=devices, shard_shape=lambda shape: (shape[0] // 4, shape[1]))
        hf._require_room("folder", {"a": source, "b": source}, {"a": sharding, "b": sharding})

    room(large, silent)
    with pytest.raises(CheckpointError, match="small: 64 bytes needed, 40 free") as refusal:
        room(large, small)
    assert "large" not in refusal.value.given.splitlines()[1]


def test_free_memory_of_this_host_is_known():
    free = hf._free_host_bytes()
    assert free is not None and 2**20 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- config.json


@pytest.mark.parametrize(
    "text,message", [(None, "no "), ("{", "Expecting"), ("[1]", "with a list"), (b"\xff\xfe\x00", "codec")]
)
def test_a_config_that_cannot_be_read(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


# ---- a folder appears whole or not at all


def test_a_taken_name_is_refused_and_a_model_replaced_only_on_request(tmp_path):
    target = tmp_path / "model"
    write_weights(target, TABLE, nest(parameters()), config={"a": 1})
    with pytest.raises(CheckpointError, match="is not empty"):
        write_weights(target, TABLE, nest(parameters()), config={"a": 2})
    assert read_config(target) == {"a": 1}
    write_weights(target, TABLE, nest(parameters()), config={"a": 2}, overwrite=True)
    assert read_config(target) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_holds_no_model_is_never_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name, message in (("home", "holds no model"), ("file", "a file or a link"), ("link", "a file or a link")):
        with pytest.raises(CheckpointError, match=message):
            write_weights(tmp_path / name, TABLE, nest(parameters()), overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_an_interrupted_writing_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "model"
    write_weights(target, TABLE, nest(parameters()), config={"a": 1})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "write_config", interrupted)
    for name in ("model", "other"):
        with pytest.raises(KeyboardInterrupt):
            write_weights(tmp_path / name, TABLE, nest(parameters()), config={"a": 2}, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and read_config(target) == {"a": 1}
    same(read_weights(target, TABLE, abstract()), parameters())


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("mllm_jax.checkpoints.folder.free_bytes", lambda folder: 1000)
    with pytest.raises(CheckpointError, match="1,000 bytes free on that disk"):
        write_weights(tmp_path / "model", TABLE, nest(parameters()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_parameters_of_other_dtypes_are_not_written(tmp_path, dtype):
    params = parameters() | {"patch/bias": np.zeros(8, dtype)}
    with pytest.raises(CheckpointError, match=f"patch/bias: {np.dtype(dtype)}"):
        write_weights(tmp_path / "model", TABLE, nest(params))


# ---- proof


def test_the_checksum_sees_every_bit_name_and_shape(tmp_path):
    params = parameters()
    entries = open_weights(save(tmp_path, by_hand(params)), TABLE, SHAPES)
    whole = checksum({name: entry.map for name, entry in entries.items()})
    assert whole == checksum(hub_tensors(TABLE, nest(params)))
    assert (whole.tensors, whole.bytes) == (len(entries), sum(p.nbytes for p in params.values()))
    half = {path: p.astype(BF16) for path, p in params.items()}
    assert checksum(hub_tensors(TABLE, nest(params)), "bfloat16") == checksum(hub_tensors(TABLE, nest(half)))
    base = {"a": lambda: np.zeros((2, 3), np.float32), "b": lambda: np.ones(1, np.float32)}
    others = [
        {"a": base["a"]},
        base | {"a": lambda: np.zeros((3, 2), np.float32)},
        base | {"a": lambda: np.zeros((2, 3), np.int32)},
        base | {"b": lambda: np.full(1, np.nextafter(np.float32(1), 2))},
        {"a": base["a"], "c": base["b"]},
    ]
    assert len({checksum(tensors).sha256 for tensors in [base, *others]}) == 6
    assert checksum(dict(reversed(base.items()))) == checksum(base)


# ---- tables that do not match their module


def replaced(path: str, **changes) -> tuple[Weight, ...]:
    return tuple(dataclasses.replace(w, **changes) if w.path == path else w for w in TABLE.weights)


FAULTS = {
    "gone": (TABLE.weights[1:], "embed/embedding: in the model, not in the table"),
    "strange": ((*TABLE.weights, Weight("x", "no/where")), "no/where: in the table, not in the model"),
    "twice": ((*TABLE.weights, Weight("x", "head/kernel")), "head/kernel: in the table 2 times"),
    "rank": (replaced("embed/embedding", pattern="a b c -> a b c"), "does not fit 'a b c -> a b c'"),
    "size": (replaced("layers/q/kernel", sizes={"h": 5}), "does not fit"),
    "gap": (replaced("layers/k/kernel", rows=(17, 25)), r"rows \(17, 25\) that are not consecutive"),
    "short": (replaced("layers/v/kernel", rows=(24, 31)), r"do not hold \[8, 8\]"),
    "late": (replaced("layers/q/kernel", name="model.layers.{layer}.q"), "rows .* that are not consecutive"),
    "no rows": (replaced("layers/q/kernel", rows=None), "lines with rows and lines without"),
    "part": (replaced("layers/c/kernel", part=3), "not its parts 0, 1"),
    "no part": (replaced("layers/c/kernel", part=None), "not its parts 0, 1"),
    "patterns": (replaced("layers/c/kernel", sizes={"n": 4}), "different shapes or patterns"),
    "layers": (replaced("patch/bias", name="model.layers.{layer}.qkv.weight"), "different numbers of layers"),
    "same name": (replaced("patch/bias", name="model.layers.0.norm.weight"), "model.layers.0.norm.weight: 2 lines"),
}


@pytest.mark.parametrize("weights,message", FAULTS.values(), ids=FAULTS)
def test_a_table_that_does_not_fit_is_refused_both_ways(tmp_path, refused, weights, message):
    table = dataclasses.replace(TABLE, weights=weights)
    found = refused(save(tmp_path, by_hand(parameters())), table)
    assert re.search(message, found), found
    with pytest.raises(CheckpointError, match=message):
        write_weights(tmp_path / "out", table, nest(parameters()))
    assert not (tmp_path / "out").exists()
