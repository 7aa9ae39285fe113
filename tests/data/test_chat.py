"""A checkpoint's own tokenizer and chat template."""

from __future__ import annotations

import contextlib
import json

import pytest
from tiny_language import byte_tokenizer

from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.errors import DataError

USER, ASSISTANT, SYSTEM, END = 257, 258, 259, 256
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "grüße"},
]


@pytest.fixture
def folder(tmp_path):
    byte_tokenizer().save(tmp_path / "model")
    return tmp_path / "model"


def test_a_conversation_is_laid_out_by_the_template(folder):
    tokenizer = ChatTokenizer.load(folder)
    text = {turn["content"]: tokenizer.encode(turn["content"]) for turn in TURNS}
    wanted = [SYSTEM, *text["be brief"], USER, *text["hi"], ASSISTANT, *text["yes?"], END, USER, *text["grüße"]]
    assert tokenizer.encode_chat(TURNS) == [*wanted, ASSISTANT]
    assert tokenizer.encode_chat(TURNS, add_generation_prompt=False) == wanted
    assert tokenizer.encode_chat(TURNS) == byte_tokenizer().encode_chat(TURNS), "loading changed something"


def test_text_comes_back_with_its_spaces(folder):
    tokenizer = ChatTokenizer.load(folder)
    for text in ("  two  spaces , and a comma", "grüße 🦊", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([USER, *tokenizer.encode("a"), END]) == "a"


def test_end_tokens_of_tokenizer_and_generation_config(folder):
    assert ChatTokenizer.load(folder).stop_ids == (END,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, 7], "top_k": 3}))
    assert ChatTokenizer.load(folder).stop_ids == (END, 7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert ChatTokenizer.load(folder).stop_ids == (END, 9)


def test_what_is_saved_loads_again_here_and_in_transformers(folder, tmp_path):
    from transformers import AutoTokenizer

    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, 7], "top_k": 3}))
    first = ChatTokenizer.load(folder)
    first.save(tmp_path / "copy")
    again = ChatTokenizer.load(tmp_path / "copy")
    assert again.encode_chat(TURNS) == first.encode_chat(TURNS)
    assert (again.stop_ids, again.generation) == (first.stop_ids, first.generation)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert theirs.apply_chat_template(TURNS, add_generation_prompt=True)["input_ids"] == first.encode_chat(TURNS)


def test_the_processors_template_goes_before_the_tokenizers(folder, tmp_path):
    """Checks early folders on the hub, with a second template in chat_template.json that places images."""
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}!"}))
    tokenizer = ChatTokenizer.load(folder)
    assert tokenizer.render_chat(TURNS[:1]) == "be brief!"
    tokenizer.save(tmp_path / "copy")
    assert ChatTokenizer.load(tmp_path / "copy").render_chat(TURNS[:1]) == "be brief!"


def test_a_template_that_refuses_and_one_that_is_not_there():
    with pytest.raises(DataError, match="alternate"):
        byte_tokenizer().encode_chat([TURNS[1], TURNS[1]])
    bare = byte_tokenizer(template=None)
    assert not bare.has_template and byte_tokenizer().has_template
    with pytest.raises(DataError, match="chat template"):
        bare.encode_chat(TURNS)


@pytest.mark.parametrize(
    "damage", ["empty", "no tokenizer", "damaged tokenizer", "damaged generation_config", "template"]
)
def test_what_cannot_be_loaded_is_refused(folder, tmp_path, damage):
    if damage == "empty":
        (tmp_path / damage).mkdir()
        folder = tmp_path / damage
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "template":
        (folder / "chat_template.json").write_text("[]")
    elif damage == "damaged tokenizer":
        (folder / "tokenizer.json").write_text("{")
    else:
        (folder / "generation_config.json").write_text("{")
    with pytest.raises(DataError) as refusal:
        ChatTokenizer.load(folder)
    assert str(folder) in refusal.value.given and refusal.value.todo


def test_code_in_a_folder_is_not_run(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    config["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(DataError):  # refused, or read without running the code: both are right
        ChatTokenizer.load(folder)
    assert not (folder / "ran").exists()


BAD_JSON = {
    "generation_config.json": [
        "[" * 100_000, "[]", '{"eos_token_id": [[]]}', '{"eos_token_id": {}}', '{"eos_token_id": "</s>"}',
        '{"eos_token_id": -1}', '{"eos_token_id": [1.5]}', '{"eos_token_id": [true]}',
    ],
    "chat_template.json": ["[" * 100_000, "7", "{}", '{"chat_template": 7}', '{"chat_template": {"default": 7}}'],
    "tokenizer_config.json": [
        "[" * 100_000, "[]", '{"chat_template": 7}', '{"chat_template": ["x"]}', '{"chat_template": [{"name": 1}]}',
        '{"eos_token": 7}', '{"tokenizer_class": {}}', '{"added_tokens_decoder": 7}',
    ],
    "tokenizer.json": ["[" * 100_000, "[]", "{}", '{"model": {"type": "BPE"}}'],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_of_wrong_types_or_nested_too_deeply_is_refused(folder, name):
    whole = (folder / name).read_text() if (folder / name).is_file() else None
    if name == "tokenizer_config.json":  # the template in its own file would have precedence
        (folder / "chat_template.jinja").rename(folder / "aside")
    for text in BAD_JSON[name]:
        (folder / name).write_text(text)
        with pytest.raises(DataError) as refusal:
            ChatTokenizer.load(folder)
        assert refusal.value.todo and len(str(refusal.value)) < 3_000
    if whole is not None:
        (folder / name).write_text(whole)
        if (folder / "aside").exists():
            (folder / "aside").rename(folder / "chat_template.jinja")
        assert ChatTokenizer.load(folder).encode_chat(TURNS)


def test_half_a_character_is_refused(folder):
    from mllm_jax.data.tokenizer import Tokenizer

    tokenizer, own = ChatTokenizer.load(folder), Tokenizer.train(["a text"], 300)
    for text in ("\ud800", "a\udc00b", "\udcff"):
        turn = [{"role": "user", "content": text}]
        for encode in (lambda: tokenizer.encode(text), lambda: tokenizer.encode_chat(turn), lambda: own.encode(text)):  # noqa: B023
            with pytest.raises(DataError, match=r"\\ud") as refusal:
                encode()
            str(refusal.value).encode()
    assert tokenizer.encode("a\0b") and own.encode("a\0b"), "NUL is a character"
