"""The one engine that reads and writes Hugging Face folders, by the table that each module defines.

Tensors are mapped, not loaded: only the bytes of a device's shard are copied, into a buffer of that shard's layout and
dtype. Each buffer is transferred to the device before the next one is filled. Pickles and remote code are never
executed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mllm_jax.checkpoints import safetensors_files as st
from mllm_jax.checkpoints.components import CONFIG, CONFIG_BYTES, Component, component_of
from mllm_jax.checkpoints.folder import new_folder
from mllm_jax.checkpoints.layout import (
    StoredTensor,
    assemble,
    gather_layers,
    is_layered,
    lay_out,
    named,
    parameter_view,
    resolve,
)
from mllm_jax.checkpoints.leaves import PyTree, flatten
from mllm_jax.checkpoints.table import Table, Weight
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.files import read_json
from mllm_jax.sharding.mesh import param_shardings

# Files beside the weights that are copied when they are converted; never code.
# fmt: off
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "ice_text.model",
    "*.tiktoken", "chat_template.jinja", "chat_template.json", "additional_chat_templates", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "qformer_tokenizer", "normalizer.json",
    # subfolders of diffusers' pipelines
    "tokenizer", "tokenizer_2", "feature_extractor", "image_encoder", "safety_checker",
)
_CODE = ("*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")  # not copied with a subfolder
# fmt: on
BAND = 4 << 20  # bytes of a file that are mapped at a time, if the tensor's layout can be cut
logger = logging.getLogger("mllm_jax.checkpoints")


@dataclass(frozen=True)
class ReadReport:
    """The cost of reading a model.

    Attributes:
        peak_host_bytes: largest host memory held at once before an array was finished: one shard's buffer.
        mapped_bytes: largest piece of a file mapped at once, which the kernel may drop at any time.
    """

    tensors: int
    bytes: int
    peak_host_bytes: int
    mapped_bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.tensors} tensors, {self.bytes:,} bytes in {self.seconds:.2f} s; at most "
            f"{self.peak_host_bytes:,} bytes in buffers and {self.mapped_bytes:,} bytes of files mapped at a time"
        )


def float_dtype(name: Any) -> np.dtype:
    """Returns float32, float16 or bfloat16 as a numpy dtype. Raises ConfigError for any other."""
    try:
        dtype = np.dtype(jnp.dtype(name))
    except TypeError:
        dtype = None
    if dtype not in st.DTYPE_NAMES:
        raise ConfigError(f"dtype {name!r}", "float32, bfloat16 or float16", "choose one of the three")
    return dtype


# ---- config.json


def read_config(where: Path | Component) -> dict[str, Any]:
    """Returns the dictionary in config.json. Raises CheckpointError if it is absent or not a JSON object."""
    path = component_of(where).folder / CONFIG
    try:
        return read_json(path, CheckpointError, limit=CONFIG_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(f"no {path}", "a Hugging Face folder, with its config.json", "check the path") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error}", "JSON", "fetch the file again") from error


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (Path(folder) / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies tokenizer, chat template and generation settings; returns their names."""
    found = sorted({path for pattern in COMPANIONS for path in Path(source).glob(pattern)})
    for path in found:
        copied = Path(target) / path.name
        if path.is_dir():
            shutil.copytree(path, copied, ignore=shutil.ignore_patterns(*_CODE))
        else:
            shutil.copyfile(path, copied)
    return [path.name for path in found]


# ---- reading


