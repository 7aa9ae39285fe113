"""Damaged safetensors files and indexes with a sound config: refused, or read with the stored values."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fuzzing.config import mutated

SHAPES = {
    "model.embed.weight": (6, 4),
    "model.layers.0.up.weight": (8, 4),
    "model.layers.1.up.weight": (8, 4),
    "model.layers.0.norm.weight": (4,),
    "model.layers.1.norm.weight": (4,),
}
HOWS = ("header", "header", "bytes", "cut", "extend", "length", "index", "index", "file", "raw")
RAW = (b"[" * 100_000, b'{"a":' * 100_000, b'{"a": 1, "a": 2}', b"[]", b"null", b"", b'{"__metadata__": 7}')


def cases(rng: np.random.Generator, n: int) -> Iterator[tuple[str, Callable[[], object]]]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(n):
            for path in folder.iterdir():
                path.unlink()
            how = HOWS[number % len(HOWS)]
            what = _damaged(rng, folder, how)
            yield f"{number} {how}: {what}", lambda: _read(folder)


def _damaged(rng: np.random.Generator, folder: Path, how: str) -> str:
    """Writes a folder with one fault; returns its description."""
    header, data = _sound()
    what, single = "", folder / "model.safetensors"
    if how == "header":
        what, header = mutated(rng, header)
    if how in ("index", "file"):
        return _index(rng, folder, how, header, data)
    text = json.dumps(header).encode()
    if how == "raw":
        text = what = RAW[rng.integers(len(RAW))]
    whole = bytearray(len(text).to_bytes(8, "little") + text + data)
    if how == "bytes":
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(8 + len(text)))
            whole[place] = int(rng.integers(256))
            what += f"{place}={whole[place]} "
    if how == "cut":
        del whole[(what := int(rng.integers(len(whole)))) :]
    if how == "extend":
        whole += bytes(int(rng.integers(1, 50)))
    if how == "length":
        what = int(rng.choice([0, 1, len(text) - 1, len(text) + 1, 2**31, 2**62], 1)[0])
        whole[:8] = what.to_bytes(8, "little")
    single.write_bytes(whole)
    return f"{what!r:.100}"


def _index(rng: np.random.Generator, folder: Path, how: str, header: dict, data: bytes) -> str:
    """Writes the tensors to two files and an index, with a fault in the index or a file of another kind."""
    names = list(header)
    files = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, inside in files.items():
        end, part, bytes_of = 0, {}, b""
        for name in inside:
            start, stop = header[name]["data_offsets"]
            part[name] = header[name] | {"data_offsets": [end, end := end + stop - start]}
            bytes_of += data[start:stop]
        text = json.dumps(part).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + bytes_of)
    index = {"metadata": {}, "weight_map": {name: file for file, inside in files.items() for name in inside}}
    path, what = folder / "model.safetensors.index.json", ""
    if how == "index":
        what, index = mutated(rng, index)
        if rng.integers(4) == 0:
            index["weight_map"] = copy.copy(index.get("weight_map") or {})
            what = str(rng.choice(["../a.safetensors", "/dev/zero", "a\0.safetensors", "a.bin", "\ud800.safetensors"]))
            if isinstance(index["weight_map"], dict):
                index["weight_map"][names[0]] = what
        path.write_text(json.dumps(index))
        return f"{what!r:.100}"
    path.write_text(json.dumps(index))
    victim = folder / str(rng.choice(["a.safetensors", path.name, "model.safetensors"]))
    victim.unlink(missing_ok=True)
    what = str(rng.choice(["fifo", "folder", "/dev/zero", "/dev/null", "dangling", "nested"]))
    if what == "fifo":
        os.mkfifo(victim)
    elif what == "folder":
        victim.symlink_to(folder, target_is_directory=True)
    elif what == "nested":
        victim.write_bytes(RAW[0])
    else:
        victim.symlink_to(what)
    return f"{victim.name} {what}"


def _sound() -> tuple[dict, bytes]:
    header, data = {}, b""
    for name, shape in SHAPES.items():
        start = len(data)
        data += _values(name).tobytes()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, len(data)]}
    return header, data


def _values(name: str) -> np.ndarray:
    return np.random.default_rng(len(name)).normal(size=SHAPES[name]).astype(np.float32)


def _read(folder: Path) -> object:
    from mllm_jax.checkpoints.hf import open_weights
    from mllm_jax.checkpoints.table import Table, Weight

    table = Table((
        Weight("model.embed.weight", "embed"),
        Weight("model.layers.{layer}.up.weight", "layers/up", "o i -> i o"),
        Weight("model.layers.{layer}.norm.weight", "layers/norm"),
    ))  # fmt: skip
    entries = open_weights(folder, table, {"embed": (6, 4), "layers/up": (2, 4, 8), "layers/norm": (2, 4)})
    # With another header the tensors' bytes are unknown, but all tensors must be readable.
    for name, entry in entries.items():
        if entry.map().shape != SHAPES[name]:
            raise AssertionError(f"{name}: {entry}")
    return entries
