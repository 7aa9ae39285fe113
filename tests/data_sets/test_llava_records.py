"""LLaVA's records: their content, the positions of images, and refusals."""

from __future__ import annotations

import json
import os
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from toy_data import MODEL, processor

from mllm_jax.data.message import TEXT_ROLE, Example, Text
from mllm_jax.data.pipeline import Mixture, Pipeline, Weighted
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.datasets.llava import LLaVARecords
from mllm_jax.errors import ConfigError, DataError


def said(*values: str, first: str = "human") -> list[dict]:
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def parts_of(example: Example) -> list:
    """Returns the parts of each message, with images as placeholders; an answer is one text."""
    roles = [message.role for message in example.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2) or roles == [TEXT_ROLE]
    return [
        m.content if m.role == "assistant" else [p.text if isinstance(p, Text) else "<image>" for p in m.parts]
        for m in example.messages
    ]


def images(source, index: int) -> list[np.ndarray]:
    return [np.asarray(part.source) for part in source.example(index).media]


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
    first, text_only, two, skipped = map(parts_of, map(s.example, range(4)))
    assert first == [["<image>", 'What {is} "it"?'], "A cat. }\\", ["Sure?"], "Yes."]
    assert text_only == [["Hello"], "Hi"]
    assert two == [["Is ", "<image>", " like\n", "<image>", "\n?"], "no", ["So?"], "é"]
    assert skipped == [["What?", "<image>"], "It."]
    assert [s.example(index).id for index in range(4)] == ["record 'a'", "record 7", "record 'c'", "record 'd'"]
    assert [int(image[0, 0, 0]) for image in images(s, 2)] == [10, 200] and images(s, 2)[0].shape == (4, 6, 3)
    assert int(images(s, 3)[0][0, 0, 0]) == 200
    monkeypatch.setenv("MLLM_DATA_DIR", str(folder))
    small = LLaVARecords("r.json", ".", image_size=2).build()
    assert images(small, 0)[0].shape == (2, 2, 3) and small.fingerprint() != s.fingerprint()
    for index in (4, -1):
        with pytest.raises(IndexError):
            s.example(index)


def test_captions_leave_the_question_out(folder):
    s = source(folder, GOOD[:1] + [{"id": "x", "image": "b.png", "conversations": said("Say.\n<image>", "A dog.")}],
               version="plain")  # fmt: skip
    (caption,) = s.example(1).messages
    assert caption.role == TEXT_ROLE and parts_of(s.example(1)) == [["<image>", "A dog."]]
    with pytest.raises(DataError, match="record 'a': 2 turn"):
        s.example(0)
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
    "image in an answer": (dict(conversations=said("a", "<image>"), image="b.png"), "<image> in an answer"),
    "too many": (dict(conversations=said("<image><image>", "b"), image="b.png"), r"2 time\(s\) for 1"),
    "too few": (dict(conversations=said("a", "b"), image="b.png"), r"0 time\(s\) for 1"),
    "no name": (dict(conversations=said("<image>", "b"), image=3), "image=3"),
}
OUTSIDE = ("/etc/passwd", "../b.png", "in/../../b.png", "C:\\b.png", "missing.png")


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_refused_by_their_id(folder, case):
    record, message = BAD[case]
    with pytest.raises(DataError, match=message) as refusal:
        source(folder, [record | dict(id="the bad one")]).example(0)
    assert "record 'the bad one'" in str(refusal.value)


@pytest.mark.parametrize("name", OUTSIDE)
def test_images_stay_in_their_folder(folder, name):
    (folder / "r").mkdir()
    record = dict(id="p", image=name, conversations=said("<image>", "b"))
    (folder / "r.json").write_text(json.dumps([record]))
    s = LLaVARecords("r.json", "r", data_dir=str(folder)).build()
    wanted = "cannot be read" if name == "missing.png" else "a file inside the folder"
    with pytest.raises(DataError, match=r"record 'p': the \w+ ") as refusal:
        images(s, 0)
    assert wanted in str(refusal.value)


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


