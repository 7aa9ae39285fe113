"""Templates: what is learnt decodes to the answers; shortening goes by whole turns; pictures are never cut."""

from __future__ import annotations

import numpy as np
import pytest
from mllm_jax.data.examples import Conversation, Turn
from mllm_jax.data.templates import encode_captions, encode_conversation, encode_prompt

from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import ConfigError, DataError

MEDIA = 3
TURNS = (
    Turn("what is this?", "a red apple", "name"),
    Turn("is it a cat?", "no", "yes_no"),
    Turn("which colour?", "red, mostly", "colour"),
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([t for turn in TURNS for t in (turn.question, turn.answer)], 280)


def learnt(encoded, tokenizer) -> list[str]:
    """The texts of the runs of learnt tokens, each of which must end with <eos>."""
    answers, run = [], []
    for token, weight in zip(encoded.tokens, encoded.loss_weights, strict=True):
        assert weight in (0.0, 1.0)
        if weight:
            run.append(token)
        elif run:
            raise AssertionError("a learnt run that does not end with <eos>")
        if run and token == tokenizer.eos:
            answers.append(tokenizer.decode(run))
            run = []
    assert not run
    return answers


@pytest.mark.parametrize("images", [0, 1, 2])
def test_learnt_tokens_decode_to_the_answers(tokenizer, images):
    encoded = encode_conversation(Conversation(images, TURNS), tokenizer, MEDIA, 200)
    assert learnt(encoded, tokenizer) == [turn.answer for turn in TURNS]
    assert encoded.num_images == images and encoded.dropped_turns == 0
    places = images * MEDIA
    assert encoded.tokens[0] == tokenizer.bos
    assert encoded.media_index.tolist() == [-1, *range(places)] + [-1] * (len(encoded.tokens) - 1 - places)
    assert ((encoded.tokens == tokenizer.image) == (encoded.media_index >= 0)).all()
    assert [encoded.tokens.dtype, encoded.loss_weights.dtype, encoded.media_index.dtype] == [
        np.int32,
        np.float32,
        np.int32,
    ]


def test_words_may_tell_each_place_of_a_picture(tokenizer, tmp_path):
    words = ("one", "two", "three")
    assert len(words) == MEDIA
    named = tokenizer.naming_places(words)
    encoded = encode_conversation(Conversation(2, TURNS), named, MEDIA, 200)
    plain = encode_conversation(Conversation(2, TURNS), tokenizer, MEDIA, 200)
    assert learnt(encoded, named) == learnt(plain, tokenizer)
    seen = encoded.media_index[encoded.media_index >= 0]
    assert seen.tolist() == list(range(2 * MEDIA))
    ids, where = encoded.tokens.tolist(), [*np.flatnonzero(encoded.media_index >= 0)]
    behind = [ids[a + 1 : b] for a, b in zip([0, *where], where, strict=False)]
    assert [tokenizer.decode(each) for each in behind] == list(words) * 2
    assert ids[where[-1] + 1 :] == plain.tokens.tolist()[1 + 2 * MEDIA :]
    prompt = encode_prompt(TURNS[0].question, 2, named, MEDIA)
    assert prompt.tokens.tolist() == ids[: len(prompt.tokens)]
    named.save(tmp_path / "tokenizer.json")
    again = type(tokenizer).load(tmp_path / "tokenizer.json")
    assert again.fingerprint() == named.fingerprint() != tokenizer.fingerprint()
    assert encode_conversation(Conversation(2, TURNS), again, MEDIA, 200).tokens.tolist() == ids
    with pytest.raises(ConfigError, match="words for 3 places of a picture, which takes 9"):
        encode_conversation(Conversation(1, TURNS), named, 9, 200)


@pytest.mark.parametrize("images", [0, 2])
def test_learning_all_leaves_out_the_start_and_the_pictures_only(tokenizer, images):
    conversation = Conversation(images, TURNS, context="a fruit")
    answers = encode_conversation(conversation, tokenizer, MEDIA, 200)
    everything = encode_conversation(conversation, tokenizer, MEDIA, 200, learn="all")
    assert everything.tokens.tolist() == answers.tokens.tolist()
    assert everything.media_index.tolist() == answers.media_index.tolist()
    given = 1 + images * MEDIA
    assert everything.loss_weights.tolist() == [0.0] * given + [1.0] * (len(answers.tokens) - given)
    assert 0 < answers.loss_weights.sum() < everything.loss_weights.sum()
    assert everything.loss_weights.dtype == np.float32


def test_what_is_shortened_is_learnt_whole(tokenizer):
    whole = encode_conversation(Conversation(1, TURNS[:2]), tokenizer, MEDIA, 200, learn="all")
    short = encode_conversation(Conversation(1, TURNS), tokenizer, MEDIA, len(whole.tokens), learn="all")
    assert short.dropped_turns == 1 and short.tokens.tolist() == whole.tokens.tolist()
    assert short.loss_weights.tolist() == whole.loss_weights.tolist()


def test_layout_of_a_conversation(tokenizer):
    t, encode = tokenizer, tokenizer.encode
    encoded = encode_conversation(Conversation(1, TURNS[:2], context="a fruit"), t, MEDIA, 200)
    wanted = [t.bos, *[t.image] * MEDIA, *encode("a fruit")]
    for turn in TURNS[:2]:
        wanted += [*t.chat.user, *encode(turn.question), *t.chat.assistant, *encode(turn.answer), t.eos]
    assert encoded.tokens.tolist() == wanted


def test_shortening_goes_by_whole_turns(tokenizer):
    """At every length the row is that of the first turns that fit, whole."""
    conversation = Conversation(2, TURNS)
    wholes = [encode_conversation(Conversation(2, TURNS[:n]), tokenizer, MEDIA, 200) for n in (1, 2, 3)]
    lengths = [len(w.tokens) for w in wholes]
    for length in range(lengths[0], lengths[2] + 3):
        kept = sum(n <= length for n in lengths)
        encoded = encode_conversation(conversation, tokenizer, MEDIA, length)
        assert len(encoded.tokens) <= length
        assert encoded.tokens.tolist() == wholes[kept - 1].tokens.tolist()
        assert encoded.dropped_turns == 3 - kept
        assert learnt(encoded, tokenizer) == [turn.answer for turn in TURNS[:kept]]
        assert (encoded.media_index >= 0).sum() == 2 * MEDIA, "pictures are never cut"


def test_an_example_that_does_not_fit_is_refused_with_its_three_parts(tokenizer):
    conversation = Conversation(2, TURNS)
    need = len(encode_conversation(Conversation(2, TURNS[:1]), tokenizer, MEDIA, 200).tokens)
    with pytest.raises(DataError) as refusal:
        encode_conversation(conversation, tokenizer, MEDIA, need - 1)
    assert refusal.value.given == f"an example of {need} tokens with 2 picture(s) of {MEDIA}"
    assert refusal.value.expected == f"at most {need - 1} tokens with its first turn"
    assert "length" in refusal.value.todo and "media tokens" in refusal.value.todo
    text = str(refusal.value)
    assert all(part in text for part in (refusal.value.given, refusal.value.expected, refusal.value.todo))


@pytest.mark.parametrize("answer", ["", "  ", "\n\t"])
@pytest.mark.parametrize("place", [0, 2])
def test_an_empty_answer_is_refused(tokenizer, answer, place):
    turns = list(TURNS)
    turns[place] = Turn("which one?", answer, "name")
    with pytest.raises(DataError) as refusal:
        encode_conversation(Conversation(0, tuple(turns)), tokenizer, MEDIA, 200)
    assert "empty answer to 'which one?'" in refusal.value.given
    assert refusal.value.expected == "an answer with text" and refusal.value.todo


def test_a_conversation_without_turns_is_refused(tokenizer):
    with pytest.raises(DataError, match="without turns"):
        encode_conversation(Conversation(1, ()), tokenizer, MEDIA, 200)


def test_prompt_is_the_conversation_up_to_the_answer(tokenizer):
    for context in ("", "a fruit"):
        conversation = Conversation(2, TURNS[:1], context)
        whole = encode_conversation(conversation, tokenizer, MEDIA, 200)
        prompt = encode_prompt(TURNS[0].question, 2, tokenizer, MEDIA, context)
        n = len(prompt.tokens)
        assert prompt.tokens.tolist() == whole.tokens[:n].tolist()
        assert prompt.media_index.tolist() == whole.media_index[:n].tolist()
        assert whole.loss_weights[:n].sum() == 0 == prompt.loss_weights.sum()
        assert whole.loss_weights[n:].all()


def test_captions_of_a_picture_and_of_its_places(tokenizer):
    turns = (Turn("", "a red apple", "caption"), Turn("", "an apple", "caption", place=2))
    encoded = encode_captions(Conversation(1, turns), tokenizer, 4, 50, 2)
    segments, positions = encoded.places
    for number, (turn, place) in enumerate(zip(turns, (-1, 2), strict=True), start=1):
        here = segments == number
        ids = encoded.tokens[here]
        assert tokenizer.decode(ids) == turn.answer
        assert ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos
        assert (encoded.media_index[here] == place).all() and positions[here].tolist() == list(range(len(ids)))
    assert set(segments) == {1, 2} and encoded.num_images == 1


@pytest.mark.parametrize(
    "turns,length,message",
    [
        ((Turn("", " ", "name"),), 50, "an empty caption"),
        (TURNS[:1], 4, "1 caption(s) of"),
        ((), 50, "0 captions"),
        (TURNS[:1] * 3, 50, "3 captions"),
        ((Turn("", "an apple", "caption", place=4),), 50, "a caption of place 4"),
    ],
)
def test_captions_that_no_row_can_hold_are_refused(tokenizer, turns, length, message):
    with pytest.raises(DataError) as refusal:
        encode_captions(Conversation(1, turns), tokenizer, 4, length, 2)
    assert message in refusal.value.given and refusal.value.expected and refusal.value.todo
