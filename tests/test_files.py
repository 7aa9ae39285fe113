"""Files that are written whole or not at all."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from mllm_jax import files
from mllm_jax.files import write_atomic

LIBRARY = Path(files.__file__).parent


@pytest.mark.parametrize("content", ["é\n", "é\n".encode(), lambda file: file.write("é\n".encode())])
def test_what_is_written_replaces_what_was_there(tmp_path, content):
    path = tmp_path / ("x" * 251 + ".txt")  # the longest name that a file can have
    path.write_text("old")
    write_atomic(path, content)
    assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["open", "content", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, where, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        if where != "content":
            patch.setattr(Path if where == "open" else files.os, where, fail)
        with pytest.raises(type(error)):
            write_atomic(path, fail if where == "content" else "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_who_write_at_once_do_not_meet(tmp_path):
    path = tmp_path / "a.json"

    def meanwhile(file):
        file.write(b"first")
        write_atomic(path, "second")
        assert path.read_bytes() == b"second"

    write_atomic(path, meanwhile)
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["a.json"]


def test_the_library_replaces_files_in_this_one_place():
    uses = []
    for source in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "replace" and getattr(node.value, "id", "") == "os":
                uses.append(str(source.relative_to(LIBRARY)))
    assert uses == ["files.py"]
