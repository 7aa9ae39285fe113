"""The conversation in the terminal, with a scripted reader and a console that writes into a string."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image as Pillow
from rich.console import Console
from test_assistant_media import CONFIG as MULTIMODAL
from test_assistant_media import IdTokenizer, random_params_of
from tiny_language import CONFIG, byte_tokenizer, language, random_params
from toy_data import processor as processor_of

from mllm_jax.data.message import Image, Message, Text
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.conversation import Dialogue, chat
from mllm_jax.generation.options import Answer, Options
from mllm_jax.generation.sampling import Sampling

NEW = 10


@pytest.fixture(scope="module")
def assistant():
    return language(CONFIG.make(), random_params(seed=1), byte_tokenizer())


@pytest.fixture
def dialogue(assistant):
    return Dialogue(assistant, Options(NEW, ignore_eos=True), Sampling(), system="be brief")


def talk(dialogue, *lines, interactive=True):
    """Returns the console's output for these lines; the reader raises exceptions among them."""
    shown, script = io.StringIO(), iter(lines)

    def read(prompt: str) -> str:
        line = next(script)
        if isinstance(line, type):
            raise line
        return line

    assert chat(dialogue, read=read, console=Console(file=shown, width=200), interactive=interactive) == 0
    assert next(script, None) is None, "it left before the input was read"
    return shown.getvalue()


