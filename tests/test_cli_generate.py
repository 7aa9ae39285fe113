"""`mllm generate`: several images after one option, and many prompts into a file that a later command continues."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from rich.console import Console
from tiny_llava import write_llava

from mllm_jax.cli import main
from mllm_jax.cli.generate import one_medium_each
from mllm_jax.cli.progress import Count
from mllm_jax.data.message import Image, Message, Text
from mllm_jax.errors import DataError
from mllm_jax.generation.answers_file import AnswersFile
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.engine import Engine
from mllm_jax.generation.prompts import PromptFile, PromptFolder

HOW = ["--max-new-tokens", "4", "--batch-size", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def assistant(model):
    return Assistant.load(model)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Returns six images, some in a subfolder, and a file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep").mkdir()
    for number, name in enumerate(("b.png", "deep/a.jpg", "a.png", "c.PNG", "deep/z.png", "d.png")):
        noise = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
        Pillow.fromarray(noise).save(folder / name, "PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def answers(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def said(assistant: Assistant, question: str, *files: Path) -> str:
    """Returns the assistant's answer to one question alone."""
    parts = (*(Image(str(file)) for file in files), Text(question))
    return assistant.generate(Message("user", parts if files else question), max_new_tokens=4).text


LINES = [
    '"what is it ?"',
    '{"prompt": "is it a cat", "image": "a.png", "id": "seven"}',
    "{broken",
    '{"prompt": "what", "image": ["a.png", "b.png"], "id": 8}',
    "",
    '{"prompt": "what", "image": "late.png"}',
    '{"question": "what"}',
    '[{"role": "user", "content": [{"type": "image", "path": "deep/z.png"}, {"type": "text", "text": "is it red"}]}]',
    '{"messages": [{"role": "user", "content": "a dog ?"}]}',
]


