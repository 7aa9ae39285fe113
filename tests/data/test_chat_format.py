"""Rows of a chat model: equal to what its own template gives, pictures before the first question, refusals by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from mllm_jax.data.chat_format import ChatFormat
from mllm_jax.data.examples import Conversation, Turn
from mllm_jax.data.templates import encode_conversation, encode_prompt
from tiny_language import byte_tokenizer

from mllm_jax.data.tokenizer import CHAT_FORMAT, Tokenizer
from mllm_jax.errors import DataError

TURNS = (Turn("what is this?", "a cat", "x"), Turn("how many?", "2", "x"), Turn("sure <|end|>?", "yes", "x"))
# The shapes that templates have: ChatML with a system message of its own, LLaMA-2's, Vicuna's, LLaMA-3's.
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|system|>be kind<|end|>\n{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <|end|>{% endif %}{% endfor %}{% if add_generation_prompt %} {% endif %}"
)
PLAIN = (
    "A chat. {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT: "
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
TRIMMED = (
    "<|system|>\n\n{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "inst": INST, "plain": PLAIN, "trimmed": TRIMMED}


@pytest.fixture(params=TEMPLATES, ids=str)
def pair(request, tmp_path):
    """(the model's tokenizer as transformers has it, ours made of its folder)."""
    theirs = byte_tokenizer(TEMPLATES[request.param])
    theirs.backend.add_special_tokens({"additional_special_tokens": ["<|spare|>"]})
    theirs.save(tmp_path)
    return theirs, Tokenizer.from_folder(tmp_path)


def messages(turns, system: str | None = None) -> list[dict]:
    said = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        said += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return said


def test_rows_are_what_the_template_gives(pair):
    """Up to the stop token of the last answer; behind it a template may write a line break that nothing follows."""
    theirs, ours = pair
    for count in (1, 2):
        row = encode_conversation(Conversation(0, TURNS[:count]), ours, 4, 512).tokens.tolist()
        whole = theirs.encode_chat(messages(TURNS[:count]), add_generation_prompt=False)
        assert row == whole[: len(row)] and row[-1] == ours.eos
        assert theirs.decode(whole[len(row) :]).strip() == ""


def test_a_prompt_is_what_the_template_gives_and_what_was_trained(pair):
    theirs, ours = pair
    prompt = encode_prompt(TURNS[0].question, 0, ours, 4).tokens.tolist()
    assert prompt == theirs.encode_chat(messages(TURNS[:1])[:1])
    for images in (0, 1, 2):
        prompt = encode_prompt(TURNS[0].question, images, ours, 4)
        row = encode_conversation(Conversation(images, TURNS), ours, 4, 512)
        n = len(prompt.tokens)
        assert prompt.tokens.tolist() == row.tokens[:n].tolist()
        assert prompt.media_index.tolist() == row.media_index[:n].tolist()
        assert not row.loss_weights[:n].any() and row.loss_weights[n]


def test_answers_are_learnt_to_their_stop_token_and_nothing_else(pair):
    _, ours = pair
    row = encode_conversation(Conversation(1, TURNS), ours, 4, 512)
    runs, learnt = [], row.loss_weights > 0
    for place, token in enumerate(row.tokens):
        if learnt[place]:
            if not learnt[place - 1]:
                runs.append([])
            runs[-1].append(int(token))
    assert [ours.decode(run) for run in runs] == [turn.answer for turn in TURNS]
    assert all(run[-1] == ours.eos for run in runs)
    # A question that spells the stop token has its letters.
    around = [*ours.chat.begin, *ours.chat.assistant * 3, *ours.chat.end * 3, *ours.chat.user * 2]
    assert (row.tokens == ours.eos).sum() == around.count(ours.eos)


def test_pictures_stand_before_the_first_question_and_then_a_line_break(pair):
    theirs, ours = pair
    bare = encode_conversation(Conversation(0, TURNS), ours, 4, 512).tokens.tolist()
    row = encode_conversation(Conversation(2, TURNS), ours, 4, 512)
    begin = len(ours.chat.begin)
    assert row.media_index[begin : begin + 8].tolist() == list(range(8)) and (row.media_index >= 0).sum() == 8
    assert (row.tokens[begin : begin + 8] == ours.image).all() and ours.image not in bare
    rest = row.tokens[begin + 8 :].tolist()
    assert theirs.decode(rest[:1]) == "\n" and bare[:begin] + rest[1:] == bare
    text = encode_conversation(Conversation(0, TURNS, context="a note"), ours, 4, 512, learn="all")
    said = [*ours.encode("a note"), *ours.chat.after_media]
    assert text.tokens.tolist() == bare[:begin] + said + bare[begin:]
    assert not text.loss_weights[:begin].any() and text.loss_weights[begin:].all()


def test_turns_that_do_not_fit_are_dropped_whole(pair):
    _, ours = pair
    full = encode_conversation(Conversation(1, TURNS), ours, 4, 512)
    short = encode_conversation(Conversation(1, TURNS), ours, 4, len(full.tokens) - 1)
    assert short.dropped_turns == 1 and short.tokens.tolist() == full.tokens[: len(short.tokens)].tolist()
    assert short.tokens[-1] == ours.eos
    with pytest.raises(DataError, match="at most 9"):
        encode_conversation(Conversation(1, TURNS), ours, 4, 9)


def test_a_system_message_of_ones_own(tmp_path):
    theirs = byte_tokenizer(CHATML)
    theirs.save(tmp_path)
    fingerprints = set()
    for system in (None, "", "name emoji"):
        ours = Tokenizer.from_folder(tmp_path, system)
        row = encode_conversation(Conversation(0, TURNS[:2]), ours, 4, 512).tokens.tolist()
        whole = theirs.encode_chat(messages(TURNS[:2], system), add_generation_prompt=False)
        assert row == whole[: len(row)] and len(whole) - len(row) == 1
        fingerprints.add(ours.fingerprint())
    assert len(fingerprints) == 3


def test_the_file_round_trip_keeps_ids_rows_and_template(pair, tmp_path):
    _, ours = pair
    file = tmp_path / "run" / "tokenizer.json"
    file.parent.mkdir()
    ours.save(file)
    again = Tokenizer.load(file)
    assert again.chat == ours.chat and again.fingerprint() == ours.fingerprint()
    assert "messages" in again.chat.template, "the author's template is not kept"
    row = Conversation(1, TURNS)
    np.testing.assert_array_equal(
        encode_conversation(row, again, 4, 512).tokens, encode_conversation(row, ours, 4, 512).tokens
    )
    assert sorted(p.name for p in file.parent.iterdir()) == [CHAT_FORMAT, "tokenizer.json"]
    (file.parent / CHAT_FORMAT).write_text('{"begin": [1]}')
    with pytest.raises(DataError, match=CHAT_FORMAT):
        Tokenizer.load(file)


def test_our_own_tokens_need_no_file_beside(tmp_path):
    own = Tokenizer.train(["a cat", "two cats"] * 3, 280)
    own.save(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert Tokenizer.load(tmp_path / "tokenizer.json").chat == own.chat == ChatFormat.own(0, 1, 2, 3, 4, 5)


LAST_THINKS = CHATML.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}hm {% endif %}{{ m.content }}"
)


