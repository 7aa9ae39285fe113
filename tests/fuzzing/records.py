"""LLaVA's records: mutated JSON and JSON-lines files, read completely, every record with its images."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fuzzing import _faults as faults

RECORDS = [
    {"id": "a", "image": "in/a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat {is} \"it\"?"}, {"from": "gpt", "value": "A cat. }\\"},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
    {"id": 7, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
    {"id": "c", "image": ["in/a.png", "b.png"], "conversations": [
        {"from": "human", "value": "Is <image> like\n<image>\n?"}, {"from": "gpt", "value": "né"}]},
    {"id": "d", "image": "in/../b.png", "conversations": [
        {"from": "gpt", "value": "left out"}, {"from": "human", "value": "What?\n<image>"},
        {"from": "gpt", "value": "It"}]},
]  # fmt: skip
NAMES = (
    "pipe.png",
    "loop.png",
    "zero.png",
    "in",
    "in/a.png",
    "../a.png",
    "/dev/zero",
    "C:\\a.png",
    "a\0.png",
    "\ud800.png",
)
WHOLE = (
    b"", b"[]", b"{}", b"[" * 50_000, b"{" * 50_000, b'{"a":' * 50_000, b"a" * 50_000, b'"' * 50_000,
    b'["' + b"a" * 50_000, b"name,text\n" + b"a,b\n" * 10_000, b"\0" * 50_000, b"\xff\xfe[\0{\0}\0]\0",
    b'{"id": ' + b"1" * 9_000 + b"}", b'{"id": "' + b"\\" * 50_001, b"[{}]" * 5_000, b"{}," * 5_000, b"\n" * 50_000,
    b'{"x": "\xff"}', b"{}\n" * 20 + b"}",
)  # fmt: skip


def cases(rng: Any, n: int) -> Iterator[tuple[str, Callable[[], object]]]:
    rng = random.Random(rng.random())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "in").mkdir()
        for name in ("in/a.png", "b.png"):
            Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / name)
        os.mkfifo(folder / "pipe.png")
        (folder / "loop.png").symlink_to("loop.png")
        (folder / "zero.png").symlink_to("/dev/zero")
        for number in range(n):
            content = _content(rng)
            path = folder / f"{number % 2}.json"
            version = rng.choice(("chat", "chat", "plain"))
            yield (
                f"{number} {version} {content[:300]!a}",
                lambda path=path, content=content, version=version: _read(path, content, version),
            )


def _content(rng: random.Random) -> bytes:
    if rng.random() < 0.05:
        whole = rng.choice(WHOLE)
        return whole if rng.random() < 0.5 else faults.data(rng, whole)
    records = [json.loads(json.dumps(rng.choice(RECORDS))) for _ in range(rng.randrange(1, 5))]
    if rng.random() < 0.3:
        rng.choice(records)["image"] = rng.choice((rng.choice(NAMES), [rng.choice(NAMES)], rng.choice(NAMES) * 40))
    if rng.random() < 0.7:
        changed = faults.values(rng, records)
        records = changed if isinstance(changed, list) and changed else [changed]
    texts = [json.dumps(record, ensure_ascii=rng.random() < 0.5) for record in records]
    text = "\n".join(texts) if rng.random() < 0.5 else "[" + ",\n".join(texts) + "]"
    content = text.encode("utf-8", "surrogatepass")
    return faults.data(rng, content) if rng.random() < 0.5 else content


def _read(path: Path, content: bytes, version: str) -> None:
    """Reads every record: a bad one is refused by itself."""
    from mllm_jax.datasets.llava import LLaVARecords
    from mllm_jax.errors import DataError

    path.write_bytes(content)
    source = LLaVARecords(path.name, ".", version=version, data_dir=str(path.parent), image_size=4).build()
    source.fingerprint()
    for index in range(min(len(source), 50)):
        try:
            images = source.example(index).media
        except DataError as refusal:
            str(refusal).encode()
            continue
        for image in images:
            try:
                np.asarray(image.source)
            except DataError as refusal:
                str(refusal).encode()
