"""The user's own questions: records, refusals, and the resulting task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image as Pillow

from mllm_jax import Answer, Questions
from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.errors import DataError
from mllm_jax.evaluation.metrics import accuracy, references
from mllm_jax.evaluation.tasks.questions import ask, questions_task

CHOICES = ["a cat", "a dog", "C"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "media").mkdir()
    for name in "ab":
        Pillow.new("RGB", (4, 4)).save(tmp_path / "media" / f"{name}.png")
    return tmp_path


def write(folder: Path, records: list, name: str = "own.json") -> Questions:
    lines = "\n".join(json.dumps(record) for record in records) + "\n"
    (folder / name).write_text(json.dumps(records) if name.endswith(".json") else lines)
    return Questions(folder / name, folder / "media")


RECORDS = [
    {"question": "What is it?", "image": "a.png", "answer": ["a cat", "cat"], "id": 7, "source": "the web"},
    {"question": "Which?", "images": ["a.png", "b.png"], "choices": CHOICES, "answer": "b"},
    {"question": "Why?", "answer": "because"},
]


@pytest.mark.parametrize("name", ["own.json", "own.jsonl"])
def test_a_list_and_lines_are_read_alike(folder, name):
    first, second, third = write(folder, RECORDS, name).build()
    assert (first.question, first.answers, first.id) == ("What is it?", ("a cat", "cat"), "7")
    assert [image.source for image in first.images] == [str(folder / "media" / "a.png")]
    assert len(second.images) == 2 and second.choices == tuple(CHOICES) and third.images == ()
    (folder / "media" / name).write_text((folder / name).read_text())
    assert len(Questions(str(folder / "media" / name)).build()) == 3, "names are relative to the file's own folder"


def test_questions_are_a_source(folder):
    """Checks access by length and index, and that a replaced file is read again."""
    source = write(folder, [{"question": "Why?", "answer": "so", "question_id": 8}, RECORDS[2]])
    assert len(source) == 2 and source.example(0).id == "8" and source.example(1) == source.build()[1]
    (folder / "own.json").write_text(json.dumps(RECORDS))
    assert [source.example(index).question for index in range(len(source))] == ["What is it?", "Which?", "Why?"]
    with pytest.raises(DataError, match="cannot be read"):
        len(Questions("a\0.json"))


def test_choices_are_offered_by_letter_and_named_by_letter_or_text(folder):
    for answer in ("b", "B", 1, "A  dog"):
        (question,) = write(folder, [{**RECORDS[1], "answer": answer}]).build()
        (message,) = ask(question)
        assert message.text.splitlines()[:4] == ["Which?", "A. a cat", "B. a dog", "C. C"]
        assert [type(part).__name__ for part in message.parts] == ["Image", "Image", "Text"]
        assert references(question)[0] == "B. a dog"
        right = ("B", "b.", "(B)", "B)", "B. a dog", "b) A dog", "B: a dog", "a dog")
        assert [accuracy([Answer(said, ())], [question]) for said in right] == [1] * len(right)
        assert not any(accuracy([Answer(said, ())], [question]) for said in ("A", "a cat", "dog", "", "AB"))
    (question,) = write(folder, [{"question": "?", "choices": ["B", "A"], "answer": 1}]).build()
    assert [accuracy([Answer(said, ())], [question]) for said in ("B", "A", "B. A")] == [1, 0, 1]


def test_controls_are_made_where_there_is_something_to_compare(folder):
    def metrics(records, limit=None):
        source = write(folder, records)
        return list(questions_task(source.path, source.media_folder, limit=limit).metrics)

    assert metrics(RECORDS) == ["accuracy", "accuracy_shuffled_media", "majority", "n"]
    assert metrics(RECORDS, limit=1) == metrics(RECORDS[2:]) == ["accuracy", "n"]
    assert metrics(RECORDS[1:]) == ["accuracy", "majority", "n"]
    task = questions_task(write(folder, RECORDS).path, folder / "media")
    assert task.source == Questions(folder / "own.json", folder / "media")
    assert rebuild(json.loads(json.dumps(describe(task)))) == task


@pytest.mark.parametrize(
    ("change", "given", "expected"),
    [
        (["What?"], "['What?']", "an object"),
        ({"question": None}, "question None", "question as a text"),
        ({"question": " "}, "question ' '", "question as a text"),
        ({"question": "\ud800"}, "question", "question as a text"),
        ({"answer": None}, "answer None", "answer as a text"),
        ({"answer": []}, "answer []", "answer as a text"),
        ({"answer": ["a", 3]}, "answer 3", "answer as a text"),
        ({"image": "a.png", "images": []}, "image and images", "either"),
        ({"image": 3}, "image(s) [3]", "a name"),
        ({"images": "a.png"}, "image(s) 'a.png'", "a list of names"),
        ({"image": "a\0.png"}, "image(s)", "a name"),
        ({"image": "c.png"}, "no image {}/media/c.png", "a file"),
        ({"image": "x" * 300}, "no image", "a file"),
        ({"image": "../own.json"}, "the image '../own.json'", "inside {}/media"),
        ({"image": "b/../../own.json"}, "the image 'b/../../own.json'", "inside"),
        ({"image": "/etc/hosts"}, "the image '/etc/hosts'", "inside"),
        ({"image": "C:\\a.png"}, "the image 'C:", "inside"),
        ({"choices": ["a"]}, "choices ['a']", "2 to 26"),
        ({"choices": ["a", "A "]}, "choices", "texts that differ"),
        ({"choices": ["a", 1]}, "choices 1", "choices as a text"),
        ({"choices": CHOICES, "answer": "D"}, "answer 'D' to 3 choices", "a letter A to C, an index 0 to 2"),
        ({"choices": CHOICES, "answer": 3}, "answer 3 to 3 choices", "an index 0 to 2"),
        ({"choices": CHOICES, "answer": True}, "answer True to 3 choices", "a letter"),
        ({"choices": ["B", "A"], "answer": "A"}, "answer 'A', which is A. B or B. A", "a letter"),
        ({"id": {}}, "id {{}}", "a text or a number"),
    ],
)
def test_a_bad_record_is_refused_by_its_index_or_line(folder, change, given, expected):
    bad = change if isinstance(change, list) else {"question": "What?", "answer": "a"} | change
    for name, place in (("own.json", "own.json, index 1"), ("own.jsonl", "own.jsonl, line 2")):
        with pytest.raises(DataError) as refusal:
            write(folder, [RECORDS[2], bad], name).build()
        assert refusal.value.given.startswith(f"{folder / place}: ") and given.format(folder) in refusal.value.given
        assert expected.format(folder) in refusal.value.expected and refusal.value.todo


@pytest.mark.parametrize("missing", ["question", "answer"])
def test_what_a_record_lacks_is_named(folder, missing):
    for more in ({}, {"choices": CHOICES}):
        record = {"question": "What?", "answer": "A"} | more
        del record[missing]
        with pytest.raises(DataError, match=f"index 0: no {missing}"):
            write(folder, [record]).build()


@pytest.mark.parametrize(
    ("name", "text", "given"),
    [
        ("own.json", "{", "own.json"),
        ("own.json", "{}", "own.json with a dict"),
        ("own.json", "[]", "own.json: none"),
        ("own.jsonl", '{"question": "a", "answer": "b"}\n{', "own.jsonl, line 2"),
        ("own.jsonl", "\n \n", "own.jsonl: none"),
        ("own.csv", "question,answer", "own.csv"),
        ("absent.json", None, "absent.json cannot be read"),
    ],
)
def test_a_file_that_has_no_records_is_refused(folder, name, text, given):
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(DataError) as refusal:
        Questions(folder / name).build()
    assert given in refusal.value.given and refusal.value.todo
