"""Prepares the data set once, and reads its splits into memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mllm_jax.datasets.openmoji.drawing import can_join
from mllm_jax.datasets.openmoji.splits import SIMPLE_SPLITS, SPLITS
from mllm_jax.errors import DataError

CONFIGS = ("quickstart", "study", "full")


@dataclass(frozen=True)
class Record:
    """One image (encoded, 128 x 128) and its words, which are those of `vocabulary.Form`."""

    image: bytes
    name: str
    base: str
    category: str
    subcategory: str
    skin_tone: str
    gender: str
    codepoints: str


def load(config: str = "quickstart", data_dir: str | os.PathLike | None = None) -> Mapping[str, Sequence[Record]]:
    """Returns the splits of the data set; draws and stores them first if needed (a few seconds, once).

    If they are not stored and Pillow has no raqm, draws and stores fewer images, apart from the whole data set, which
    a later call draws once Pillow has raqm.

    Args:
        config: "quickstart", "study" or "full".
        data_dir: folder of prepared data; default: the environment variable MLLM_DATA_DIR, else TFDS's own default.

    Returns:
        Split name -> records; without raqm there are splits without any. The images stay encoded.

    Raises:
        DataError: an unknown config, a missing package, a folder that cannot be written, damaged files.
    """
    if config not in CONFIGS:
        raise DataError(f"openmoji config {config!r}", f"one of {', '.join(CONFIGS)}", "correct the name")
    chosen = data_dir or os.environ.get("MLLM_DATA_DIR") or None
    return _load(config, os.fspath(chosen) if chosen else None)


@functools.lru_cache(maxsize=8)
def _load(config: str, data_dir: str | None) -> Mapping[str, tuple[Record, ...]]:
    import tensorflow_datasets as tfds

    from mllm_jax.datasets.openmoji.openmoji_dataset_builder import SIMPLE, Builder

    try:
        builder = Builder(config=config, data_dir=data_dir)
        if not Path(builder.data_dir).exists() and not can_join():
            config += SIMPLE
            builder = Builder(config=config, data_dir=data_dir)
        folder = Path(builder.data_dir)
        if not folder.exists():
            with _lock(folder.parent):
                if not folder.exists():  # no other process has finished it meanwhile
                    _remove_remains(folder)
                    tfds.display_progress_bar(False)  # preparing takes two seconds
                    try:
                        builder.download_and_prepare(file_format="array_record")
                    finally:
                        tfds.display_progress_bar(True)
            builder = Builder(config=config, data_dir=data_dir)
    except OSError as error:
        raise DataError(
            f"the openmoji data cannot be stored ({type(error).__name__}: {error})",
            "a folder that can be written, with about 30 MB free",
            "pass data_dir=..., or set the environment variable MLLM_DATA_DIR",
        ) from error
    names = [field.name for field in fields(Record) if field.name != "image"]
    splits = {}
    stored = SIMPLE_SPLITS if config.endswith(SIMPLE) else SPLITS
    if set(builder.info.splits) != set(stored):
        raise DataError(
            f"{folder} holds the splits {sorted(builder.info.splits)}",
            f"the splits {', '.join(stored)}",
            "remove that folder; it is drawn again in seconds",
        )
    for split in SPLITS:
        if split not in stored:
            splits[split] = ()
            continue
        try:
            source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
            rows = source.__getitems__(range(len(source)))
            splits[split] = tuple(
                Record(image=bytes(row["image"]), **{name: bytes(row[name]).decode() for name in names}) for row in rows
            )
        except Exception as error:  # ArrayRecord and TFDS raise many kinds on damaged files
            raise DataError(
                f"split {split!r} of openmoji/{config} cannot be read ({type(error).__name__}: {error})",
                f"the files that were written to {folder}",
                "remove that folder; it is drawn again in seconds",
            ) from error
    return splits


def summary(splits: Mapping[str, Sequence[Record]]) -> str:
    """Returns a table of the number of images (and bases) in each split and category."""
    categories = sorted({record.category for records in splits.values() for record in records})
    lines = [f"{'':22}" + "".join(f"{split:>16}" for split in splits)]
    for category in [*categories, "all"]:
        row = f"{category:22}"
        for records in splits.values():
            chosen = [record for record in records if category in ("all", record.category)]
            row += f"{len(chosen):9} ({len({record.base for record in chosen}):4})"
        lines.append(row)
    genders = Counter(record.gender for record in splits["train"] if record.gender)
    tones = Counter(record.skin_tone for record in splits["train"] if record.skin_tone)
    return "\n".join([*lines, f"train genders {dict(genders)}", f"train skin tones {dict(tones)}"])


def digest(records: Sequence[Record]) -> str:
    """Returns a hash that changes with any word or pixel of the records."""
    total = hashlib.sha256()
    for record in records:
        for field in fields(Record):
            value = getattr(record, field.name)
            raw = value if isinstance(value, bytes) else value.encode()
            total.update(len(raw).to_bytes(8, "little") + raw)
    return total.hexdigest()[:16]


def _remove_remains(folder: Path) -> None:
    """Removes the folders of interrupted preparations: TFDS writes to `<parent>/incomplete.<random>_<name>/`."""
    for remains in folder.parent.glob(f"*incomplete*{folder.name}*"):
        shutil.rmtree(remains, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lets one process prepare at a time; the operating system releases the lock of a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl
        except ImportError:  # not a POSIX system: TFDS's own rename still prevents incomplete data
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
