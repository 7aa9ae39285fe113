"""Scores, their controls, and how results of several evaluations come together."""

from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from mllm_jax.data.message import Image as Shown
from mllm_jax.errors import DataError
from mllm_jax.evaluation.evaluate import evaluate, majority, normalise, shuffles
from mllm_jax.evaluation.run import _merged
from mllm_jax.generation.options import Answer


@dataclass(frozen=True)
class Asked:
    task: str
    question: str
    answer: str
    images: tuple[np.ndarray, ...]


class Seer:
    """An assistant whose answer is the colours of its pictures, so that only the right pictures give the right one."""

    def __init__(self, answer=lambda question, seen: seen):
        self.say, self.calls = answer, []

    def prompt(self, messages):
        return messages[0]

    def complete(self, prompts, options, batch_size):
        self.calls.append(
            [[int(p.source[0, 0, 0]) for p in prompt.parts if isinstance(p, Shown)] for prompt in prompts]
        )
        seen = [" ".join(map(str, each)) for each in self.calls[-1]]
        return [Answer(self.say(prompt.text, each), ()) for prompt, each in zip(prompts, seen, strict=True)]


def picture(colour: int) -> np.ndarray:
    return np.full((4, 4, 3), colour, np.uint8)


def asked(task: str, *colours: int, question: str = "What colour?", answer: str | None = None) -> Asked:
    return Asked(task, question, answer or " ".join(map(str, colours)), tuple(map(picture, colours)))


@pytest.mark.parametrize(
    ("text", "other"),
    [("A red  cat.", "a red cat"), (" a\nred\tcat ", "a red cat"), ("a red cat .", "a red cat"), ("Yes", "yes.")],
)
def test_normalise_forgives_case_spaces_and_the_full_stop(text, other):
    assert normalise(text) == normalise(other)


@pytest.mark.parametrize(("text", "other"), [("cat", "cats"), ("red cat", "redcat"), ("", "no"), ("1.5", "15")])
def test_normalise_forgives_nothing_else(text, other):
    assert normalise(text) != normalise(other)


def test_shuffles_are_permutations_that_leave_nothing_in_its_place():
    for count in (2, 3, 10, 57, 500):
        for seed in range(5):
            for order in shuffles(count, seed):
                assert sorted(order) == list(range(count))
                assert (order != np.arange(count)).all()
    assert (shuffles(50, 1)[0] != shuffles(50, 2)[0]).any()
    assert np.array_equal(shuffles(50), shuffles(50))


def test_few_questions_are_shuffled_several_times():
    assert [len(shuffles(count)) for count in (2, 60, 100, 300, 1000)] == [8, 5, 3, 1, 1]
    assert len({tuple(order) for order in shuffles(60)}) == 5


def test_majority_counts_answers_as_they_are_compared():
    assert majority(["Yes", "yes.", "no"]) == 2 / 3
    assert majority(["a", "b", "c", "d"]) == 1 / 4


def test_scores_and_controls_computed_by_hand():
    questions = {
        "seen": [
            asked("colour", 1, answer="1."),
            asked("colour", 2),
            asked("colour", 3, answer="7"),  # what the generator sees is not the answer
            asked("colour", 4),
            asked("pair", 5, 6),
            asked("pair", 6, 5),
        ],
        # The answer stands in the question: pictures make no difference, and the control says so.
        "blind": [asked("colour", c, question=f"Say {c}", answer="9" if c < 3 else "8") for c in (1, 2, 3)],
    }
    seer = Seer(lambda question, seen: "9" if question.startswith("Say") else seen)
    results, examples = evaluate(seer, questions)
    assert results == {
        "splits": {
            "seen": {
                "colour": {"accuracy": 3 / 4, "accuracy_shuffled_images": 0.0, "majority": 1 / 4, "n": 4},
                "pair": {"accuracy": 1.0, "accuracy_shuffled_images": 0.0, "majority": 1 / 2, "n": 2},
            },
            "blind": {"colour": {"accuracy": 2 / 3, "accuracy_shuffled_images": 2 / 3, "majority": 2 / 3, "n": 3}},
        }
    }
    # The control asks about the same pictures, each at another question, and pictures of one question stay together.
    true, control = seer.calls[0][:4], seer.calls[0][4:]
    pairs, other_pairs = seer.calls[1][:2], seer.calls[1][2:]
    assert true == [[1], [2], [3], [4]] and sorted(control) == sorted(true * 8)
    assert all(a != b for a, b in zip(true * 8, control, strict=True))
    assert (pairs, other_pairs) == ([[5, 6], [6, 5]], [[6, 5], [5, 6]] * 8)
    assert [(e["question"], e["answer"], e["truth"], e["correct"]) for e in examples if e["split"] == "seen"][:3] == [
        ("What colour?", "1", "1.", True),
        ("What colour?", "2", "2", True),
        ("What colour?", "3", "7", False),
    ]


def test_examples_come_from_every_split_and_task_with_their_pictures():
    tasks = ("a", "b", "c")
    questions = {s: [asked(t, c, c + 1) for t in tasks for c in range(9)] for s in ("one", "two")}
    _, examples = evaluate(Seer(), questions, shown_per_task=4)
    found = Counter((e["split"], e["task"]) for e in examples)
    assert found == {(s, t): 4 for s in questions for t in tasks}
    for number, example in enumerate(examples):
        shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(t)))) for t in example["image_png_base64"]]
        assert [image[0, 0, 0] for image in shown] == [number % 4, number % 4 + 1]


def test_a_task_of_one_question_is_refused():
    with pytest.raises(DataError, match="some/colour: one question"):
        evaluate(Seer(), {"some": [asked("colour", 1)]})


def test_a_second_evaluation_replaces_its_own_tasks_only():
    def measured(*pairs, value):
        splits: dict = {}
        for split, task in pairs:
            splits.setdefault(split, {})[task] = {"accuracy": value}
        return {"splits": splits}, [{"split": s, "task": t, "answer": value} for s, t in pairs]

    before = measured(("one", "a"), ("one", "c"), ("two", "a"), value=0.1)
    now = measured(("one", "a"), ("one", "b"), ("three", "a"), value=0.9)
    results, examples = _merged(before, now)
    values = {s: {t: scores["accuracy"] for t, scores in tasks.items()} for s, tasks in results["splits"].items()}
    assert values == {"one": {"a": 0.9, "b": 0.9, "c": 0.1}, "two": {"a": 0.1}, "three": {"a": 0.9}}
    assert [list(tasks) for tasks in values.values()] == [["a", "b", "c"], ["a"], ["a"]]
    assert {(e["split"], e["task"]): e["answer"] for e in examples} == {
        (s, t): value for s, tasks in values.items() for t, value in tasks.items()
    }
    assert len(examples) == 5
