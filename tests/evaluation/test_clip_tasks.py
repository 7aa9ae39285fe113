"""The tasks on held-out clips, answered by an assistant that knows each medium, or none."""

from __future__ import annotations

import gzip
import os
import wave
from pathlib import Path

import numpy as np
import pytest
from arcade_package import arcade
from foxdot_package import foxdot

from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.data.message import Message, Text
from mllm_jax.datasets.arcade_sprites import CHARACTERS, HELD_OUT
from mllm_jax.evaluation.task import Task
from mllm_jax.evaluation.tasks.clips import arcade_tasks, ask, asterisk_task, foxdot_task
from mllm_jax.generation.options import Answer

FETCH = os.environ.get("CI") == "true"


def identity(source) -> object:
    """Returns the file of a sound, or the first frame of a video as bytes."""
    return source if isinstance(source, str) else np.asarray(source[0]).tobytes()


class Knower:
    """An assistant that gives the right answer to the medium which it is shown, whatever the question's own one is."""

    def __init__(self, task: Task):
        self.answers = {identity(one.media[0].source): one.messages[-1].text for one in task.examples()}
        self.asked: list[tuple[Message, ...]] = []

    def generate(self, conversations, *, batch_size, max_new_tokens):
        self.asked += conversations
        media = [[part for m in asked for part in m.parts if not isinstance(part, Text)] for asked in conversations]
        assert all(len(each) == 1 for each in media)
        return [Answer(self.answers[identity(each[0].source)], ()) for each in media]


class Deaf:
    """An assistant with one answer."""

    def __init__(self, answer: str):
        self.answer = answer

    def generate(self, conversations, **_):
        return [Answer(self.answer, ())] * len(conversations)


def test_naming_sounds(require_asset):
    folder = foxdot(fetch=FETCH)
    require_asset(folder, "FoxDot's sounds: python tests/assets/foxdot_package.py")
    task = foxdot_task(str(folder))
    knower = Knower(task)
    measured = task.measure(knower)
    assert measured.metrics["accuracy"] == 1 and measured.metrics["n"] == 71
    # Seven of the 71 sounds belong to three classes of several keys; a shuffle rarely exchanges two of one class.
    assert measured.metrics["majority"] == 3 / 71 and measured.metrics["accuracy_shuffled_media"] < 0.05
    assert all(asked[-1].role == "user" and len(asked) == 1 for asked in knower.asked)
    assert measured.predictions[0].reference == "gameboy hihat" and measured.predictions[0].correct
    assert task.measure(Deaf("Ambient stabs.")).metrics["accuracy"] == 3 / 71
    assert rebuild(describe(task.source)) == task.source


def test_questions_about_videos(require_asset):
    folder = arcade(fetch=FETCH)
    require_asset(folder, "Arcade's sprites: python tests/assets/arcade_package.py")
    tasks = arcade_tasks(30, folder=str(folder), image_size=32, frames=3)
    assert [task.name for task in tasks] == ["held_out/character", "held_out/action", "held_out/both"]
    for task in tasks:
        measured = task.measure(Knower(task))
        assert measured.metrics["accuracy"] == 1 and measured.metrics["n"] == 30
        # Six pairs; two characters walk.
        assert measured.metrics["majority"] == pytest.approx(1 / 3 if task.name.endswith("action") else 1 / 6)
        assert 0.05 < measured.metrics["accuracy_shuffled_media"] < 0.4
    assert tasks[0].measure(Deaf("Zombie")).metrics["accuracy"] == pytest.approx(1 / 6)
    answers = {task.source.build().example(1).messages[-1].text for task in tasks}
    zombie = CHARACTERS[-1]
    assert answers == {zombie, HELD_OUT[zombie], f"the {zombie} is {HELD_OUT[zombie]}"}
    assert ask(tasks[0].source.build().example(0))[-1].role == "user"


@pytest.fixture
def recordings(tmp_path) -> Path:
    """Returns a folder of 200 recordings of four words each."""
    texts = [f"press {number} to continue" for number in range(200)]
    for number in range(200):
        with wave.open(str(tmp_path / f"p{number}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(bytes(160))
    lines = "\n".join(f"p{number}: {text}" for number, text in enumerate(texts))
    (tmp_path / "core-sounds-en.txt.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def test_transcribing_speech(recordings):
    task = asterisk_task(str(recordings))
    measured = task.measure(Knower(task))
    assert 10 < measured.metrics["n"] < 30
    # Another recording's text differs in one of four words.
    assert measured.metrics["wer"] == 0 and measured.metrics["wer_shuffled_media"] == 0.25
    assert task.measure(Deaf("")).metrics["wer"] == 1
    upper = asterisk_task(str(recordings), normalise=lambda text: "the same")
    assert upper.measure(Deaf("")).metrics["wer"] == 0
