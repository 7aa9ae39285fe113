"""An account of the checkpoints that a killed run must still have, independent of the library's readers.

In the process that trains, `keep_account` writes a journal beside the run's folder: when the writing of a checkpoint
began, its bytes just before it got its name, and that it got the name. The process that kills reads the journal:

    whole      the newest two checkpoints of each stage, the one with the best validation loss, and the parameters at
               the end of a stage: every byte of every file is as it was when it was named
    allowed    an older checkpoint that is whole, or that has lost its manifest: it is being deleted
    a fault    everything else that has a checkpoint's name
"""

from __future__ import annotations

import json
import os
import signal
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

WRITING, MANIFEST = ".writing", "manifest.json"  # the names that readers of checkpoints look for
OPERATIONS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir")


def listing(folder: Path) -> dict[str, list[int]]:
    """Returns the size and CRC-32 of each file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): [path.stat().st_size, zlib.crc32(path.read_bytes())] for path in files}


# ---- in the process that trains


def keep_account(folder: Path, journal: Path, death: tuple[int, int] | None = None) -> None:
    """Records from now on the operations of this process on the checkpoints in `folder`.

    Args:
        death: (checkpoints, operations): the process kills itself that many file operations after naming that many.
    """
    real = {name: getattr(os, name) for name in OPERATIONS}
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    left = list(death) if death is not None else None

    def note(what: str, path: Path, **more) -> None:
        line = json.dumps({"what": what, "path": str(path.relative_to(folder)), **more})
        os.write(file, f"\n{line}\n".encode())  # a line that a kill cuts off does not spoil the next one

    def watched(name: str):
        def operation(path, *more, **options):
            if left is not None and left[0] == 0:
                if left[1] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[1] -= 1
            here = Path(os.fsdecode(path))
            ours = name in ("mkdir", "rename") and here.suffix == WRITING and here.is_relative_to(folder)
            if ours and name == "rename":
                note("ready", Path(more[0]), files=listing(here))
            done = real[name](path, *more, **options)
            if ours and name == "rename":
                note("named", Path(more[0]))
                if left is not None and left[0]:
                    left[0] -= 1
            elif ours:
                note("began", here.with_suffix(""))
            return done

        return operation

    note("started", folder)
    for name in OPERATIONS:
        setattr(os, name, watched(name))


# ---- in the process that kills


@dataclass
class Account:
    """The contents of the journal.

    Attributes:
        forms: path -> every listing under which it was about to be named.
        named: paths that are recorded to have got their names.
        writing: the path that the last start began to write and has not named.
    """

    forms: dict[str, list[dict]] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    writing: str | None = None


def read_account(journal: Path) -> Account:
    account = Account()
    for line in journal.read_text().splitlines() if journal.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # an empty line, or one that a kill cut off
            continue
        path = entry["path"]
        if entry["what"] == "ready":
            account.forms.setdefault(path, []).append(entry["files"])
        elif entry["what"] == "named":
            account.named.add(path)
        account.writing = path if entry["what"] in ("began", "ready") else None
    return account


@dataclass(frozen=True)
class Found:
    """The state of a run's folder.

    Attributes:
        newest: the newest step, over all stages, that must load.
        faults: descriptions of the faults.
        going: checkpoints that are partly deleted.
    """

    newest: int
    faults: list[str]
    going: list[str]


def examine(folder: Path, account: Account, stages: int, steps: int, keep: int, scores: Mapping[int, float]) -> Found:
    """Checks every byte of everything with a checkpoint's name.

    Args:
        stages, steps: number of stages, named stage0 and so on, and number of steps of each.
        keep: number of the newest checkpoints that stay.
        scores: validation loss by step over all stages; the lowest of a stage's checkpoints stays too.
    """
    # A checkpoint may have got its name just before a kill that prevented the record of it.
    named = {path for path in account.forms if path in account.named or (folder / path).exists()}
    must, newest = set(), 0
    for stage in range(stages):
        name = f"{stage}-stage{stage}"
        if f"stages/{name}" in named:
            must.add(f"stages/{name}")
            newest = max(newest, (stage + 1) * steps)
        paths = {int(Path(path).name): path for path in named if path.startswith(f"checkpoints/{name}/")}
        stay = sorted(paths)[-keep:]
        scored = [(-scores[stage * steps + step], step) for step in paths if stage * steps + step in scores]
        must |= {paths[step] for step in (*stay, *(step for _, step in sorted(scored)[-1:]))}
        newest = max([newest, *(stage * steps + step for step in stay)])
    there = [path for path in folder.glob("checkpoints/*/*") if path.name.isdecimal()]
    there += [path for path in folder.glob("stages/*") if not path.suffix]
    faults, going = [], []
    for path in sorted(must | {str(path.relative_to(folder)) for path in there}):
        files = listing(folder / path)
        if path not in named:
            faults.append(f"{path}: it was never about to get this name")
        elif files not in account.forms[path]:
            last = account.forms[path][-1]
            wrong = ", ".join(name for name in last | files if last.get(name) != files.get(name))
            if path in must or MANIFEST in files:
                faults.append(f"{path}: not as it was named: {wrong}")
            else:
                going.append(path)
    return Found(newest, faults, going)