def test_a_file_of_prompts(model, assistant, images, tmp_path, capsys):
    """Checks that bad lines are reported and the others answered, and that a repeated command asks about new media."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(LINES))
    command = ["generate", str(model), "--prompts", str(prompts), "--media", str(images), "--out", str(out), *HOW]
    assert main([*command, "--stats"]) == 1
    shown = capsys.readouterr()
    assert shown.out == f"{out}: 5 answers, 3 prompts without one\n"
    for line, reason in ((3, "JSON"), (6, "late.png cannot be read"), (7, "either")):
        assert [text for text in shown.err.splitlines() if f"prompts.jsonl, line {line}: " in text and reason in text]
    assert shown.err.count("prompts.jsonl, line") == 3 and "8/8 answers" in shown.err and "tokens/s" in shown.err
    wanted = {
        0: (0, said(assistant, "what is it ?")),
        1: ("seven", said(assistant, "is it a cat", images / "a.png")),
        3: (8, said(assistant, "what", images / "a.png", images / "b.png")),
        6: (6, said(assistant, "is it red", images / "deep" / "z.png")),
        7: (7, said(assistant, "a dog ?")),
    }
    found = answers(out)
    assert {line["index"]: (line["id"], line["text"]) for line in found} == wanted
    assert [line["index"] for line in found] == sorted(wanted)
    assert all(line.keys() == {"id", "index", "text", "reason", "tokens"} for line in found)
    assert all(line["reason"] == "length" and line["tokens"] == 4 for line in found if line["tokens"] == 4)

    kept = out.read_text().splitlines()
    Pillow.new("RGB", (8, 8), "red").save(images / "late.png")
    try:
        assert main(command) == 1
    finally:
        (images / "late.png").unlink()
    assert "5 of 8 are answered already" in capsys.readouterr().err
    assert [line["index"] for line in answers(out)] == [0, 1, 3, 4, 6, 7]
    assert [line for line in out.read_text().splitlines() if '"index": 4' not in line] == kept


def test_a_folder_of_images_interrupted_and_continued(model, assistant, images, tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    command = [
        "generate",
        str(model),
        "what is it ?",
        "--prompts",
        str(images),
        "--max-new-tokens",
        "4",
        "--batch-size",
    ]
    assert main([*command, "2", "--out", str(whole)]) == 0
    names = ["a.png", "b.png", "c.PNG", "d.png", "deep/a.jpg", "deep/z.png"]
    assert [line["image"] for line in answers(whole)] == names == [line["id"] for line in answers(whole)]
    assert answers(whole)[4]["text"] == said(assistant, "what is it ?", images / "deep" / "a.jpg")
    assert len({line["text"] for line in answers(whole)}) > 1
    capsys.readouterr()

    real, ended = Engine.step, []

    def step(engine, *arguments):
        if len(ended) >= 2:
            raise KeyboardInterrupt
        found = real(engine, *arguments)
        ended.extend(found)
        return found

    monkeypatch.setattr(Engine, "step", step)
    assert main([*command, "2", "--out", str(out)]) == 130
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"interrupted: 2 of 6 are answered in {out}; the same command continues from there\n" in shown.err
    assert out.read_bytes() == b"".join(whole.read_bytes().splitlines(keepends=True)[:2])

    monkeypatch.setattr(Engine, "step", real)
    with out.open("ab") as file:
        file.write(b'{"id": "c.PNG", "index": 2, "te')  # as after a kill in the middle of a line
    assert main([*command, "3", "--out", str(out)]) == 0  # the batch size may change
    assert out.read_bytes() == whole.read_bytes()
    monkeypatch.setattr("mllm_jax.cli.generate.assistant_of", None)  # all have answers: nothing is loaded
    assert main([*command, "2", "--out", str(out)]) == 0


def test_several_images_after_one_option(model, assistant, images, capsys):
    files = [images / "a.png", images / "b.png"]
    asked = ["generate", str(model), "--image", *map(str, files), "what is it ?", "--max-new-tokens", "4"]
    assert main(asked) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == said(assistant, "what is it ?", *files) != said(assistant, "what is it ?", files[0])


WORDS = {
    "a question last": "M --image a b Q",
    "a question first": "M Q --image a b",
    "one each": "M --image a --image b Q",
    "one each, a question between": "M --image a Q --image b",
    "an option between": "M --image a b Q --top-k 3",
    "an option before": "M --top-k 3 --image a b Q",
    "a flag": "M --stats --image a b Q",
    "all last": "--image a b M Q",
    "by equals": "M --image=a b Q",
}


@pytest.mark.parametrize("name", WORDS)
def test_the_last_word_after_images_is_the_question(name):
    found = one_medium_each(WORDS[name].split())
    assert found[:2] == ["M", "Q"] and found[-4:] == ["--image", "a", "--image", "b"]
    rest = [word for word in WORDS[name].split() if word.startswith(("--top", "--st")) or word == "3"]
    assert found[2:-4] == rest


def test_images_and_videos_in_one_question():
    found = one_medium_each(["M", "--image", "a", "b", "--video", "c", "--video=d", "Q", "--frames", "8"])
    media = ["--image", "a", "--image", "b", "--video", "c", "--video", "d"]
    assert found == ["M", "Q", "--frames", "8", *media]
    heard = ["M", "--use-audio-in-video", "Q", "--video", "c"]
    assert one_medium_each(heard) == ["M", "Q", "--use-audio-in-video", "--video", "c"]
    assert one_medium_each(["M", "Q", "--video", "c", "d"]) == ["M", "Q", "--video", "c", "--video", "d"]
    heard = one_medium_each(["M", "--image", "a", "--audio", "e", "f", "Q"])
    assert heard == ["M", "Q", "--image", "a", "--audio", "e", "--audio", "f"]


REFUSED = {
    "a folder of images": ("--image {images} Q", '"Q" --prompts {images} --out answers.jsonl'),
    "no question": ("", "what to ask"),
    "an image and no question": ("--image {images}/a.png", "what to ask"),
    "images and no question": ("--image {images}/a.png {images}/b.png", "b.png as the question"),
    "no out": ("Q --prompts {images}", "without --out"),
    "media of many": ("Q --prompts {images} --out {new} --steps 3", "options of media with --prompts"),
    "a batch of one question": ("Q --batch-size 2", "--batch-size without --prompts"),
    "an empty batch": ("Q --prompts {images} --out {new} --batch-size 0", "batch_size 0"),
    "a folder without a question": ("--prompts {images} --out {new}", "without a question"),
    "a folder with media": ("Q --prompts {images} --media {images} --out {new}", "--media for a folder"),
    "a folder without images": ("Q --prompts {empty} --out {new}", "{empty} without"),
    "a file with a question": ("Q --prompts {file} --out {new}", "beside the file"),
    "images and prompts": ("--image {images}/a.png --prompts {file} --out {new}", "--image with --prompts"),
    "videos and prompts": ("--video {images}/a.png --prompts {file} --out {new}", "--video with --prompts"),
    "sounds and prompts": ("--audio {images}/a.wav --prompts {file} --out {new}", "--audio with --prompts"),
    "an image as a sound": ("Q --audio {images}/a.png", "a.png"),
    "a sound and no question": ("--audio {images}/a.png {images}/b.png", "b.png as the question"),
    "frames of no video": ("Q --frames 8", "with --video FILE"),
    "the sound of no video": ("Q --use-audio-in-video", "without a video"),
    "no place for its sound": ("Q --image {images}/a.png --use-audio-in-video", "with --video FILE"),
    "no frames": ("Q --video {images}/a.png --frames 0", "at least 1"),
    "an image as a video": ("Q --video {images}/a.png", "cannot be opened as a video"),
    "text as a video": ("Q --video {images}/notes.txt", "cannot be opened as a video"),
    "no file": ("--prompts {empty}/none.jsonl --out {new}", "none.jsonl cannot be read"),
    "no jsonl": ("--prompts {images}/notes.txt --out {new}", "one prompt a line"),
    "no prompts": ("--prompts {blank} --out {new}", "at least one line"),
    "no folder of media": ("--prompts {file} --media {images}/a.png --out {new}", "a folder that exists"),
    "answers to no jsonl": ("--prompts {file} --out {empty}/a.txt", "change --out"),
    "answers to a folder that is not": ("--prompts {file} --out {empty}/no/a.jsonl", "change --out"),
    "answers of another origin": ("--prompts {file} --out {file}", "without prompts.jsonl.asked.json beside it"),
}


@pytest.fixture(scope="module")
def places(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty").mkdir()
    (folder / "prompts.jsonl").write_text('"what"\n')
    (folder / "blank.jsonl").write_text("\n \n")
    named = dict(images=images, empty=folder / "empty", file=folder / "prompts.jsonl", blank=folder / "blank.jsonl")
    return named | dict(new=folder / "new.jsonl")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_refused_before_the_model_is_loaded(model, places, capsys, monkeypatch, name):
    monkeypatch.setattr("mllm_jax.cli.generate.assistant_of", None)
    words, expected = REFUSED[name]
    assert main(["generate", str(model), *words.format(**places).split()]) == 2
    shown = capsys.readouterr()
    assert expected.format(**places) in shown.err and shown.err.count("to do: ") == 1 and shown.out == ""
    assert not places["new"].exists() and list(places["empty"].iterdir()) == []


def test_answers_to_something_else_are_not_continued(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mllm_jax.cli.generate.assistant_of", lambda _: 1 / 0)
    prompts, out, other = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", tmp_path / "other"
    prompts.write_text('"what"\n"is"\n')
    other.mkdir()
    for file in model.iterdir():
        os.link(file, other / file.name)

    def ask(folder=model, *more):
        return main(["generate", str(folder), "--prompts", str(prompts), "--out", str(out), *more])

    with pytest.raises(ZeroDivisionError):
        ask()
    with pytest.raises(ZeroDivisionError):  # it continues: nothing has changed
        ask(model, "--batch-size", "3")
    capsys.readouterr()
    changes = {
        "max_new_tokens": lambda: ask(model, "--max-new-tokens", "7"),
        "seed, temperature": lambda: ask(model, "--temperature", "1", "--seed", "3"),
        "media": lambda: ask(model, "--media", str(other)),
        "model": lambda: ask(other),
    }
    for changed, again in changes.items():
        assert again() == 2
        assert f"answers something else: other {changed}" in capsys.readouterr().err
    before = prompts.read_bytes()
    prompts.write_bytes(before + b'"a"\n')
    assert ask() == 2 and "other prompts_content" in capsys.readouterr().err
    prompts.write_bytes(before)
    (other / "model.safetensors").unlink()
    (other / "model.safetensors").write_bytes(b"other weights")
    asked = tmp_path / "answers.jsonl.asked.json"
    asked.write_text(asked.read_text().replace(str(model.resolve()), str(other.resolve())))
    assert ask(other) == 2 and "other weights" in capsys.readouterr().err


BAD_LINES = {
    "no JSON": ("what", "JSON in UTF-8"),
    "a number": ("3", "int 3"),
    "an empty list": ("[]", "list []"),
    "a list of texts": ('["what"]', "str 'what'"),
    "messages and prompt": ('{"messages": [], "prompt": "a"}', "either"),
    "messages and image": ('{"messages": [], "image": "a.png"}', "images inside the messages"),
    "a prompt that is no text": ('{"prompt": ["a"]}', "a text"),
    "an image that is no name": ('{"prompt": "a", "image": 3}', "the path of a file"),
    "an image from the network": ('{"prompt": "a", "image": "https://host/a.png"}', "fetched first"),
    "an unknown part": ('[{"role": "user", "content": [{"type": "smell"}]}]', "smell"),
    "an id that is a list": ('{"prompt": "a", "id": [1]}', "id [1]"),
    "half of a character": ('{"prompt": "\\ud800"}', "surrogates"),
    "half of a character in messages": ('[{"role": "user", "content": "a\\ud800"}]', "surrogates"),
    "bytes": (b'"\xff"', "JSON in UTF-8"),
    "too deep": ("[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_an_error_in_its_place(tmp_path, name):
    line, expected = BAD_LINES[name]
    content = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'"one"\n' + content + b'\n\n"two"')
    first, bad, last = PromptFile(tmp_path / "a.jsonl")
    assert (first.messages, last.messages) == ((Message("user", "one"),), (Message("user", "two"),))
    assert (last.index, last.place) == (2, f"{tmp_path}/a.jsonl, line 4") and bad.place.endswith("line 2")
    assert isinstance(bad.messages, DataError) and expected in str(bad.messages)


def test_a_line_without_an_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("mllm_jax.generation.prompts.LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('"' + "a" * 1000 + '"\n"two"\n')
    prompts = PromptFile(tmp_path / "a.jsonl")
    first, last = prompts
    assert len(prompts) == 2 and "more than 100 bytes" in str(first.messages) and last.place.endswith("line 2")


def test_paths_are_relative_to_the_file_or_to_the_media(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "image": ["b.png", "/c.png"]}) + "\n")
    for media, folder in ((None, tmp_path), (tmp_path / "..", tmp_path / "..")):
        [prompt] = PromptFile(tmp_path / "a.jsonl", media)
        assert [part.source for part in prompt.messages[0].parts[:2]] == [str(folder / "b.png"), "/c.png"]


def test_another_image_or_question_is_another_digest(images, tmp_path):
    digest = PromptFolder(images, "what").digest
    assert digest == PromptFolder(images, "what").digest != PromptFolder(images, "is it").digest
    assert digest != PromptFolder(images / "deep", "what").digest


@pytest.mark.parametrize(
    "content", [b"what\n", b"{}\n", b'{"index": 9}\n', b'{"index": true}\n', b'{"index": 1}\n{"index": 1}\n']
)
def test_a_file_with_other_lines_is_left_as_it_is(tmp_path, content):
    with AnswersFile(tmp_path / "a.jsonl", {"model": "m"}, 5) as file:
        file.append({"index": 0})
    whole = b'{"index": 0}\n' + content + b'{"index": 2}\n{"ind'
    (tmp_path / "a.jsonl").write_bytes(whole)
    with pytest.raises(DataError, match="remove this one"):
        AnswersFile(tmp_path / "a.jsonl", {"model": "m"}, 5)
    assert (tmp_path / "a.jsonl").read_bytes() == whole


class Screen(io.StringIO):
    pass


def test_progress_in_a_pipe_is_a_line_every_ten_seconds():
    now, out = [0.0], Screen()
    with Count("answers", 100, 20, console=Console(file=out), clock=lambda: now[0]) as progress:
        for done in range(21, 101):
            now[0] += 0.5
            progress.update(done)
    lines = out.getvalue().splitlines()
    assert lines[0] == "21/100 answers" and lines[1] == "41/100 answers  2 answers/s  ETA 0:00:30"
    assert lines[-1] == "100/100 answers  2 answers/s" and len(lines) == 5


def test_progress_in_a_terminal_is_a_bar():
    now, out = [0.0], Screen()
    console = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Count("answers", 10, console=console, clock=lambda: now[0]) as progress:
        for done in range(1, 6):
            now[0] += 1
            progress.update(done)
        progress.message("line 3: [no] markup")
    shown = out.getvalue()
    assert "5/10" in shown and "1 answers/s  ETA 0:00:05" in shown and "line 3: [no] markup" in shown
