"""safetensors files: headers are checked before use, tensors mapped one at a time, files written as a stream.

A file is the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape, offsets), and the bytes
of the tensors, one after the other without a gap. A folder has one file, or several and an index.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mllm_jax.checkpoints.components import STEM, Component, component_of
from mllm_jax.errors import CheckpointError
from mllm_jax.files import open_regular, parse_json, read_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Every dtype of the format, so that a file with other tensors beside the weights can be checked as a whole.
# fmt: off
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64,
}
# fmt: on
LONGEST_HEADER = 100_000_000  # the format's own limit
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
AGAIN = "fetch the file again"


@dataclass(frozen=True)
class Entry:
    """The location of a tensor: bytes start..stop of a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def map(self) -> np.ndarray:
        """Returns the tensor as a read-only view of the file, which is unmapped when its last view is deleted."""
        dtype = DTYPES[self.dtype]
        if not self.nbytes:
            return np.empty(self.shape, dtype)
        offset = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), self.stop - offset, access=mmap.ACCESS_READ, offset=offset)
        count = math.prod(self.shape)
        return np.frombuffer(pages, dtype, count, self.start - offset).reshape(self.shape)


# ---- reading


def file_names(component: Component) -> tuple[str, str]:
    """Returns the name of a component's single weight file, and of the index of several files."""
    return f"{component.stem}.safetensors", f"{component.stem}.safetensors.index.json"


def has_weights(where: Path | Component) -> bool:
    """Returns whether the folder has safetensors, one file or several with an index."""
    component = component_of(where)
    return any((component.folder / name).exists() for name in file_names(component))


def read_folder(where: Path | Component) -> dict[str, Entry]:
    """Returns the location of each tensor of a Hugging Face folder, or of one component; reads only headers.

    Raises:
        CheckpointError: no safetensors (pickles are refused by name), an index that names absent files or tensors, a
            tensor stored twice, a damaged file.
    """
    component = component_of(where)
    folder, (single, index) = component.folder, file_names(component)
    if (folder / single).exists():
        return read_header(folder / single)
    if not (folder / index).exists():
        raise _no_weights(folder, single, index)
    weight_map = _weight_map(folder / index)
    names = sorted(set(weight_map.values()))
    if absent := [name for name in names if not (folder / name).exists()]:
        raise CheckpointError(
            f"{folder} without {', '.join(absent)}",
            f"all {len(names)} files that {index} names",
            "fetch the missing files",
        )
    headers = {name: read_header(folder / name) for name in names}
    wrong = [
        f"{tensor}: not in {name}, where the index has it"
        for tensor, name in weight_map.items()
        if tensor not in headers[name]
    ]
    wrong += [
        f"{tensor}: in {name}, but in the index in {weight_map.get(tensor, 'no file')}"
        for name, header in headers.items()
        for tensor in header
        if weight_map.get(tensor) != name
    ]
    if wrong:
        raise CheckpointError(
            f"{folder / index}:" + "".join(f"\n    {line}" for line in wrong),
            "an index that agrees with its files",
            "fetch the index and the files again, from one revision",
        )
    return {tensor: headers[name][tensor] for tensor, name in weight_map.items()}


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path, CheckpointError).get("weight_map")
    except OSError as error:
        raise CheckpointError(f"{path}: {error}", "an index of safetensors", AGAIN) from error
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(map(_is_weights_name, files)):
        raise CheckpointError(
            f"{path} with a weight_map of files that are not safetensors in its folder", "tensor -> file name", AGAIN
        )
    return weight_map


def _is_weights_name(name: Any) -> bool:
    """Returns whether a name is that of a file in the folder of the index."""
    plain = isinstance(name, str) and name.isprintable() and name == Path(name).name
    return plain and name.endswith(".safetensors")


def _no_weights(folder: Path, single: str, index: str) -> CheckpointError:
    pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)}) if folder.is_dir() else []
    if pickles:
        return CheckpointError(
            f"{folder} with {', '.join(pickles)} and no safetensors",
            f"{single} or {index}: loading a pickle can run any code",
            "take the safetensors revision of the model, or convert the file where you trust it",
        )
    what = "no such folder" if not folder.is_dir() else "no weights in it"
    return CheckpointError(f"{folder}: {what}", f"a folder with {single} or {index}", "check the path")


