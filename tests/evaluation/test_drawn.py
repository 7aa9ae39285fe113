"""Drawn images: names by a classifier made by hand, checks of scenes, distances, rates of drawing, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import toy_data
from tiny_drawing import drawing_model

from mllm_jax import evaluate
from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.data.images import resize
from mllm_jax.data.message import Example, Image, Message, Text
from mllm_jax.datasets.openmoji.compositions import KINDS, compositions
from mllm_jax.datasets.openmoji.images import EmojiImages
from mllm_jax.datasets.openmoji.questions import caption
from mllm_jax.datasets.openmoji.requests import OpenMojiRequests, draw
from mllm_jax.errors import ConfigError, DataError, TooFewError
from mllm_jax.evaluation import drawn as judged
from mllm_jax.evaluation.run import _measured
from mllm_jax.evaluation.shown_media import encoded
from mllm_jax.evaluation.tasks import openmoji_drawn as tasks
from mllm_jax.evaluation.tasks.openmoji_drawn import OpenMojiDrawn, openmoji_drawn
from mllm_jax.generation.media import Media
from mllm_jax.generation.options import Answer
from mllm_jax.training.evaluation import Evaluation

SIZE, COUNT = 32, 40
KNOWN = compositions("tones", "composition")
DRAWS = drawing_model()


def vector(image: np.ndarray) -> np.ndarray:
    small = (255 - resize(image, 8).astype(np.float32)).ravel()
    found = np.concatenate([small, [60.0]])  # so that a white image has a direction
    return found / np.linalg.norm(found)


class ByPixels:
    """A classifier whose vector of a name is that of its real image."""

    def embed(self, texts=None, images=None):
        return np.stack([vector(x) for x in (images if texts is None else map(self._image, texts))])

    @cache  # noqa: B019
    def _image(self, name: str) -> np.ndarray:
        index = next(i for i in KNOWN.catalog.all if caption(KNOWN.catalog, i) == name)
        return EmojiImages(KNOWN.catalog).single(index, SIZE)


class Painter:
    """An assistant that answers with given images, None for an answer without one."""

    model = SimpleNamespace(config=DRAWS)

    def __init__(self, images):
        self.images, self.asked = images, []

    def generate(self, conversations, *, batch_size, max_new_tokens, seed=0, produce=(), drawing=None):
        self.asked = [c[-1].text for c in conversations]
        self.how = produce, drawing
        made = [None if x is None else Media("image", x.astype(np.float32) / 255) for x in self.images]
        return [Answer("<image 1>" if m else "no", (), media=(m,) if m else ()) for m in made]


@pytest.fixture
def by_pixels(monkeypatch):
    monkeypatch.setattr(tasks, "load_classifier", lambda folder: ByPixels())


def real_images(kind: str, count: int = COUNT) -> list[np.ndarray]:
    images = EmojiImages(KNOWN.catalog)
    return [draw(images, each, SIZE) for each in KNOWN.asked(kind, count)]


@pytest.mark.parametrize("kind", KINDS)
def test_real_images_reach_the_ceiling_and_shuffled_ones_chance(kind, by_pixels):
    task = OpenMojiDrawn(kind, limit=COUNT)
    images, painter = real_images(kind), Painter(real_images(kind))
    found = task.measure(painter).metrics
    assert found["accuracy"] == found["accuracy_real"] == 1 and found["frechet_distance"] < 1e-6
    assert all(value == 1 for name, value in found.items() if name.startswith("accuracy_") and "shuffled" not in name)
    assert found["accuracy_shuffled_media"] < 0.2 and found["n"] == COUNT and found["without_image"] == 0
    assert painter.how == (("image",), {"steps": 25, "guidance_scale": 3.0})
    captions = [each.caption for each in KNOWN.asked(kind, COUNT)]
    assert all(words in asked for words, asked in zip(captions, painter.asked, strict=True))
    wrong = task.measure(Painter(images[1:] + images[:1])).metrics
    assert wrong["accuracy"] < 0.2 and wrong["accuracy_real"] == 1
    assert wrong["accuracy_shuffled_media"] < 0.2


def test_an_answer_without_an_image_is_wrong(by_pixels):
    images = real_images("single", 10)
    found = OpenMojiDrawn("single", limit=10).measure(Painter([None, *images[1:]]))
    assert found.metrics["without_image"] == 1 and found.metrics["accuracy"] < 1
    assert [one.correct for one in found.predictions[1:3]] == [False, True]


def test_checks_of_scenes(by_pixels):
    (one,) = [each for each in KNOWN.asked("position", COUNT) if each.rows * each.columns == 4][:1]
    there = [cell for cell in one.cells if cell is not None]
    images = EmojiImages(KNOWN.catalog)

    def checked(kind: str, *cells) -> dict[str, float]:
        task, shown = OpenMojiDrawn(kind, limit=2), [replace(one, kind=kind)] * 2
        image = images.grid(cells, 2, 2, SIZE)
        answers = Painter([image] * 2).generate([[Message("user", "x")]] * 2, batch_size=2, max_new_tokens=1)
        return task.judged(ByPixels(), KNOWN, shown, ["x"] * 2, answers).metrics

    moved = one.cells[1:] + one.cells[:1]
    assert checked("position", *one.cells)["accuracy"] == checked("two", *moved)["accuracy"] == 1
    assert checked("position", *moved)["accuracy"] == 0
    again = [there[0] if cell is None else cell for cell in one.cells]
    found = checked("count", *again)
    assert found["accuracy"] == 0 and found["accuracy_cells"] == 0.5, "cells that should be empty are not"


def test_an_object_and_its_tone_are_checked_apart(by_pixels):
    shown = KNOWN.asked("single", 54)
    bases = {}
    for each in shown:
        bases.setdefault(KNOWN.catalog.records[each.cells[0]].base, []).append(each)
    first, second = next(same for same in bases.values() if len(same) > 1)[:2]
    images = [draw(EmojiImages(KNOWN.catalog), each, SIZE) for each in (second, first)]  # the other's tone
    answers = Painter(images).generate([[Message("user", "x")]] * 2, batch_size=2, max_new_tokens=1)
    found = OpenMojiDrawn("single", limit=2).judged(ByPixels(), KNOWN, [first, second], ["x"] * 2, answers).metrics
    assert (found["accuracy"], found["accuracy_object"], found["accuracy_tone"]) == (0, 1, 0)


def test_the_distance_by_hand():
    rng = np.random.default_rng(0)
    ours = rng.normal(size=(500, 3))
    assert judged.frechet_distance(ours, ours) < 1e-9
    assert abs(judged.frechet_distance(ours, ours + [1, 2, 0]) - 5) < 1e-6, "the means alone differ"
    one, two = ours[:, :1], 3 * ours[:, :1]
    expected = (one.mean() - two.mean()) ** 2 + (one.std(ddof=1) - two.std(ddof=1)) ** 2
    assert abs(judged.frechet_distance(one, two) - expected) < 1e-9
    theirs = ours @ rng.normal(size=(3, 3))
    c, d = np.cov(ours.T), np.cov(theirs.T)
    root = np.sqrt(np.linalg.eigvals(c @ d).astype(complex)).real.sum()
    whole = np.square(ours.mean(0) - theirs.mean(0)).sum() + np.trace(c) + np.trace(d) - 2 * root
    assert abs(judged.frechet_distance(ours, theirs) - whole) < 1e-6
    for wrong in ((ours[:1], ours), (ours, ours[:, :2]), (ours, ours * np.nan)):
        with pytest.raises(DataError, match="the distance of vectors"):
            judged.frechet_distance(*wrong)


def test_rates_of_drawing():
    image = Media("image", np.zeros((2, 2, 3), np.float32))
    drew, wrote = Answer("<image 1>", (), media=(image,)), Answer("a cat", ())
    to_draw = Example((Message("user", "draw"), Message("assistant", (Text("here"), Image(image.array)))))
    to_write = Example((Message("user", "say"), Message("assistant", "a cat")))
    examples = [to_draw, to_draw, to_draw, to_write]
    rates = [rate([drew, wrote, drew, drew], examples) for rate in list(tasks.ASKED.values())[:3]]
    assert rates == [0.5, 2 / 3, 0]
    with pytest.raises(TooFewError, match="none with a drawing"):
        judged.draws_when_asked([wrote], [to_write])
    source = OpenMojiRequests(size=60, split="composition", wordings="held_out").build()
    right = [source.example(i) for i in range(60)]
    (task,) = [each for each in openmoji_drawn(limit=60) if each.name == "requests/drawing"]
    painter = Painter([real if judged.asks_to_draw(one) else None for one in right for real in [np.zeros((2, 2, 3))]])
    found = task.measure(painter).metrics
    assert found == {"accuracy": 1, "accuracy_when_asked": 1, "accuracy_when_not_asked": 1, "n": 60}
    assert painter.how == ((), {"steps": 1, "guidance_scale": 1.0})
    assert painter.asked == [one.messages[0].text for one in right]


def test_the_contact_sheet_is_in_the_report(by_pixels, tmp_path):
    from mllm_jax.evaluation.report import write_report

    found = OpenMojiDrawn("two", limit=30).measure(Painter(real_images("two", 30)))
    (sheet,) = found.predictions[0].media
    assert sheet.source.shape[0] <= 256 and sheet.source.shape[1] <= 256 and len(found.predictions) == 31
    np.testing.assert_array_equal(sheet.source[:SIZE, :SIZE], sheet.source[:SIZE, SIZE : 2 * SIZE])
    shown = [
        {"task": "drawn/two", **encoded(one.media), "question": one.question, "answer": one.answer,
         "reference": one.reference, "correct": one.correct}
        for one in found.predictions[:2]
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "examples.json").write_text(json.dumps(shown))
    (tmp_path / "results.json").write_text(json.dumps({"drawn/two": found.metrics}))
    page = write_report(tmp_path).read_text()
    assert page.count("<img") == 3 and "drawn/two: drawn, and real" in page


def test_what_cannot_be_measured_is_named(tmp_path):
    every = openmoji_drawn(classifier=str(tmp_path / "none"), limit=20)
    assert all(isinstance(task, Evaluation) and rebuild(describe(task)) == task for task in every)
    painter = Painter([None] * 20)
    painter.model = SimpleNamespace(config=toy_data.MODEL)
    with pytest.raises(ConfigError, match="produces no images"):
        evaluate(painter, every[0])
    painter.model = Painter.model
    with pytest.raises(TooFewError, match="no classifier"):
        every[0].measure(painter)
    with pytest.raises(TooFewError, match="mllm train configs/clip_openmoji.py"):
        _measured(painter, every[:4], 8)
    with pytest.raises(ConfigError, match="OpenMojiDrawn"):
        OpenMojiDrawn("pair")
