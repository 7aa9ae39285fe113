"""Requests: reproducible, with a drawing only where one is asked for, and with compositions and wordings held out."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from mllm_jax.data.message import Image
from mllm_jax.datasets.openmoji import OpenMojiRequests
from mllm_jax.datasets.openmoji.compositions import KINDS, compositions
from mllm_jax.datasets.openmoji.images import grid_cells
from mllm_jax.datasets.openmoji.requests import DRAW, READ, TEXT
from mllm_jax.datasets.openmoji.scenes import NUMBERS
from mllm_jax.errors import ConfigError

COUNT = 400


@pytest.fixture(scope="module")
def source():
    return OpenMojiRequests().build()


def wordings(which: str) -> list[str]:
    return [*DRAW[which], *READ[which], *(one for asked in TEXT[which].values() for one in asked)]


def test_an_example_is_a_function_of_its_index(source):
    again = OpenMojiRequests(augment=True).build()
    for index in range(20):
        ours, theirs = source.example(index), again.example(index)
        assert [m.text for m in ours.messages] == [m.text for m in theirs.messages]
    (index,) = [i for i in range(30) if source.requests(i)[0].task == "draw"][:1]
    np.testing.assert_array_equal(again.images(index)[0], OpenMojiRequests(augment=True).build().images(index)[0])
    assert (again.images(index)[0] != source.images(index)[0]).any()
    assert source.fingerprint() == OpenMojiRequests(data_dir=None).build().fingerprint()
    settings = ({"augment": True}, {"split": "composition"}, {"wordings": "held_out"}, {"kinds": ("single",)})
    others = {OpenMojiRequests(**each).build().fingerprint() for each in settings}
    assert len(others) == 4 and source.fingerprint() not in others


def test_an_answer_has_an_image_only_where_one_is_asked_for(source):
    seen = Counter()
    for index in range(COUNT):
        (request,) = source.requests(index)
        question, answer = source.example(index).messages
        drawn = [part for part in answer.parts if isinstance(part, Image)]
        read = [part for part in question.parts if isinstance(part, Image)]
        assert (len(drawn), len(read)) == (request.task == "draw", request.task == "read")
        if drawn:
            assert drawn[0].caption == request.shown.caption and drawn[0].caption in question.text
            assert np.asarray(drawn[0].source).shape == (32, 32, 3)
        else:
            assert answer.text.strip()
        seen[request.task if request.task in ("draw", "read") else "text"] += 1
    assert abs(seen["draw"] / COUNT - 0.5) < 0.1 and abs(seen["read"] / COUNT - 0.25) < 0.1, seen
    # Words of drawing are in questions of every kind.
    mention = {source.requests(i)[0].task for i in range(COUNT) if "draw" in source.requests(i)[0].question.lower()}
    assert mention >= {"draw", "read", "show", "say", "number", "category", "skin_tone"}


def test_wordings_and_compositions_are_held_out(source):
    assert not set(wordings("train")) & set(wordings("held_out"))
    held = OpenMojiRequests(split="composition", wordings="held_out").build()
    patterns = [re.compile(re.escape(w).replace(r"\{x\}", ".+")) for w in wordings("train")]
    captions = {split: set() for split in ("train", "composition")}
    for index in range(COUNT):
        (ours,), (theirs,) = source.requests(index), held.requests(index)
        assert any(pattern.fullmatch(ours.question) for pattern in patterns)
        assert not any(pattern.fullmatch(theirs.question) for pattern in patterns), theirs.question
        captions["train"].add(ours.shown.caption)
        captions["composition"].add(theirs.shown.caption)
    assert not captions["train"] & captions["composition"]
    known = held.compositions.catalog.records
    for index in held.compositions.singles:
        record, train = known[index], [known[other] for other in source.compositions.singles]
        assert any(other.base == record.base for other in train)
        assert any(other.skin_tone == record.skin_tone for other in train)
    pairs = {
        split: {frozenset(c.cells) - {None} for c in compositions("tones", split).asked("position", 60)}
        for split in ("train", "composition")
    }
    assert not pairs["train"] & pairs["composition"]


def test_an_image_is_what_its_caption_says(source):
    compose = compositions("tones", "train")
    white = np.full((16, 16, 3), 255, np.uint8)
    for kind in KINDS:
        for shown in compose.asked(kind, 12):
            image = source.draw(shown)
            assert len(shown.cells) == shown.rows * shown.columns
            for cell, (top, left, side) in zip(shown.cells, grid_cells(32, shown.rows, shown.columns), strict=True):
                crop = image[top : top + side, left : left + side]
                real = white if cell is None else source.emoji_images.single(cell, side)
                np.testing.assert_array_equal(crop, real)
            there = [compose.catalog.records[cell].name for cell in shown.cells if cell is not None]
            assert all(name in shown.caption for name in there)
            if kind == "count":
                assert shown.caption.endswith(f" {NUMBERS[len(there)]} times") and len(set(there)) == 1
            if "left of" in shown.caption:
                assert shown.caption.index(there[0]) < shown.caption.index(there[1])
            if "below" in shown.caption:
                assert shown.rows == 2 and shown.caption.index(there[1]) < shown.caption.index(there[0])


def test_singles_of_a_gender_are_held_out_as_the_data_does():
    held = compositions("quickstart", "composition")
    of_data = {record.name for record in held.catalog.records if record.gender}
    assert of_data and any(held.catalog.records[index].gender for index in held.singles)
    train = compositions("quickstart", "train")
    assert not set(held.singles) & set(train.singles)
    assert set(train.names(tones=False)) < set(train.names())


def test_several_requests_make_a_conversation():
    source = OpenMojiRequests(turns=3).build()
    example = source.example(5)
    assert [message.role for message in example.messages] == ["user", "assistant"] * 3
    assert len(example.media) == sum(request.task in ("draw", "read") for request in source.requests(5))


def test_captions_are_of_what_the_requests_show(source):
    captions = OpenMojiRequests(form="captions").build()
    for index in range(20):
        example, (request,) = captions.example(index), source.requests(index)
        assert [message.text for message in example.messages[1:]] == [request.shown.caption]
        np.testing.assert_array_equal(np.asarray(example.media[0].source), source.images(index)[0])


@pytest.mark.parametrize(
    "settings",
    [{"kinds": ("pair",)}, {"form": "text"}, {"kinds": ()}, {"wordings": "test"}, {"draw_share": 0.9},
     {"draw_share": 1.1}, {"split": "unseen"}, {"config": "toned"}],
)  # fmt: skip
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        OpenMojiRequests(**settings).build()
