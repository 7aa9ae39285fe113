"""Tasks, their metrics and controls, and the files of an evaluation."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import toy_data
from PIL import Image as Pillow

import mllm_jax
from mllm_jax import Answer, Example, Message, Task, Text, evaluate
from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.data.message import Image
from mllm_jax.datasets.openmoji import evaluation as asked_of_openmoji
from mllm_jax.errors import ConfigError, DataError, RunFolderError, TooFewError
from mllm_jax.evaluation.metrics import ShuffledMedia, accuracy, count, majority, normalise, references, shuffles
from mllm_jax.evaluation.run import _example, _means, _measured, _merged
from mllm_jax.evaluation.task import CHUNK
from mllm_jax.evaluation.tasks.openmoji import openmoji_questions, openmoji_retrieval, openmoji_skills
from mllm_jax.training.evaluation import Evaluation, Prediction

METRICS = {
    "accuracy": accuracy,
    "accuracy_shuffled_media": ShuffledMedia(accuracy),
    "majority": majority,
    "n": count,
}


@dataclass(frozen=True)
class Asked:
    question: str
    answer: str
    images: tuple[np.ndarray, ...]
    id: str = ""


class Seer:
    """An assistant whose answer is the colours of its images, so that only the right images give the right answer."""

    model = SimpleNamespace(config=toy_data.MODEL)

    def __init__(self, answer=lambda question, seen: seen):
        self.say, self.calls = answer, []

    def generate(self, conversations, *, batch_size, max_new_tokens):
        self.calls.append(
            [[int(p.source[0, 0, 0]) for m in c for p in m.parts if isinstance(p, Image)] for c in conversations]
        )
        seen = [" ".join(map(str, each)) for each in self.calls[-1]]
        return [Answer(self.say(c[-1].text, each), ()) for c, each in zip(conversations, seen, strict=True)]


def image(colour: int) -> np.ndarray:
    return np.full((4, 4, 3), colour, np.uint8)


def asked(*colours: int, question: str = "What colour?", answer: str | None = None, id: str = "") -> Asked:
    return Asked(question, answer or " ".join(map(str, colours)), tuple(map(image, colours)), id)


def ask(example: Asked):
    return [Message("user", (*map(Image, example.images), Text(example.question)))]


def task(*examples: Asked, name: str = "seen/colour", metrics=METRICS) -> Task:
    return Task(name, examples, ask, metrics)


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
    for number in (2, 3, 10, 57, 500):
        for seed in range(5):
            for order in shuffles(number, seed):
                assert sorted(order) == list(range(number))
                assert (order != np.arange(number)).all()
    assert (shuffles(50, 1)[0] != shuffles(50, 2)[0]).any()
    assert np.array_equal(shuffles(50), shuffles(50))


def test_few_questions_are_shuffled_several_times():
    assert [len(shuffles(number)) for number in (2, 60, 100, 300, 1000)] == [8, 5, 3, 1, 1]
    assert len({tuple(order) for order in shuffles(60)}) == 5


def test_majority_counts_answers_as_they_are_compared():
    assert majority([], [{"answer": text} for text in ("Yes", "yes.", "no")]) == 2 / 3
    assert majority([], [{"answer": text} for text in "abcd"]) == 1 / 4
    several = [{"answers": ["a cat", "cat"]}, {"answers": ["cat", "kitten"]}, {"answer": "dog"}]
    assert majority([], several) == 2 / 3


def test_references_of_every_kind_of_example():
    talk = (Message("user", "a?"), Message("assistant", "b"), Message("user", "c?"), Message("assistant", "d"))
    assert references(Example(talk)) == ("d",) and references(Example(talk[:1])) == ()
    assert references(asked(1)) == references({"answer": "1"}) == references({"answers": ["1"]}) == ("1",)
    assert references({}) == references(3) == ()
    with pytest.raises(DataError, match="an example without an answer"):
        accuracy([Answer("a", ())], [{"question": "a"}])


def test_scores_and_controls_computed_by_hand(tmp_path):
    seer = Seer()
    # The assistant's answer to the third is wrong.
    found = evaluate(
        seer, task(asked(1, answer="1."), asked(2, id="two"), asked(3, answer="7"), asked(4)), out=tmp_path
    )
    assert found == {"accuracy": 3 / 4, "accuracy_shuffled_media": 0.0, "majority": 1 / 4, "n": 4}
    # The control asks about the same images, each with another question; images of one question stay together.
    (call,) = seer.calls
    true, control = call[:4], call[4:]
    assert true == [[1], [2], [3], [4]] and sorted(control) == sorted(true * 8)
    assert all(a != b for a, b in zip(true * 8, control, strict=True))
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    same = {"task": "seen/colour", "question": "What colour?", "correct": True}
    assert lines[:2] == [
        {**same, "index": 0, "answer": "1", "reference": "1."},
        {**same, "id": "two", "answer": "2", "reference": "2"},
    ]
    assert [line["correct"] for line in lines] == [True, True, False, True]

    pairs = Seer()
    assert evaluate(pairs, task(asked(5, 6), asked(6, 5)))["accuracy"] == 1
    assert pairs.calls == [[[5, 6], [6, 5], *([[6, 5], [5, 6]] * 8)]]
    # The answer is in the question: images make no difference, and the control shows it.
    blind = [asked(c, question=f"Say {c}", answer="9" if c < 3 else "8") for c in (1, 2, 3)]
    found = evaluate(Seer(lambda question, seen: "9"), task(*blind))
    assert found == {"accuracy": 2 / 3, "accuracy_shuffled_media": 2 / 3, "majority": 2 / 3, "n": 3}


def test_a_limit_takes_the_first_and_what_cannot_be_said_is_left_out(tmp_path):
    def length(answers, examples):
        return float(np.mean([len(answer.text) for answer in answers]))

    free = Task("free", [{"q": "a b"}, {"q": "c"}, {"q": "d"}], lambda x: x["q"], {"length": length})
    found = evaluate(Seer(lambda question, seen: question), free, limit=2, out=tmp_path / "new")
    assert found == {"length": 2.0}
    lines = [json.loads(line) for line in (tmp_path / "new" / "predictions.jsonl").read_text().splitlines()]
    assert lines == [{"task": "free", "index": i, "question": q, "answer": q} for i, q in enumerate(("a b", "c"))]
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"limit {limit}"):
            evaluate(Seer(), free, limit=limit)


def test_predictions_of_other_tasks_stay_in_the_folder(tmp_path):
    def said() -> list[tuple[str, str]]:
        lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
        return [(line["task"], line["answer"]) for line in lines]

    first, second = (Task(name, ["a"], lambda x: x, {"n": lambda answers, _: len(answers)}) for name in ("1", "2"))
    for task, answer in ((first, "old"), (second, "b"), (first, "new")):
        evaluate(Seer(lambda question, seen, answer=answer: answer), task, out=tmp_path)
    assert said() == [("2", "b"), ("1", "new")]
    (tmp_path / "predictions.jsonl").write_text("no json\n")
    unasked = Seer()
    with pytest.raises(RunFolderError, match="predictions.jsonl, line 1"):
        evaluate(unasked, first, out=tmp_path)
    assert not unasked.calls and (tmp_path / "predictions.jsonl").read_text() == "no json\n"


def test_media_of_another_number_are_exchanged_and_examples_without_are_left_out():
    seer = Seer()
    mixed = task(asked(1), asked(2, 3), asked(question="none", answer="x"))
    assert evaluate(seer, mixed)["n"] == 3
    assert seer.calls == [[[1], [2, 3], [], *([[2, 3], [1]] * 8)]]
    turns = [
        Message("user", (Image(image(1)), Text("a"))),
        Message("assistant", "b"),
        Message("user", (Text("c"), Image(image(2)))),
    ]
    other = [Message("user", (Image(image(3)), Image(image(4)), Text("d")))]
    (_, first), (_, second), *_ = ShuffledMedia(accuracy).again([tuple(turns), tuple(other)])
    shown = [[int(p.source[0, 0, 0]) for p in m.parts if isinstance(p, Image)] for m in first]
    assert shown == [[3], [], [4]] and [m.text for m in first] == ["a", "b", "c"] and len(second) == 1


def test_many_conversations_are_asked_in_pieces_and_answers_keep_their_order():
    seer = Seer()
    found = evaluate(seer, task(*(asked(c % 200) for c in range(CHUNK)), metrics={"accuracy": accuracy, "n": count}))
    assert found == {"accuracy": 1.0, "n": CHUNK} and len(seer.calls) == 1
    found = evaluate(seer, task(*(asked(c % 200) for c in range(CHUNK))))
    assert found["accuracy"] == 1.0 and [len(call) for call in seer.calls[1:]] == [CHUNK, CHUNK]


@pytest.mark.parametrize("examples", [[asked(1)], [asked(question="a", answer="b")] * 3])
def test_a_control_without_two_examples_with_media_is_refused(examples):
    with pytest.raises(DataError, match="shuffled media of"):
        evaluate(Seer(), task(*examples))


def test_tasks_with_too_few_examples_are_left_out_with_a_line_for_each_reason(capsys):
    class Absent:
        def build(self):
            raise TooFewError("no images", "some", "draw them")

    tasks = [task(asked(1), name="one"), Task("absent", Absent(), ask, METRICS), task(name="none")]
    tasks += [Task("absent too", Absent(), ask, METRICS), task(asked(1), asked(2), name="two")]
    assert list(_measured(Seer(), tasks, 8)) == ["two"]
    assert capsys.readouterr().out.splitlines() == [
        "left out one: shuffled media of 1 example(s) with media; raise the number of examples",
        "left out absent, absent too: no images; draw them",
        "left out none: task 'none' with 0 example(s), limit None; change the source",
    ]
    with pytest.raises(TooFewError, match="shuffled media of 1"):
        _measured(Seer(), tasks[:-1], 8)
    assert capsys.readouterr().out == ""


def test_what_is_no_task_is_refused():
    with pytest.raises(DataError, match="task 'seen/colour' with 0 example"):
        evaluate(Seer(), task())
    for source in ("own.json", 3, {"a": 1}):
        with pytest.raises(ConfigError, match="task 't' with a source that is a"):
            evaluate(Seer(), Task("t", source, ask, METRICS))
    with pytest.raises(ConfigError, match="task 'x'"):
        Task("x", (), ask, {})
    for value in (float("nan"), "high", None):
        with pytest.raises(DataError, match="metric 'odd' of task 'seen/colour'"):
            evaluate(Seer(), task(asked(1), metrics={"odd": lambda answers, examples, value=value: value}))
    blind = SimpleNamespace(model=SimpleNamespace(config=toy_data.DUAL))
    with pytest.raises(ConfigError, match="task 'seen/colour' for a DualEncoderConfig"):
        evaluate(blind, task(asked(1)))


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_asked(tmp_path):
    (tmp_path / "file").touch()
    seer = Seer()
    with pytest.raises(RunFolderError, match="a folder that can be written"):
        evaluate(seer, task(asked(1), asked(2)), out=tmp_path / "file" / "out")
    assert seer.calls == []


def test_a_source_is_an_object_a_config_or_a_sequence():
    source = toy_data.Toy(size=3)
    tasks = [Task("t", given, ask, {"n": count}) for given in (source, source.build(), [*range(3)])]
    assert [len(each.examples()) for each in tasks] == [3, 3, 3]
    assert tasks[0].examples(2)[1].messages[1].text == "green" and tasks[2].examples(2) == [0, 1]


def test_tasks_are_described_and_found_again_equal():
    tasks = (*openmoji_questions(), *openmoji_skills(), *openmoji_retrieval())
    assert all(isinstance(each, Evaluation) for each in tasks)
    again = rebuild(json.loads(json.dumps(describe(tasks))))
    assert again == tasks and hash(again) == hash(tasks)
    assert mllm_jax.Task is Task and mllm_jax.evaluate is evaluate


def test_a_config_touches_no_data(monkeypatch):
    monkeypatch.setattr(asked_of_openmoji, "evaluation_questions", lambda *_: pytest.fail("the data are read"))
    asked_of_openmoji._questions.cache_clear()
    tasks = openmoji_questions(splits=("composition", "unseen"), data_dir="nowhere")
    assert [task.name for task in tasks][:2] == ["composition/naming", "composition/subcategory"]
    assert "unseen/category" in [task.name for task in tasks]


def test_openmoji_questions_are_those_of_their_kind():
    for each in openmoji_questions(splits=("unseen",), image_size=16, limit=4):
        found = each.examples()
        assert {question.task for question in found} == {each.source.kind} and len(found) == 4
    for each in openmoji_skills(image_size=16, limit=4):
        assert [question.task for question in each.examples(3)] == [each.name.partition("/")[2]] * 3


def test_a_large_image_is_small_in_the_report(tmp_path):
    Pillow.new("RGB", (2000, 1000), (9, 8, 7)).save(tmp_path / "a.png")
    shown = [Image(str(tmp_path / "a.png")), Image(image(5))]
    made = _example("seen/a", Prediction(0, "q", tuple(shown), "a", None, None))
    large, small = (Pillow.open(io.BytesIO(base64.b64decode(text))) for text in made["image_png_base64"])
    assert (large.size, large.getpixel((9, 9)), small.size) == ((256, 128), (9, 8, 7), (4, 4))
    assert made["reference"] is None and made["correct"] is None


def test_a_second_evaluation_replaces_its_own_tasks_only():
    known = ["one/a", "one/b", "one/c", "two/a"]
    before = [{"task": name, "answer": 1} for name in ("one/a", "one/c", "two/a", "gone")]
    now = [{"task": name, "answer": 2} for name in ("one/b", "one/a")]
    merged = _merged(known, {"one/a": {}, "one/b": {}}, before, now)
    assert [(entry["task"], entry["answer"]) for entry in merged] == [
        ("one/a", 2),
        ("one/b", 2),
        ("one/c", 1),
        ("two/a", 1),
    ]


def test_a_task_is_meant_by_its_whole_name_or_a_side_of_it():
    assert all(_means(wanted, "unseen/naming") for wanted in ("unseen/naming", "unseen", "naming"))
    assert not any(_means(wanted, "unseen/naming") for wanted in ("ming", "uns", "unseen/", "/naming", ""))
