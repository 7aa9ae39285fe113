"""One checkpoint folder: written atomically, checked before it is used, read onto any sharding.

    00000120/
      arrays/         every leaf, written by orbax; each process writes its own shards
      record.json     the caller's meta, and a table: path -> shape and dtype
      manifest.json   size and CRC-32 of every other file; written last: without it the folder is no checkpoint

It is built under a temporary name (`00000120.writing`), synced to disk and renamed, so that a killed process leaves
either the whole checkpoint or none. Several processes must share the folder; process 0 seals and renames it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mllm_jax.checkpoints.leaves import Leaves, PyTree, flatten, plain_json, require_same, storable, table_of
from mllm_jax.errors import CheckpointError

ARRAYS, RECORD, MANIFEST = "arrays", "record.json", "manifest.json"
WRITING, REPLACED = ".writing", ".replaced"
BLOCK = 1 << 22  # bytes read at a time while hashing


class ReadFailure(Exception):
    """A failure to read although the request matched the checkpoint: the checkpoint is at fault."""


# ---- writing


def begin(target: Path, tree: PyTree, meta: dict[str, Any], extra: dict[str, Any]) -> Callable[[], None]:
    """Copies `tree` from the devices to `target.writing` and returns the function that completes it, for any thread.

    On return every leaf may be donated: orbax holds a host copy, or (on CPU) a reference that XLA does not overwrite.

    Raises:
        CheckpointError: leaves that cannot be stored, no permission, too little space; `target` stays untouched.
    """
    leaves = storable(flatten(tree)[0])
    text = json.dumps({**extra, "meta": plain_json(meta), "leaves": table_of(leaves)})
    arrays = {path: leaf for path, leaf in leaves.items() if leaf.size}  # orbax refuses empty ones; the table has them
    temporary = target.with_name(target.name + WRITING)
    needed = int(1.02 * sum(leaf.nbytes for leaf in arrays.values())) + len(text) + (1 << 20)

    def prepare() -> None:
        if jax.process_index() != 0:
            return
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            free = free_bytes(target.parent)
            if free < needed:
                raise CheckpointError(
                    f"{target}: {_size(free)} free on that disk",
                    f"{_size(needed)} for this checkpoint",
                    f"free some space or choose another run folder; {KEPT}",
                )
            temporary.mkdir()
        except OSError as error:
            raise _write_failure(target, needed, error) from error

    together(prepare)
    writer = _orbax().AsyncCheckpointer(_orbax().PyTreeCheckpointHandler()) if arrays else None
    try:
        if writer is not None:
            writer.save(temporary / ARRAYS, args=_orbax().args.PyTreeSave(arrays))
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _write_failure(target, needed, error) from error

    def finish() -> None:
        try:
            if writer is not None:
                writer.wait_until_finished()
                writer.close()
            if jax.process_index() == 0:
                (temporary / RECORD).write_text(text)
                _seal(temporary)
                _publish(temporary, target)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _write_failure(target, needed, error) from error

    return finish


KEPT = "the checkpoints before it are untouched"


def _write_failure(target: Path, needed: int, error: Exception) -> CheckpointError:
    try:
        free = f"{_size(free_bytes(target.parent))} free on that disk"
    except OSError as unknown:
        free = f"free space unknown: {unknown}"
    return CheckpointError(
        f"writing {target} failed: {error!s:.500} ({free})",
        f"a folder that takes {_size(needed)}",
        f"free some space, give permission or choose another run folder; {KEPT}",
    )


def _seal(folder: Path) -> None:
    """Syncs every file and writes the manifest that makes the folder complete."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _crc(path)]
        _sync(path)
    (folder / MANIFEST).write_text(json.dumps({"crc32": _crc_of(files), "files": files}))
    _sync(folder / MANIFEST)
    for directory in [*sorted(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _sync(directory)


def _publish(temporary: Path, target: Path, marks: Sequence[str] = (MANIFEST,)) -> None:
    """Renames a finished folder to its name; an old folder stays whole as `.replaced` until then (see `recover`)."""
    replaced = target.with_name(target.name + REPLACED)
    if target.exists():
        with suppress(OSError):
            discard(replaced, marks)
        os.rename(target, replaced)
    os.rename(temporary, target)
    _sync(target.parent)
    with suppress(OSError):
        discard(replaced, marks)


def recover(target: Path, marks: Sequence[str] = (MANIFEST,)) -> None:
    """Undoes a replacement that was killed between its two renames; `marks` are those given to `discard`."""
    replaced = target.with_name(target.name + REPLACED)
    whole = any((replaced / mark).exists() for mark in marks)
    if jax.process_index() == 0 and whole and not target.exists():
        os.rename(replaced, target)


def discard(folder: Path, marks: Sequence[str] = (MANIFEST,)) -> None:
    """Deletes a folder, its `marks` first, so that a partial folder is never taken for a complete one."""
    for mark in marks:
        (folder / mark).unlink(missing_ok=True)
    shutil.rmtree(folder)


def make_writable(folder: Path) -> None:
    """Makes the folder if absent. Raises CheckpointError if that fails or the folder is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("no write permission")
    except OSError as error:
        raise CheckpointError(
            f"checkpoint folder {folder}: {error}", "a folder that can be made and written", "choose another run folder"
        ) from error


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _size(count: int) -> str:
    return f"{count:,} bytes ({count / 2**30:.2f} GiB)"


# `overwrite` replaces only a folder with one of these, and never a home directory.
MODEL_FILES = ("config.json", "model.json", "model_index.json")


@contextmanager
def new_folder(target: Path, nbytes: int, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `target`, which gets target's name if the block ends without an exception.

    Args:
        nbytes: size of what will be written; refused at once if the disk has less space.
        overwrite: whether to replace an existing model folder.

    Raises:
        CheckpointError: the target exists or cannot be made, or the disk is too full.
    """
    target = Path(target).absolute()
    recover(target, MODEL_FILES)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} is a file or a link", "the name of a folder", "choose another name")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"{target} is not empty",
                "a new folder",
                "choose another name, or replace the model in it: --overwrite, in Python overwrite=True",
            )
        if not any((target / name).is_file() for name in MODEL_FILES):
            raise CheckpointError(
                f"{target} holds no model, so it is not overwritten", "a model's folder", "choose another name"
            )
    make_writable(target.parent)
    if (free := free_bytes(target.parent)) < 1.02 * nbytes + 2**20:
        raise CheckpointError(
            f"{target}: {free:,} bytes free on that disk", f"slightly more than {nbytes:,} bytes", "free some space"
        )
    temporary = target.with_name(target.name + WRITING)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        _publish(temporary, target, MODEL_FILES)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(target, MODEL_FILES)
        raise