@pytest.mark.parametrize(
    "template,given",
    [
        (None, "without a chat template"),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "behind an answer"),
        ("{{ messages[-1].content }}<|end|>", "nowhere, or out of order"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}<|end|>{% endfor %}", "more than once"),
        (LAST_THINKS, "before one answer"),
        (CHATML.replace("<|assistant|>\n{% endif %}", "<|assistant|>\nwell: {% endif %}"), "asks for an answer with"),
        ("{{ raise_exception('no') }}", "no"),
    ],
    ids=["none", "no stop", "last only", "twice", "differs", "prompt differs", "raises"],
)
def test_templates_that_cannot_be_cut_are_refused(template, given, tmp_path):
    byte_tokenizer(template).save(tmp_path)
    with pytest.raises(DataError) as refusal:
        Tokenizer.from_folder(tmp_path)
    assert given in refusal.value.given and refusal.value.expected and refusal.value.todo


def test_a_system_message_that_the_template_refuses(tmp_path):
    byte_tokenizer(
        CHATML.replace(
            "{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for", 1
        )
    ).save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).chat.begin
    with pytest.raises(DataError, match="no system"):
        Tokenizer.from_folder(tmp_path, "be kind")


def test_the_places_of_pictures_are_named_where_a_model_names_them(tmp_path):
    theirs = byte_tokenizer(CHATML)
    theirs.backend.add_special_tokens({"additional_special_tokens": ["<|other|>", "<image>"]})
    theirs.save(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.image == theirs.backend.convert_tokens_to_ids("<image>")
    assert dataclasses.replace(ours.chat, image=0) != ours.chat