def open_weights(where: Path | Component, table: Table, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, st.Entry]:
    """Returns hub name -> location of the tensor, for exactly the tensors of the table; reads only headers.

    Args:
        shapes: parameter path -> shape.

    Raises:
        CheckpointError: damaged files; or unknown, missing, duplicate, mis-shaped and unreadable tensors, all at once.
    """
    component = component_of(where)
    layouts = lay_out(table, shapes)
    entries = st.read_folder(component)
    found, wrong = resolve(table, layouts, {name: entry.shape for name, entry in entries.items()})
    wrong += [
        f"{raw}: dtype {entries[raw].dtype}, expected one of {', '.join(st.DTYPES)}"
        for raw in found.values()
        if entries[raw].dtype not in st.DTYPES
    ]
    if wrong:
        raise CheckpointError(
            f"{component.folder}: {len(wrong)} of its tensors do not match the model"
            + "".join(f"\n    {line}" for line in gather_layers(sorted(wrong))),
            "the names, shapes and dtypes that follow from config.json",
            "check that weights and config.json belong together; a quantised checkpoint must be taken unquantised",
        )
    return {name: entries[raw] for name, raw in found.items()}


def read_weights(
    where: Path | Component,
    table: Table,
    abstract: PyTree,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    report: Callable[[ReadReport], None] | None = None,
) -> PyTree:
    """Reads the parameters of a Hugging Face folder, or of one component, onto the devices.

    Args:
        abstract: `jax.eval_shape` of `module.init(...)["params"]`, with its logical names.
        mesh: the mesh for `param_shardings`; None means the default device.
        dtype: dtype of the parameters; None keeps the stored dtypes.
        report: function that is called with the ReadReport; by default it is logged.

    Raises:
        CheckpointError: see `open_weights`; also a model that does not fit the devices, before anything is allocated.
    """
    begun = time.perf_counter()
    leaves, structure = flatten(nn.meta.unbox(abstract))
    component = component_of(where)
    entries = open_weights(component, table, {path: leaf.shape for path, leaf in leaves.items()})
    sources = {line.path: _Source(line, leaves[line.path].shape, entries, dtype) for line in table.weights}
    shardings = {} if mesh is None else flatten(param_shardings(abstract, mesh))[0]
    _require_room(component.folder, sources, shardings)
    params, peak = {}, _Held(0, 0)
    for path in leaves:
        params[path], held = _load(sources[path], shardings.get(path))
        peak |= held
    size = sum(entry.nbytes for entry in entries.values())
    done = ReadReport(len(entries), size, peak.buffers, peak.mapped, time.perf_counter() - begun)
    logger.info("%s: %s", component.folder, done) if report is None else report(done)
    return jax.tree_util.tree_unflatten(structure, [params[path] for path in leaves])


