"""The study's examples: each skill asks about its image, reproducibly; the evaluation's questions are new and fair."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mllm_jax.datasets.openmoji import OpenMojiSkills
from mllm_jax.datasets.openmoji.catalog import Dice
from mllm_jax.datasets.openmoji.scenes import NUMBERS, PLACES
from mllm_jax.datasets.openmoji.skills import PEOPLE, SKILLS, THINGS, Sign, draw_sign, sign_image, skill_questions
from mllm_jax.errors import ConfigError


@pytest.fixture(scope="module")
def source():
    return OpenMojiSkills(image_size=64, augment=True).build()


def test_all_bases_are_there(source):
    assert {record.base for record in source.catalog.records} == {*PEOPLE, *THINGS}


def test_an_example_is_a_function_of_its_index(source, read, shown):
    again = OpenMojiSkills(image_size=64, augment=True).build()
    for index in (0, 1, 2, 3, 4001):
        assert read(source, index) == read(again, index)
        (image,), (same,) = shown(source, index), shown(again, index)
        np.testing.assert_array_equal(image, same)


def test_forms_and_skills_belong_together(source, read):
    captions, text = (OpenMojiSkills(image_size=64, augment=True, form=form).build() for form in ("captions", "text"))
    for index in range(len(SKILLS) * 5):
        asked, described = read(source, index), read(text, index)
        (answers,) = ([turn.answer for turn in asked.turns],)
        assert {turn.task for turn in asked.turns} == {
            {"naming": "naming", "text": "text", "place": "scene_position", "number": "scene_count"}[
                SKILLS[index % len(SKILLS)]
            ]
        }
        assert described.turns == asked.turns and text.example(index).media == []
        words = captions.example(index).messages[1].text
        if SKILLS[index % len(SKILLS)] == "number":
            thing = asked.turns[0].question.rsplit(" a ", 1)[-1].rsplit(" an ", 1)[-1].rstrip("?")
            assert NUMBERS.index(answers[0]) == words.count(thing), (words, asked)
        else:
            assert all(answer in words for answer in answers)
        if SKILLS[index % len(SKILLS)] == "place":
            assert len(answers) == 4 and all(f"{place} " in described.context for place in PLACES[2])


def test_a_number_is_written_in_its_corner(source):
    thing = source.things[0]
    blank = sign_image(source.emoji_images, Sign(thing, 11, 0, 0), 64)
    other = sign_image(source.emoji_images, Sign(thing, 88, 0, 0), 64)
    assert blank.shape == (64, 64, 3) and blank.dtype == np.uint8
    rows, columns = np.nonzero((blank != other).any(axis=-1))
    assert 0 < rows.max() < 24 and columns.max() < 32  # nothing else differs
    low = sign_image(source.emoji_images, Sign(thing, 11, 1, 1), 64)
    assert (low[44:, 44:] < 100).any() and (low[:20, 44:] == 255).all()
    drawn = [draw_sign(source.things, Dice(0, i)) for i in range(2000)]
    assert {sign.number for sign in drawn} == set(range(10, 100))
    held = [draw_sign(source.things, Dice(0, i), held_out=True) for i in range(2000)]
    assert not {(s.record, s.number) for s in drawn} & {(s.record, s.number) for s in held}
    assert {s.number for s in held} == set(range(10, 100)) and {s.record for s in held} == set(source.things)
    assert {(sign.row, sign.column) for sign in drawn} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_questions_of_the_evaluation_are_fair_and_new(source, shown):
    found = skill_questions(limit=100)
    assert {split: Counter(q.task for q in questions) for split, questions in found.items()} == {
        "composition": {"naming": 42},
        "new": {"number": 100, "text": 100, "top_left": 100},
    }
    counts = Counter(q.answer for q in found["new"] if q.task == "number")
    assert set(counts) == set(NUMBERS) and set(counts.values()) == {20}
    seen = {shown(source, index)[0].tobytes() for index in range(400)}
    asked = {q.images[0].tobytes() for q in found["new"]}
    four = {q.images[0].tobytes() for q in found["new"] if q.answer == "four"}  # equal things can look the same
    assert len(asked) > 150 and not seen & (asked - four)
    assert not seen & {q.images[0].tobytes() for q in found["composition"]}
    trained = {record.name for record in source.catalog.records}
    assert not trained & {q.answer for q in found["composition"]}


@pytest.mark.parametrize("settings", [dict(form="songs"), dict(skills=()), dict(skills=("naming", "flying"))])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ConfigError, match="OpenMojiSkills"):
        OpenMojiSkills(**settings).build()