def answer(assistant, *messages) -> str:
    roles = ("user", "assistant") * len(messages)
    turns = [{"role": "system", "content": "be brief"}]
    turns += [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    return assistant.generate(turns, max_new_tokens=NEW, ignore_eos=True).text


def test_each_answer_knows_what_was_said(assistant, dialogue):
    first = answer(assistant, "hi")
    second = answer(assistant, "hi", first, "and?")
    assert first != second and second != answer(assistant, "and?")
    shown = talk(dialogue, "hi", "", "and?", EOFError)
    assert first in shown and second in shown.split(first)[1]
    assert [turn.content for turn in dialogue.turns] == ["hi", first, "and?", second]
    assert "cut off" in shown


def test_reset_begins_anew_and_exit_leaves(assistant, dialogue):
    shown = talk(dialogue, "hi", "/reset", "and?", "/what", "/exit")
    assert shown.count("/reset forgets") == 2, "once at the start, once for a command that does not exist"
    assert [turn.content for turn in dialogue.turns] == ["and?", answer(assistant, "and?")]


def test_ctrl_c_at_the_prompt_does_not_leave(dialogue):
    assert "/exit leaves" in talk(dialogue, KeyboardInterrupt, "/exit")


def test_ctrl_c_stops_the_answer_and_not_the_program(assistant, dialogue, monkeypatch):
    stream, whole = assistant.stream, answer(assistant, "hi")

    def interrupted(*args, **options):
        yield next(stream(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(assistant, "stream", interrupted)
    shown = talk(dialogue, "hi", "/exit")
    assert "[stopped]" in shown
    said = dialogue.turns[1].content
    assert whole.startswith(said) and 0 < len(said) < len(whole), "what was shown stays said"
    monkeypatch.setattr(assistant, "stream", stream)
    assert answer(assistant, "hi", said, "go on") in talk(dialogue, "go on", "/exit")


def test_ctrl_c_while_an_answer_is_printed(dialogue, assistant, monkeypatch):
    printed = Console.print

    def once(self, text="", **style):
        if style.get("end") == "":
            monkeypatch.setattr(Console, "print", printed)
            raise KeyboardInterrupt
        return printed(self, text, **style)

    monkeypatch.setattr(Console, "print", once)
    shown = talk(dialogue, "hi", "/exit")
    assert "[stopped]" in shown and [turn.role for turn in dialogue.turns] == ["user", "assistant"]


def test_nothing_said_before_ctrl_c_leaves_no_question(assistant, dialogue, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(assistant, "stream", interrupted)
    talk(dialogue, "hi", "/exit")
    assert dialogue.turns == ()


def test_the_oldest_turns_are_dropped_whole_when_the_context_is_full(assistant, dialogue):
    """Fills 96 positions: system prompt 9, each turn 3 marks, a question of 16 and an answer."""
    questions = [f"question number{i}" for i in range(4)]
    shown = talk(dialogue, *questions, "/exit")
    assert "turn(s) no longer fit" in shown
    kept = [turn.content for turn in dialogue.turns if turn.role == "user"]
    assert kept == questions[-len(kept) :] and 1 <= len(kept) < 4
    assert [turn.role for turn in dialogue.turns] == ["user", "assistant"] * len(kept)


def test_a_question_that_never_fits_is_refused_and_forgotten(assistant, dialogue):
    shown = talk(dialogue, "hi", "x" * 200, "/exit")
    assert "at most 95" in shown and [turn.content for turn in dialogue.turns][::2] in (["hi"], [])
    assert answer(assistant, "hello") in talk(dialogue, "/reset", "hello", "/exit")


def test_markup_in_an_answer_is_shown_as_it_is(dialogue, assistant, monkeypatch):
    def stream(*args, **options):
        yield "[bold]x[/bold] :smile:"
        return Answer("[bold]x[/bold] :smile:", (1,))

    monkeypatch.setattr(assistant, "stream", stream)
    assert "[bold]x[/bold] :smile:" in talk(dialogue, "hi", "/exit")


# ---- images and pipes


@pytest.fixture(scope="module")
def seeing():
    tokenizer = IdTokenizer(Tokenizer.train(["what is this? a red apple"] * 3, 280).backend)
    return Assistant(
        MULTIMODAL.make(), random_params_of(MULTIMODAL), processor_of(MULTIMODAL, tokenizer), max_length=200
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Returns two image files."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("a b.png", "c.png"):
        Pillow.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name)
    return folder / "a b.png", folder / "c.png"


def test_images_are_shown_with_the_next_question(seeing, images):
    def replied(*messages) -> str:
        return seeing.generate(list(messages), max_new_tokens=NEW, ignore_eos=True).text

    first, second = images
    asked = Message("user", (Image(first), Image(second), Text("what?")))
    one = replied(asked)
    two = replied(asked, Message("assistant", one), Message("user", "and?"))
    dialogue = Dialogue(seeing, Options(NEW, ignore_eos=True), Sampling())
    shown = talk(dialogue, f"/image {first}", f"/image {second}", "what?", "and?", "/exit")
    assert shown.count("shown with your next question") == 2
    assert one in shown and two in shown.split(one)[1] and one != replied(Message("user", "what?"))
    assert [len(turn.parts) for turn in dialogue.turns] == [3, 1, 1, 1], "an image is shown once"
    talk(dialogue, f"/image {first}", "/reset", "why", "/exit")
    assert len(dialogue.turns[0].parts) == 1, "forgotten with the rest"


def test_an_image_that_is_missing_is_said_to_be_and_the_dialogue_goes_on(seeing, images, tmp_path):
    dialogue = Dialogue(seeing, Options(NEW, ignore_eos=True), Sampling())
    shown = talk(dialogue, f"/image {tmp_path}/absent.png", "/image", f"/image {images[0]}", "what?", "/exit")
    assert "absent.png cannot be read" in shown and shown.count("to do") == 1 and "shown with" in shown
    assert [type(part) for part in dialogue.turns[0].parts] == [Image, Text]


def test_images_of_a_question_that_never_fits_are_forgotten_with_it(seeing, images):
    dialogue = Dialogue(seeing, Options(NEW, ignore_eos=True), Sampling())
    shown = talk(dialogue, *[f"/image {images[0]}"] * 50, "what?", "what?", "/exit")
    assert "at most 199" in shown
    assert [len(turn.parts) for turn in dialogue.turns] == [1, 1], "the next question is asked without them"


def test_a_language_model_refuses_images_in_words(dialogue, images):
    shown = talk(dialogue, f"/image {images[0]}", "hi", "/exit")
    assert "a part of type 'image'" in shown and "take a model that reads it" in shown
    assert len(dialogue.turns) == 2


def test_a_pipe_gets_answers_and_no_noise(assistant, dialogue):
    prompts = []

    def read(prompt: str) -> str:
        prompts.append(prompt)
        if len(prompts) > 2:
            raise EOFError
        return ("hi", "/reset")[len(prompts) - 1]

    shown = io.StringIO()
    quiet = Dialogue(assistant, Options(NEW, stop_tokens=tuple(range(260))), Sampling(), system="be brief")
    assert chat(quiet, read=read, console=Console(file=shown, width=200), interactive=False) == 0
    assert prompts == [""] * 3 and shown.getvalue() == "\n", "an answer that ended at once, and nothing else"
    said = talk(dialogue, "hi", EOFError, interactive=False)
    assert said.splitlines()[0] == answer(assistant, "hi").splitlines()[0]
    with pytest.raises(KeyboardInterrupt):
        talk(dialogue, KeyboardInterrupt, interactive=False)