WRONG = {
    "a CSV": ("name,text\n" + "a,b\n" * 250_000, "byte 0 (line 1), where 'n' is"),
    "letters": ("a" * 1_000_000, "byte 0 (line 1), where 'a' is"),
    "a list of strings": (json.dumps(["a cat"] * 100_000), "byte 1 (line 1), where '\"' is"),
    "a long string": ('[{"id": 1},\n "' + "a" * 1_000_000 + '"]', "byte 13 (line 2), where '\"' is"),
    "a string without an end": ('[{"id": "' + "a" * 1_000_000, "byte 8 (line 1), where '\"' is"),
    "letters in a record": ('[{"id": ' + "a" * 1_000_000, "byte 1,000,008 (line 1), where the file's end is"),
    "quotes": ('{"a": ' + '"' * 1_000_001, "byte 1,000,006 (line 1), where '\"' is"),
    "zeros in a record": ('[{"id": "\0', "byte 8 (line 1), where '\"' is"),
    "a comma at the end": ('[{"id": 1},\n]', "byte 12 (line 2), where ']' is"),
    "two lists": ('[{"id": 1}]\n[{"id": 1}]', "byte 12 (line 2), where '[' is"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_at_its_first_wrong_byte(folder, case):
    """Checks that one pass suffices: a reader that restarted at each byte took minutes for a megabyte."""
    text, where = WRONG[case]
    before = time.thread_time()
    with pytest.raises(DataError) as refusal:
        source(folder, text)
    assert where in str(refusal.value) and "r.json" in str(refusal.value)
    assert time.thread_time() - before < 1


def test_a_sparse_file_and_a_pipe_are_refused_at_once(folder):
    with open(folder / "zeros.json", "wb") as file:
        file.truncate(100 << 30)
    os.mkfifo(folder / "pipe.json")
    before = time.thread_time()
    for name, said_of_it in (("zeros.json", "byte 0 "), ("pipe.json", "no regular file"), ("a\0.json", "null")):
        with pytest.raises(DataError, match=said_of_it):
            LLaVARecords(name, ".", data_dir=str(folder)).build()
    assert time.thread_time() - before < 1


BROKEN = {
    "nested": '{"id": "n", "x": ' + "[" * 100_000 + "0" + "]" * 100_000 + "}",
    "nested objects": '{"id": "n", "x": ' + '{"a": ' * 100_000 + "0" + "}" * 100_001,
    "half a character in a question": json.dumps({"id": "h", "conversations": said("\ud800", "b")}),
    "half a character in an answer": json.dumps({"id": "h", "conversations": said("a", "b\udc00")}),
    "half a character in a name": json.dumps({"image": "\ud800.png", "conversations": said("<image>", "b")}),
    "NUL in a name": json.dumps({"image": "a\0.png", "conversations": said("<image>", "b")}),
    "a number too long": '{"id": ' + "1" * 5_000 + "}",
    "no UTF-8": '{"id": "LATIN"}',
    "a name in lists": '{"image": ' + "[" * 500 + '"a"' + "]" * 500 + "}",
    "a speaker in lists": '{"id": "s", "conversations": [{"from": ' + "[" * 500 + '"a"' + "]" * 500 + "}]}",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_record_costs_itself_and_no_other(folder, case):
    good = json.dumps(GOOD[1])
    (folder / "r.json").write_bytes("\n".join([good, BROKEN[case], good]).encode().replace(b"LATIN", b"\xff"))
    records = LLaVARecords("r.json", ".", data_dir=str(folder))
    s = records.build()
    assert len(s) == 3 and parts_of(s.example(0)) == parts_of(s.example(2)) == [["Hello"], "Hi"]
    with pytest.raises(DataError) as refusal:
        s.example(1)
    str(refusal.value).encode()
    assert len(str(refusal.value)) < 1_000
    mixture = Mixture((Weighted(records),), rows=1, length=64, slots={"image": 1}, max_bad_share=0.4)
    (measured,) = Pipeline(mixture, processor(MODEL, Tokenizer.train(["Hello Hi"], 300)), seed=0).measured
    assert measured.lengths.astype(bool).tolist() == [True, False, True] and [i for i, _ in measured.bad] == [1]


def test_links_inside_the_folder_are_followed_and_must_lead_to_images(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "b.png").rename(elsewhere / "b.png")
    (elsewhere / "secret").write_text("root:x:0:0")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    names = ["linked/b.png", "linked/secret", "loop.png", "zero.png", "pipe.png"]
    s = source(folder, [dict(id=name, image=name, conversations=said("<image>", "b")) for name in names])
    assert int(images(s, 0)[0][0, 0, 0]) == 200
    for index in range(1, len(names)):
        with pytest.raises(DataError, match=f"record '{names[index]}'") as refusal:
            images(s, index)
        assert "x:0:0" not in str(refusal.value)
