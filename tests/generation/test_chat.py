"""The conversation in the terminal, with a scripted reader and a console that writes into a string."""

from __future__ import annotations

import io

import pytest
from mllm_jax.generation.language import LanguageGenerator
from rich.console import Console
from tiny_language import CONFIG, byte_tokenizer, random_params

from mllm_jax.generation import chat as module
from mllm_jax.generation.chat import Conversation, chat
from mllm_jax.generation.options import Options
from mllm_jax.generation.sampling import Sampling

NEW = 10


@pytest.fixture(scope="module")
def generator():
    return LanguageGenerator(CONFIG.make(), random_params(seed=1), byte_tokenizer())


@pytest.fixture
def conversation(generator):
    return Conversation(generator, Options(NEW, ignore_eos=True), Sampling(), system="be brief")


def talk(conversation, *lines):
    """What the console shows for these lines; an exception among them is raised by the reader."""
    shown, script = io.StringIO(), iter(lines)

    def read(prompt: str) -> str:
        line = next(script)
        if isinstance(line, type):
            raise line
        return line

    assert chat(conversation, read=read, console=Console(file=shown, width=200)) == 0
    assert next(script, None) is None, "it left before the input was read"
    return shown.getvalue()


def answer(generator, *messages) -> str:
    roles = ("user", "assistant") * len(messages)
    turns = [{"role": "system", "content": "be brief"}]
    turns += [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    return generator.generate([turns], Options(NEW, ignore_eos=True))[0].text


def test_each_answer_knows_what_was_said(generator, conversation):
    first = answer(generator, "hi")
    second = answer(generator, "hi", first, "and?")
    assert first != second and second != answer(generator, "and?")
    shown = talk(conversation, "hi", "", "and?", EOFError)
    assert first in shown and second in shown.split(first)[1]
    assert [turn["content"] for turn in conversation.turns] == ["hi", first, "and?", second]
    assert "cut off" in shown


def test_reset_begins_anew_and_exit_leaves(generator, conversation):
    shown = talk(conversation, "hi", "/reset", "and?", "/what", "/exit")
    assert shown.count("/reset forgets") == 2, "once at the start, once for a command that does not exist"
    assert [turn["content"] for turn in conversation.turns] == ["and?", answer(generator, "and?")]


def test_ctrl_c_at_the_prompt_does_not_leave(conversation):
    assert "/exit leaves" in talk(conversation, KeyboardInterrupt, "/exit")


def test_ctrl_c_stops_the_answer_and_not_the_program(generator, conversation, monkeypatch):
    stream, whole = generator.stream, answer(generator, "hi")

    def interrupted(*args):
        yield next(stream(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(generator, "stream", interrupted)
    shown = talk(conversation, "hi", "/exit")
    assert "[stopped]" in shown
    said = conversation.turns[1]["content"]
    assert whole.startswith(said) and 0 < len(said) < len(whole), "what was shown stays said"
    monkeypatch.setattr(generator, "stream", stream)
    assert answer(generator, "hi", said, "go on") in talk(conversation, "go on", "/exit")


def test_ctrl_c_while_an_answer_is_printed(conversation, generator, monkeypatch):
    printed = Console.print

    def once(self, text="", **style):
        if style.get("end") == "":
            monkeypatch.setattr(Console, "print", printed)
            raise KeyboardInterrupt
        return printed(self, text, **style)

    monkeypatch.setattr(Console, "print", once)
    shown = talk(conversation, "hi", "/exit")
    assert "[stopped]" in shown and [turn["role"] for turn in conversation.turns] == ["user", "assistant"]


def test_nothing_said_before_ctrl_c_leaves_no_question(generator, conversation, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(generator, "stream", interrupted)
    talk(conversation, "hi", "/exit")
    assert conversation.turns == []


def test_the_oldest_turns_are_dropped_whole_when_the_context_is_full(generator, conversation):
    """96 places: system prompt 9, each turn 3 marks, a question of 16 and an answer."""
    questions = [f"question number{i}" for i in range(4)]
    shown = talk(conversation, *questions, "/exit")
    assert "turn(s) no longer fit" in shown
    kept = [turn["content"] for turn in conversation.turns if turn["role"] == "user"]
    assert kept == questions[-len(kept) :] and 1 <= len(kept) < 4
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * len(kept)


def test_a_question_that_never_fits_is_refused_and_forgotten(generator, conversation):
    shown = talk(conversation, "hi", "x" * 200, "/exit")
    assert "at most 95" in shown and [turn["content"] for turn in conversation.turns][::2] in (["hi"], [])
    assert answer(generator, "hello") in talk(conversation, "/reset", "hello", "/exit")


def test_markup_in_an_answer_is_shown_as_it_is(conversation, generator, monkeypatch):
    def stream(*args):
        yield "[bold]x[/bold] :smile:"
        return module.Completion("[bold]x[/bold] :smile:", (1,), "stop")

    monkeypatch.setattr(generator, "stream", stream)
    assert "[bold]x[/bold] :smile:" in talk(conversation, "hi", "/exit")
