"""Fixtures for tests of the emoji data.

This folder is not named datasets: tests/ is on sys.path, and transformers looks for a package of that name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

from mllm_jax.datasets.openmoji import load, pairs, questions, scenes, skills
from mllm_jax.datasets.openmoji.turns import Turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with the quickstart's data."""
    path = str(tmp_path_factory.mktemp("data"))
    load("quickstart", path)
    return path


@dataclass(frozen=True)
class Readable:
    """An example in readable form: the text in place of images, and questions with their answers."""

    context: str
    turns: tuple[Turn, ...]


@pytest.fixture(scope="session")
def read():
    """Returns (source, index) -> readable example; each question has the wording of one task."""

    def readable(source, index: int) -> Readable:
        messages = source.example(index).messages
        roles = [message.role for message in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        context, turns = [], []
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            *before, asked = [part.text for part in question.parts if hasattr(part, "text")]
            assert not before or not turns, "only before the first question"
            context += before
            turns.append(Turn(asked, answer.content, _task(asked)))
        return Readable(" ".join(context), tuple(turns))

    return readable


@pytest.fixture(scope="session")
def shown():
    """Returns (source, index) -> images of the example."""
    return lambda source, index: [np.asarray(part.source) for part in source.example(index).media]


def _task(question: str) -> str:
    (task,) = [task for task, wordings in _WORDINGS.items() if any(w.fullmatch(question) for w in wordings)]
    return task


def _pattern(wording: str) -> re.Pattern[str]:
    places = "|".join([*(place for grid in scenes.PLACES.values() for place in grid), *pairs.ORDINALS])
    fields = {"x": ".+", "choices": "the first.+", "all": "both|all", "place": places}
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda found: f"(?:{fields[found[1]]})", re.escape(wording)))


_ASKED = {**questions.ASKED, **scenes.ASKED, **pairs.ASKED, "text": skills.READING}
_WORDINGS = {task: [_pattern(wording) for wording in wordings] for task, wordings in _ASKED.items()}
