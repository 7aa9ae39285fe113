"""The tokenizer: round trips, special tokens that text cannot forge, files, refusals."""

from __future__ import annotations

import json

import pytest

from mllm_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from mllm_jax.errors import DataError

TEXTS = ["what is this? a red apple", "how many cats are there? two cats", "is there a red cat?"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 290)


@pytest.mark.parametrize("text", ["a red cat", "two  spaces", "café 猫 🐈", "line\nbreak\ttab", "0123 ?!,;"])
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_are_learnt_and_the_size_is_kept(tokenizer):
    assert tokenizer.vocab_size == 290
    assert len(tokenizer.encode("cats")) < len("cats")


def test_a_word_has_the_same_ids_wherever_it_stands(tokenizer):
    word = tokenizer.encode("apple")
    assert tokenizer.encode("a red apple")[-len(word) :] == word


def test_special_tokens_are_distinct_and_left_out_of_text(tokenizer):
    chat = tokenizer.chat
    special = [chat.pad, chat.bos, chat.eos, chat.image, *chat.user, *chat.assistant]
    assert len(set(special)) == 6
    ids = [tokenizer.bos, *tokenizer.encode("a cat"), tokenizer.eos, tokenizer.pad]
    assert tokenizer.decode(ids) == "a cat"


def test_a_phrase_is_one_token_and_its_text_comes_back():
    phrased = Tokenizer.train(TEXTS, 290, ("red apple", "two cats"))
    assert phrased.vocab_size == 290
    assert len(phrased.encode("red apple")) == len(phrased.encode("two cats")) == 1
    assert phrased.encode("a red apple?")[1:2] == phrased.encode("red apple")
    for text in ("red apple", "what is this? a red apple, two cats.", "a cat", "two  cats"):
        assert phrased.decode(phrased.encode(text)) == text
    assert phrased.encode("cat") == phrased.encode("a cat")[1:]


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_text_cannot_forge_a_special_token(tokenizer, special):
    """A record or a user who writes `<eos>` gets its letters, not the id that ends an answer."""
    ids = tokenizer.encode(f"a {special} cat")
    assert tokenizer.backend.token_to_id(special) not in ids
    assert tokenizer.decode(ids) == f"a {special} cat"


def test_training_is_deterministic_and_the_fingerprint_tells(tokenizer):
    assert Tokenizer.train(TEXTS, 290).fingerprint() == tokenizer.fingerprint()
    assert Tokenizer.train(TEXTS, 280).fingerprint() != tokenizer.fingerprint()


def test_file_round_trip(tokenizer, tmp_path):
    file = tmp_path / "tokenizer.json"
    tokenizer.save(file)
    again = Tokenizer.load(file)
    assert again.fingerprint() == tokenizer.fingerprint()
    for text in (*TEXTS[:3], "a <eos> cat"):
        assert again.encode(text) == tokenizer.encode(text)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "1.0"'])
def test_a_broken_file_is_refused(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(DataError) as refusal:
        Tokenizer.load(file)
    assert str(file) in refusal.value.given and refusal.value.todo


def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizer, tmp_path):
    file = tmp_path / "tokenizer.json"
    tokenizer.save(file)
    content = json.loads(file.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<user>"]
    del content["model"]["vocab"]["<user>"]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"without \['<user>'\]"):
        Tokenizer.load(file)