# ---- reading


def damage(folder: Path, deep: bool) -> str | None:
    """Returns why a folder is not a complete checkpoint, or None. `deep` reads every byte, else sizes are checked."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        if _crc_of(files) != manifest["crc32"]:
            return f"{MANIFEST} is corrupt"
        for name, (size, _) in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
        if deep:
            with ThreadPoolExecutor(8) as pool:
                for name, crc in zip(files, pool.map(lambda name: _crc(folder / name), files), strict=True):
                    if crc != files[name][1]:
                        return f"{name} is corrupt (its checksum differs)"
    except FileNotFoundError as error:
        if not folder.exists():
            return "there is no such folder"
        missing = Path(error.filename).relative_to(folder).as_posix()
        return f"it was never finished ({MANIFEST} is missing)" if missing == MANIFEST else f"{missing} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"
    return None


def record(folder: Path) -> dict[str, Any]:
    """Returns the record beside the arrays: meta, the table of leaves, and the writer's extras."""
    return json.loads((folder / RECORD).read_bytes())


def read(folder: Path, abstract: PyTree, only: Literal["", "entries", "leaves"]) -> tuple[PyTree, dict[str, Any]]:
    """Reads the tree, placed by the shardings of `abstract`, and the meta of an undamaged folder.

    Each device's slice is read separately, so no host holds a whole leaf that it does not need.

    Args:
        only: what `abstract`, a dict, may leave out: nothing, whole entries, or any leaves.

    Raises:
        CheckpointError: leaves, shapes or dtypes differ.
        ReadFailure: they match, and reading failed.
    """
    stored = record(folder)
    leaves, structure = flatten(abstract)
    saved = stored["leaves"]
    if only == "entries":
        saved = {path: v for path, v in saved.items() if any(path == e or path.startswith(f"{e}/") for e in abstract)}
    elif only == "leaves":
        saved = {path: v for path, v in saved.items() if path in leaves}
    require_same(folder, saved, table_of(leaves))
    try:
        values = _read_arrays(folder / ARRAYS, leaves)
    except Exception as error:
        raise ReadFailure(f"{type(error).__name__}: {error!s:.500}") from error
    return jax.tree_util.tree_unflatten(structure, [values[path] for path in leaves]), stored["meta"]


def _read_arrays(folder: Path, leaves: Leaves) -> Leaves:
    ocp = _orbax()
    out, args = {}, {}
    for path, leaf in leaves.items():
        sharding = getattr(leaf, "sharding", None)
        if not np.size(leaf):
            empty = np.zeros(leaf.shape, leaf.dtype)
            out[path] = jax.numpy.asarray(empty) if sharding is None else jax.device_put(empty, sharding)
        elif sharding is None:
            args[path] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            args[path] = ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True, restore_type=jax.Array
            )
    if args:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            request = ocp.args.PyTreeRestore(item=dict.fromkeys(args, 0), restore_args=args, partial_restore=True)
            out |= reader.restore(folder, args=request)
    return {path: jax.numpy.asarray(value) for path, value in out.items()}


# ---- several processes, threads, files


class Background:
    """A function in its own thread, whose exception `result` raises. The thread is no daemon, so it finishes."""

    def __init__(self, work: Callable[[], None]):
        self._error: BaseException | None = None

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def result(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def agree(fine: bool) -> bool:
    """Returns whether `fine` is true on all processes; every process must call this at the same point."""
    if jax.process_count() == 1:
        return fine
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.int32(fine))))


def together(work: Callable[[], None]) -> None:
    """Runs `work` here and raises CheckpointError on every process if it failed on any."""
    error = None
    try:
        work()
    except CheckpointError as caught:
        error = caught
    if not agree(error is None):
        raise error or CheckpointError("a checkpoint failed on another process", "all to succeed", "read its message")


def _orbax() -> Any:
    import orbax.checkpoint as ocp  # it takes a second, and the package must import quickly

    return ocp


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _crc_of(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
