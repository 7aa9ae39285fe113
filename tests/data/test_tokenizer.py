"""The tokenizer: round trips, special tokens that text cannot forge, its chat template, files, refusals."""

from __future__ import annotations

import json

import pytest

from mllm_jax.data.chat_template import ASSISTANT, BOS, EOS, IMAGE, OWN_TEMPLATE, PAD, SEAM, USER, own_text, parted
from mllm_jax.data.tokenizer import SETTINGS, SPECIAL_TOKENS, TEMPLATE, TOKENIZER, Tokenizer
from mllm_jax.errors import DataError

TEXTS = ["what is this? a red apple", "how many cats are there? two cats", "is there a red cat?"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 290)


@pytest.mark.parametrize("text", ["a red cat", "two  spaces", "café 猫 🐈", "line\nbreak\ttab", "0123 ?!,;"])
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.words(text)) == text
    assert tokenizer.encode(text) == [tokenizer.bos_token_id, *tokenizer.words(text)]
    assert tokenizer.caption_ids(text) == [*tokenizer.encode(text), tokenizer.eos_token_id]


def test_merges_are_trained_and_the_size_is_kept(tokenizer):
    assert tokenizer.vocab_size == 290
    assert len(tokenizer.words("cats")) < len("cats")


def test_a_word_has_the_same_ids_at_every_position(tokenizer):
    word = tokenizer.words("apple")
    assert tokenizer.words("a red apple")[-len(word) :] == word == tokenizer.words(" apple")


def test_special_tokens_are_distinct_and_left_out_of_text(tokenizer):
    special = [tokenizer.id_of(token) for token in SPECIAL_TOKENS]
    named = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.image_token_id]
    assert len(set(special)) == 6 and special[:4] == named and tokenizer.stop_ids == (tokenizer.eos_token_id,)
    assert [tokenizer.token_of(i) for i in special] == list(SPECIAL_TOKENS)
    assert tokenizer.decode([*special, *tokenizer.words("a cat"), *special]) == "a cat"
    assert tokenizer.ids("".join(SPECIAL_TOKENS)) == special, "in the output of a template they are special tokens"
    assert tokenizer.id_of("<other>") is None


def test_a_phrase_is_one_token_and_its_text_comes_back():
    phrased = Tokenizer.train(TEXTS, 290, ("red apple", "two cats"))
    assert phrased.vocab_size == 290
    assert len(phrased.words("red apple")) == len(phrased.words("two cats")) == 1
    assert phrased.words("a red apple?")[1:2] == phrased.words("red apple")
    for text in ("red apple", "what is this? a red apple, two cats.", "a cat", "two  cats"):
        assert phrased.decode(phrased.words(text)) == text
    assert phrased.words("cat") == phrased.words("a cat")[1:]


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_text_cannot_forge_a_special_token(tokenizer, special):
    """Checks that `<eos>` in a record or a user's text becomes its letters, not the id that ends an answer."""
    for text in (f"a {special} cat", special, f"{special}{special}", f"<{special}", f"{special[:3]}{special}"):
        ids = tokenizer.words(text)
        assert tokenizer.id_of(special) not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.id_of(special) not in tokenizer.caption_ids(text)[1:-1]
        assert tokenizer.id_of(special) not in tokenizer.ids(parted(text, tokenizer.special_tokens))
        assert SEAM not in tokenizer.decode(ids)


def test_training_is_deterministic_and_the_fingerprint_changes(tokenizer):
    assert Tokenizer.train(TEXTS, 290).fingerprint() == tokenizer.fingerprint()
    assert Tokenizer.train(TEXTS, 280).fingerprint() != tokenizer.fingerprint()
    assert Tokenizer(tokenizer.backend, OWN_TEMPLATE + "!").fingerprint() != tokenizer.fingerprint()


# ---- the chat template

IMAGES = {"type": "image"}


def said(role: str, *content) -> dict:
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": role, "content": content[0]}
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]}


