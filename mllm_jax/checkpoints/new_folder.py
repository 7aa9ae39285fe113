"""A folder that appears whole or not at all: it is filled beside its final name and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mllm_jax.checkpoints.folder import REPLACED, WRITING, discard, free_bytes, make_writable, recover
from mllm_jax.errors import CheckpointError

# A folder with one of these holds a model, so that `overwrite` can never take away a home directory.
MODEL_FILES = ("config.json", "model.json", "model_index.json")


@contextmanager
def new_folder(target: Path, nbytes: int, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside `target`, which takes target's name when the block ends without an exception.

    Args:
        nbytes: what will be written; refused at once where the disk has not that much left.
        overwrite: replace a model folder that is there.

    Raises:
        CheckpointError: the target is taken, cannot be made, or the disk is too full.
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
            f"{target}: {free:,} bytes free on that disk", f"{nbytes:,} bytes and a little", "free some space"
        )
    temporary, replaced = target.with_name(target.name + WRITING), target.with_name(target.name + REPLACED)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        if target.exists():
            with suppress(OSError):
                discard(replaced, MODEL_FILES)
            os.rename(target, replaced)
        os.rename(temporary, target)
        with suppress(OSError):
            discard(replaced, MODEL_FILES)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(target, MODEL_FILES)
        raise