def read_header(path: Path) -> dict[str, Entry]:
    """Returns name -> Entry of one file, with every offset checked against the file's size.

    Raises:
        CheckpointError: truncated, not safetensors, unknown dtypes, offsets that overlap, leave gaps or contradict.
    """

    def refuse(given: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{path}: {given}", expected, AGAIN)

    try:
        with open_regular(path, CheckpointError) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LONGEST_HEADER, size - 8):
                raise refuse(f"{size:,} bytes with a header of {length:,} bytes", "a whole safetensors file")
            text = file.read(length)
    except OSError as error:
        raise refuse(str(error), "a safetensors file") from error
    try:
        header = parse_json(text, f"the header of {path}", CheckpointError, pairs=_unique, todo=AGAIN)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(f"a header that cannot be read: {type(error).__name__}: {error}", "safetensors") from error
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            how = "overlap another tensor" if entry.start < end else "leave a gap before them"
            raise refuse(f"the bytes of {name} {how}", "tensors one after the other")
        end = entry.stop
    if size != end:
        how = "truncated" if size < end else "longer than its header says"
        raise refuse(f"{size:,} bytes: {how}", f"{end:,} bytes, according to its header")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that occurs twice")
    return found


def _entry(path: Path, name: str, value: dict[str, Any], data: int) -> Entry:
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name} has sizes or offsets that are not whole numbers of 0 or more")
    if (stop - start) * 8 != BITS[dtype] * math.prod(shape):
        raise ValueError(f"{name}: {stop - start} bytes for {dtype}{list(shape)}")
    return Entry(path, dtype, shape, data + start, data + stop)


# ---- writing


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def plan_files(specs: Mapping[str, Spec], max_bytes: int, stem: str = STEM) -> dict[str, dict[str, Spec]]:
    """Returns file name -> its tensors; a file exceeds `max_bytes` only if a single tensor does."""
    files: list[dict[str, Spec]] = [{}]
    room = max_bytes
    # Wide dtypes first, so that each tensor begins at a multiple of its item size.
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        if spec.nbytes > room and files[-1]:
            files.append({})
            room = max_bytes
        files[-1][name] = spec
        room -= spec.nbytes
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {f"{stem}-{i:05}-of-{len(files):05}.safetensors": tensors for i, tensors in enumerate(files, 1)}


def write_file(path: Path, specs: Mapping[str, Spec], tensors: Iterable[np.ndarray]) -> None:
    """Writes the tensors one by one, in the order of `specs`, and syncs the file to disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        offsets = [end, end := end + spec.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
            if (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape):
                raise ValueError(f"{name}: {tensor.dtype}{tensor.shape} instead of {spec}")
            file.write(as_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())


def write_index(component: Component, files: Mapping[str, Mapping[str, Spec]]) -> None:
    """Writes the index of a component whose weights are in several files."""
    total = sum(spec.nbytes for tensors in files.values() for spec in tensors.values())
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (component.folder / file_names(component)[1]).write_text(json.dumps(index, indent=2) + "\n")


def as_bytes(tensor: np.ndarray) -> memoryview:
    """Returns the tensor's bytes in C order, without a copy if they are in that order already."""
    return memoryview(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def copy_into(out: np.ndarray, view: np.ndarray) -> None:
    """Copies view into out, in bands that fit the cache if the two have different axis orders (7 times as fast)."""
    if view.ndim < 2 or not view.size:
        out[...] = view
        return
    fast = int(np.argmin([stride if n > 1 else math.inf for stride, n in zip(view.strides, view.shape, strict=True)]))
    last = view.ndim - 1
    if fast == last:
        out[...] = view
        return
    for index in _indices(view.shape, {fast, last}):
        for start in range(0, view.shape[last], 16):
            band = (*index[:-1], slice(start, start + 16))
            out[band] = view[band]


def _indices(shape: tuple[int, ...], whole: set[int]) -> Iterator[tuple]:
    """Yields index tuples over all axes but those in `whole`."""
    counted = [1 if axis in whole else n for axis, n in enumerate(shape)]
    for index in np.ndindex(*counted):
        yield tuple(slice(None) if axis in whole else i for axis, i in enumerate(index))