class _Source:
    """One parameter and its stored tensors."""

    def __init__(self, line: Weight, shape: tuple[int, ...], entries: Mapping[str, st.Entry], dtype: Any):
        self.line, self.shape, self.layered = line, shape, is_layered(line.name)
        names = [named(line.name, i) for i in range(shape[0])] if self.layered else [line.name]
        self.entries = [entries[name] for name in names]
        stored = [st.DTYPES[entry.dtype] for entry in self.entries] or [np.dtype(np.float32)]
        self.dtype = np.dtype(jnp.result_type(*stored)) if dtype is None else float_dtype(dtype)

    def shard(self, index: tuple[slice, ...]) -> tuple[np.ndarray, _Held]:
        """Returns one device's part in its own buffer, and the largest host memory that it took."""
        shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, self.shape, strict=True))
        buffer, merged, mapped = _aligned(shape, self.dtype), 0, 0
        if self.layered:
            targets = [(buffer[i, ...], entry) for i, entry in enumerate(self.entries[index[0]])]
            index = index[1:]
        else:
            targets = [(buffer, self.entries[0])]
        for out, entry in targets:
            tensor = entry.map()
            view = parameter_view(self.line, tensor)
            whole = not np.may_share_memory(view, tensor)  # the pattern merges axes, so einops copied
            merged = max(merged, view.nbytes if whole else 0)
            bands = [()] if whole else _bands(view[index], entry.nbytes)
            mapped = max(mapped, entry.nbytes // len(bands))
            del tensor, view
            for band in bands:
                # Mapped anew for each band, which frees the pages of the last band.
                # The dots keep a scalar parameter, such as a logit scale, a view.
                st.copy_into(out[*band, ...], parameter_view(self.line, entry.map())[index][*band, ...])
        return buffer, _Held(buffer.nbytes + merged, mapped)


class _Held(NamedTuple):
    """Bytes of the host in use at once."""

    buffers: int
    mapped: int

    def __or__(self, other: _Held) -> _Held:
        return _Held(max(self.buffers, other.buffers), max(self.mapped, other.mapped))


def _bands(view: np.ndarray, nbytes: int) -> list[tuple]:
    """Yields index tuples that cut the view along the file's slowest axis, about BAND bytes of the file each."""
    if nbytes <= BAND or not view.ndim:
        return [()]
    axis = max(range(view.ndim), key=lambda axis: view.strides[axis])
    edges = np.linspace(0, view.shape[axis], min(view.shape[axis], -(-nbytes // BAND)) + 1).astype(int)
    return [(*[slice(None)] * axis, slice(start, stop)) for start, stop in itertools.pairwise(edges)]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocates memory so aligned that XLA's CPU client uses it without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _load(source: _Source, sharding: jax.sharding.Sharding | None) -> tuple[jax.Array, _Held]:
    if sharding is None:
        buffer, held = source.shard((slice(None),) * len(source.shape))
        return jax.device_put(buffer).block_until_ready(), held
    shards, peak = [], _Held(0, 0)
    for device, index in sharding.addressable_devices_indices_map(source.shape).items():
        buffer, held = source.shard(index)
        # Waiting frees the buffer before the next is allocated: the host never holds two shards.
        shards.append(jax.device_put(buffer, device).block_until_ready())
        del buffer
        peak |= held
    return jax.make_array_from_single_device_arrays(source.shape, sharding, shards), peak


def _require_room(folder: Path, sources: Mapping[str, _Source], shardings: Mapping[str, jax.sharding.Sharding]) -> None:
    needed: dict[jax.Device, int] = {}
    for path, source in sources.items():
        sharding = shardings.get(path)
        devices = [_default_device()] if sharding is None else sharding.addressable_devices
        shape = source.shape if sharding is None else sharding.shard_shape(source.shape)
        for device in devices:
            needed[device] = needed.get(device, 0) + int(np.prod(shape)) * source.dtype.itemsize
    rooms: dict[str, tuple[int, int | None]] = {}
    for device, size in needed.items():
        if device.platform == "cpu":
            rooms["the host"] = (rooms.get("the host", (0, None))[0] + size, _free_host_bytes())
        else:
            rooms[str(device)] = (size, _free_device_bytes(device))
    short = [
        f"{name}: {size:,} bytes needed, {free:,} free"
        for name, (size, free) in rooms.items()
        if free is not None and size > free
    ]
    if short:
        raise CheckpointError(
            f"{folder} is larger than the memory" + "".join(f"\n    {line}" for line in short),
            "memory for every parameter",
            "pass a mesh of more devices, dtype='bfloat16', or free memory",
        )


def _default_device() -> jax.Device:
    device = jax.config.jax_default_device
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def _free_device_bytes(device: jax.Device) -> int | None:
    """Returns the free bytes of a device, or None if the platform does not report them."""
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= stats.keys() else None


def _free_host_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


# ---- writing


def write_weights(
    where: Path | Component,
    table: Table,
    params: PyTree,
    *,
    config: Mapping[str, Any] | None = None,
    companions: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes parameters as a Hugging Face folder under the hub's names, atomically.

    The host holds one stored tensor at a time in addition to what the devices hold.

    Args:
        where: the folder; a component also gives the stem of the files.
        config: the dictionary of config.json.
        companions: a folder whose tokenizer, chat template and generation settings are copied.
        max_shard_bytes: largest file; a larger model is split over several files with an index.
        dtype: dtype to store; None means that of each parameter.
        overwrite: whether to replace an existing model.

    Raises:
        CheckpointError: the table and the parameters do not match, the folder exists, or the disk is full.
    """
    leaves = _writable(flatten(nn.meta.unbox(params))[0])
    specs, tensors = _specs(table, leaves, dtype), hub_tensors(table, leaves)
    target = where if isinstance(where, Component) else Component(Path(where))
    with new_folder(target.folder, sum(spec.nbytes for spec in specs.values()), overwrite=overwrite) as temporary:
        files = st.plan_files(specs, max_shard_bytes, target.stem)
        for name, part in files.items():
            st.write_file(temporary / name, part, (_cast(tensors[n](), spec.dtype) for n, spec in part.items()))
        if len(files) > 1:
            st.write_index(replace(target, folder=temporary), files)
        if config is not None:
            write_config(temporary, config)
        if companions is not None:
            copy_companions(companions, temporary)


def hub_tensors(table: Table, params: PyTree) -> dict[str, Callable[[], np.ndarray]]:
    """Returns hub name -> a function that makes that tensor on the host. Raises CheckpointError as `lay_out` does."""
    leaves, _ = flatten(nn.meta.unbox(params))
    return {
        name: partial(assemble, layout, partial(_fetch, leaves, layer))
        for layout, layer, name in _tensors(lay_out(table, {path: np.shape(leaf) for path, leaf in leaves.items()}))
    }


def _tensors(layouts: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, int | None, str]]:
    for layout in layouts:
        for layer, name in enumerate(layout.names()):
            yield layout, None if layout.layers is None else layer, name


def _specs(table: Table, leaves: Mapping[str, Any], dtype: Any) -> dict[str, st.Spec]:
    specs = {}
    for layout, _, name in _tensors(lay_out(table, {path: np.shape(leaf) for path, leaf in leaves.items()})):
        kinds = [leaves[line.path].dtype for slot in layout.slots for line in slot]
        specs[name] = st.Spec(np.dtype(jnp.result_type(*kinds)) if dtype is None else float_dtype(dtype), layout.shape)
    return specs


def _writable(leaves: dict[str, Any]) -> dict[str, Any]:
    wrong = [f"{path}: {leaf.dtype}" for path, leaf in leaves.items() if np.dtype(leaf.dtype) not in st.DTYPE_NAMES]
    if wrong:
        raise CheckpointError(
            f"parameters of {', '.join(wrong)}", "float32, bfloat16 or float16", "convert them before saving"
        )
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves.values()):
        raise CheckpointError(
            "parameters spread over several processes",
            "arrays that this process can read whole",
            "save a native checkpoint, then run `mllm convert` on one host",
        )
    return leaves


def _fetch(leaves: Mapping[str, Any], layer: int | None, path: str) -> np.ndarray:
    """Copies a parameter, or one layer of it, to the host.

    For a device array this makes a copy first: JAX keeps the host's copy of an array as long as the array exists.
    """
    leaf = leaves[path]
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf if layer is None else leaf[layer])
    return np.asarray(jnp.copy(leaf) if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False))


def _cast(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts on the host, so that the result does not depend on how a device treats subnormal numbers."""
    return tensor.astype(dtype, copy=False)


# ---- proof


@dataclass(frozen=True)
class Checksum:
    """A checksum of a set of tensors; equal for equal names, dtypes, shapes and bits."""

    tensors: int
    bytes: int
    sha256: str


def checksum(tensors: Mapping[str, Callable[[], np.ndarray]], dtype: Any = None) -> Checksum:
    """Counts and hashes tensors in the order of their names, one on the host at a time.

    Args:
        tensors: from `hub_tensors`, or {name: entry.map} from `open_weights`.
        dtype: dtype to which each tensor is cast first.
    """
    digest, size = hashlib.sha256(), 0
    for name in sorted(tensors):
        tensor = tensors[name]()
        tensor = tensor if dtype is None else _cast(tensor, float_dtype(dtype))
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(st.as_bytes(tensor))
        size += tensor.nbytes
    return Checksum(len(tensors), size, digest.hexdigest())
