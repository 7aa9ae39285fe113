"""LLaVA's records: what is read of them, where pictures stand, and every record that is refused."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from mllm_jax.data.llava import LLaVARecords
from mllm_jax.errors import ConfigError, DataError


def said(*values: str, first: str = "human") -> list[dict]:
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


GOOD = [
    {"id": "a", "image": "in/a.png", "conversations": said('<image>\nWhat {is} "it"?', "A cat. }\\", "Sure?", "Yes.")},
    {"id": 7, "conversations": said("Hello", "Hi")},
    {"id": "c", "image": ["in/a.png", "b.png"], "conversations": said("Is <image> like\n<image>\n?", "no", "So?", "é")},
    {"id": "d", "image": "in/../b.png", "conversations": said("left out", "What?\n<image>", "It.", first="gpt")},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name, shade in (("in/a.png", 10), ("b.png", 200)):
        Image.fromarray(np.full((4, 6, 3), shade, np.uint8)).save(tmp_path / name)
    return tmp_path


def source(folder, records, **options):
    text = records if isinstance(records, str) else json.dumps(records, indent=1)
    (folder / "r.json").write_text(text, "utf-8")
    return LLaVARecords("r.json", ".", data_dir=str(folder), **options).build()


@pytest.mark.parametrize("lines", [False, True])
def test_records_are_read(folder, monkeypatch, lines):
    text = "\n".join(map(json.dumps, GOOD)) if lines else json.dumps(GOOD, ensure_ascii=False)
    s = source(folder, text)
    assert len(s) == 4
    first, text_only, two, skipped = map(s.conversation, range(4))
    assert [(t.question, t.answer, t.images_at) for t in first.turns] == [
        ('What {is} "it"?', "A cat. }\\", (0,)),
        ("Sure?", "Yes.", ()),
    ]
    assert (text_only.num_images, s.images(1)) == (0, [])
    assert (two.turns[0].question, two.turns[0].images_at) == ("Is  like\n\n?", (3, 9)) and two.turns[1].answer == "é"
    assert not two.pictures_first and first.pictures_first
    assert [(t.question, t.images_at) for t in skipped.turns] == [("What?", (5,))]
    assert [int(image[0, 0, 0]) for image in s.images(2)] == [10, 200] and s.images(2)[0].shape == (4, 6, 3)
    assert int(s.images(3)[0][0, 0, 0]) == 200
    monkeypatch.setenv("MLLM_DATA_DIR", str(folder))
    small = LLaVARecords("r.json", ".", image_size=2).build()
    assert small.images(0)[0].shape == (2, 2, 3) and small.fingerprint() != s.fingerprint()
    with pytest.raises(IndexError):
        s.conversation(4)


def test_captions_leave_the_question_out(folder):
    s = source(folder, GOOD[:1] + [{"id": "x", "image": "b.png", "conversations": said("Say.\n<image>", "A dog.")}],
               version="plain")  # fmt: skip
    caption = s.conversation(1)
    assert caption.plain and [(t.question, t.answer) for t in caption.turns] == [("", "A dog.")]
    with pytest.raises(DataError, match="record 'a': 2 turn"):
        s.conversation(0)
    with pytest.raises(ConfigError, match="version 'v9'"):
        LLaVARecords("r.json", ".", version="v9")


BAD = {
    "unknown speaker": (dict(conversations=[{"from": "system", "value": "x"}]), "a message from 'system'"),
    "no answer at the end": (dict(conversations=said("a", "b", "c")), "without an assistant turn at its end"),
    "no answer at all": (dict(conversations=said("a")), "without an assistant turn at its end"),
    "only an answer": (dict(conversations=said("a", first="gpt")), "without an assistant turn"),
    "nothing said": (dict(conversations=[]), "without an assistant turn"),
    "no list": (dict(conversations="a"), "no list of `conversations`"),
    "two questions": (dict(conversations=[*said("a"), *said("b", "c")]), "turns of"),
    "empty answer": (dict(conversations=said("a", " \n")), "an empty answer"),
    "picture in an answer": (dict(conversations=said("a", "<image>"), image="b.png"), "<image> in an answer"),
    "too many": (dict(conversations=said("<image><image>", "b"), image="b.png"), r"2 time\(s\) for 1"),
    "too few": (dict(conversations=said("a", "b"), image="b.png"), r"0 time\(s\) for 1"),
    "no name": (dict(conversations=said("<image>", "b"), image=3), "image=3"),
}
OUTSIDE = ("/etc/passwd", "../b.png", "in/../../b.png", "C:\\b.png", "missing.png")


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_refused_by_their_id(folder, case):
    record, message = BAD[case]
    with pytest.raises(DataError, match=message) as told:
        source(folder, [record | dict(id="the bad one")]).conversation(0)
    assert "record 'the bad one'" in str(told.value)


@pytest.mark.parametrize("name", OUTSIDE)
def test_pictures_stay_in_their_folder(folder, name):
    (folder / "r").mkdir()
    record = dict(id="p", image=name, conversations=said("<image>", "b"))
    (folder / "r.json").write_text(json.dumps([record]))
    s = LLaVARecords("r.json", "r", data_dir=str(folder)).build()
    wanted = "cannot be read" if name == "missing.png" else "the picture '"
    with pytest.raises(DataError, match="record 'p': the picture") as told:
        s.images(0)
    assert wanted in str(told.value)


@pytest.mark.parametrize(
    "text", ["", "[]", '[{"a": 1}, {"b": ', '[{"a": 1}', '{"a": 1} x {"b": 2}', '[{"a": 1}]]', "}"]
)
def test_files_that_are_cut_short_are_refused(folder, text):
    with pytest.raises(DataError, match="r.json"):
        source(folder, text)
    with pytest.raises(DataError, match="cannot be read"):
        LLaVARecords("none.json", ".", data_dir=str(folder)).build()


def test_offsets_are_all_that_is_held(folder):
    record = json.dumps({"id": "x" * 12, "conversations": said("question " * 20, "answer " * 40)})
    text = "[" + ",\n".join([record] * 2000) + "]"
    tracemalloc.start()
    s = source(folder, text)
    del text
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(s) == 2000 and held < 200_000, held
