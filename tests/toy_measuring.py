"""A source of lines and an encoder of them without a model: measuring processes import both fast."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.data.message import Example, Message
from mllm_jax.data.processing.layouts import Layout
from mllm_jax.data.processing.media import Encoded, PreparedMedia, lay_out_row
from mllm_jax.data.source_encoder import SourceEncoder
from mllm_jax.errors import DataError, ReadError


@dataclass(frozen=True)
class Lines:
    """Lines of `1 + index % 9` letters.

    Attributes:
        log: a file to which each process appends the indices that it reads.
        home: the process that neither dies nor raises.
        dies_at: the example at which a process is killed; "anywhere": a different one each time; "start": at building.
        deaths: the number of deaths.
        raises: index -> name of an error.
    """

    log: str
    size: int = 100
    home: int = 0
    dies_at: int | str | None = None
    deaths: int = 0
    raises: tuple[tuple[int, str], ...] = ()

    def build(self) -> LineSource:
        return LineSource(self)


class LineSource:
    name = "lines"

    def __init__(self, config: Lines):
        self.config = config
        if config.dies_at == "start" and os.getpid() != config.home:
            os.kill(os.getpid(), signal.SIGKILL)

    def __len__(self) -> int:
        return self.config.size

    def example(self, index: int) -> Example:
        c = self.config
        with open(c.log, "a") as file:
            file.write(f"{index}\n")
        if os.getpid() != c.home and c.dies_at is not None:
            died = Path(c.log + ".died").read_text().count("x") if Path(c.log + ".died").exists() else 0
            if died < c.deaths and index in (c.dies_at, 3 + 2 * died if c.dies_at == "anywhere" else -1):
                with open(c.log + ".died", "a") as file:
                    file.write("x")
                os.kill(os.getpid(), signal.SIGKILL)
        kind = dict(c.raises).get(index)
        if kind == "DataError":
            raise DataError(f"line {index} is bad", "a good one", "correct it")
        if kind == "ReadError":
            raise ReadError("no disk", "a disk", "wait")
        if kind is not None:
            raise ZeroDivisionError(kind)
        return Example((Message("user", "a" * (1 + index % 9)),))

    def fingerprint(self) -> str:
        return f"lines {self.config.size}"


class Slots(Layout):
    unit = "slot"


@dataclass(frozen=True)
class Letters:
    """Encodes a letter as a token; five of them have an image, of 10 tokens and 2 slots."""

    held: Any = None  # a test's object, which is sent too
    layout = Slots()

    def fingerprint(self) -> str:
        return "letters"

    def encode(self, example: Example, max_length: int, learn: str) -> Encoded:
        ids = [ord(letter) for letter in example.messages[0].text][:max_length]
        media = [PreparedMedia({}, np.ones(10, int), np.arange(10), count=2)] if len(ids) == 5 else []
        row = lay_out_row([*ids, *[0] * len(media)], media, [0], "a line")
        return Encoded(row, np.ones(len(row.tokens), np.float32), media, dropped_turns=int(len(ids) == 9))


def encoder(config: Lines, held: Any = None, **change: Any) -> SourceEncoder:
    return SourceEncoder(config, config.build(), Letters(held), **dict(length=64) | change)