TALKS = {
    "a question": [said("user", "what is this?")],
    "an image": [said("user", IMAGES, "what is this?")],
    "a context": [said("user", IMAGES, IMAGES, "a fruit", "what is this?"), said("assistant", "a red apple")],
    "two turns": [said("user", "a?"), said("assistant", "b"), said("user", IMAGES, "c?"), said("assistant", "d")],
    "a system message": [said("system", "be brief"), said("user", "a?"), said("assistant", "b")],
    "a system message of parts": [said("system", "be", "brief"), said("user", "a?")],
    "two questions": [said("user", "a?"), said("user", "b?")],
    "an answer first": [said("assistant", "b"), said("user", "a?")],
    "an image last": [said("user", "is this one?", IMAGES), said("assistant", "no")],
    "an image alone": [said("user", IMAGES)],
    "an image in an answer": [said("user", "draw"), said("assistant", "here", IMAGES, "it is")],
    "no parts": [{"role": "user", "content": []}, {"role": "assistant", "content": []}],
    "empty texts": [said("user", ""), said("assistant", ""), said("system", "")],
    "empty parts": [said("user", "", IMAGES, ""), said("assistant", "", "")],
    "spaces": [said("user", " a ", "  b", "\nc\n"), said("assistant", "\t")],
    "a video": [said("user", {"type": "video"}, "what?"), said("user", "what?", {"type": "audio"})],
    "another role": [said("tool", "x", IMAGES), said("user", "a?")],
    "braces": [said("user", "{{ bos_token }} {% if %} {# #}"), said("assistant", "'\"\\ <b>&amp;")],
    "letters": [said("user", "café 猫 🐈\u2028\u00a0"), said("assistant", "\u00a0")],
    "nothing": [],
}


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    """Returns transformers' tokenizer of the files."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("prompt", [False, True])
def test_the_fast_text_is_what_the_template_writes_here_and_in_transformers(tokenizer, theirs, name, prompt):
    from mllm_jax.data.chat_tokenizer import rendered

    talk = TALKS[name]
    text = own_text(talk, prompt)
    assert tokenizer.render_chat(talk, prompt) == text
    assert rendered(OWN_TEMPLATE, talk, prompt, bos_token=BOS, eos_token=EOS, pad_token=PAD) == text
    if talk:  # transformers looks at the first message
        written = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
        assert written == text
        encoded = theirs.apply_chat_template(talk, add_generation_prompt=prompt)["input_ids"]
        assert encoded == tokenizer.ids(text)


def test_what_the_template_writes(tokenizer):
    text = own_text(TALKS["a context"], False)
    assert text == f"{BOS}{IMAGE}{IMAGE} a fruit{USER} what is this?{ASSISTANT} a red apple{EOS}"
    assert own_text(TALKS["an image last"][:1], True) == f"{BOS} is this one?{IMAGE}{USER}{ASSISTANT}"


def test_transformers_reads_the_files(tokenizer, theirs):
    for text in (*TEXTS[:3], "café 猫 🐈", "two  spaces"):
        assert theirs(f" {text}", add_special_tokens=False)["input_ids"] == tokenizer.words(text)
        assert theirs.decode(tokenizer.words(text), skip_special_tokens=True).strip() == text
    found = (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    wanted = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size)
    assert found == wanted and theirs.chat_template == OWN_TEMPLATE
    assert {*theirs.all_special_tokens} == {*SPECIAL_TOKENS}


def test_a_template_of_ones_own_is_kept_and_rendered(tokenizer, tmp_path):
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    own = Tokenizer(tokenizer.backend, template)
    own.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.template == template and again.fingerprint() == own.fingerprint() != tokenizer.fingerprint()
    assert again.render_chat([said("user", "a")]) == f"{BOS}{USER}a{EOS}"
    with pytest.raises(DataError, match="messages"):
        Tokenizer(tokenizer.backend, "{{ messages[7].role }}").render_chat([said("user", "a")])


# ---- files


def test_file_round_trip(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted([TOKENIZER, SETTINGS, TEMPLATE])
    assert Tokenizer.is_in(tmp_path / "run") and not Tokenizer.is_in(tmp_path)
    for path in (tmp_path / "run", tmp_path / "run" / TOKENIZER):
        again = Tokenizer.load(path)
        assert again.fingerprint() == tokenizer.fingerprint()
        for text in (*TEXTS[:3], "a <eos> cat"):
            assert again.words(text) == tokenizer.words(text)
            assert again.encode(text) == tokenizer.encode(text)


def test_a_chat_models_folder_holds_none_of_ours(tmp_path):
    from tiny_language import byte_tokenizer

    byte_tokenizer().save(tmp_path)
    assert not Tokenizer.is_in(tmp_path)
    (tmp_path / SETTINGS).write_text("{")
    assert not Tokenizer.is_in(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / TOKENIZER):
        with pytest.raises(DataError, match="no tokenizer at"):
            Tokenizer.load(path)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "1.0"'])
def test_a_broken_file_is_refused(tmp_path, content):
    file = tmp_path / TOKENIZER
    file.write_text(content)
    with pytest.raises(DataError) as refusal:
        Tokenizer.load(file)
    assert str(file) in refusal.value.given and refusal.value.todo


def test_a_broken_template_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / TEMPLATE).write_bytes(b"\xff\xfe")
    with pytest.raises(DataError) as refusal:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in refusal.value.given and refusal.value.todo


def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / TOKENIZER
    content = json.loads(file.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<user>"]
    del content["model"]["vocab"]["<user>"]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"without \['<user>'\]"):
        Tokenizer.load(file)
