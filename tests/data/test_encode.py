"""Rows of examples: tokens with loss decode to the answers; whole turns are dropped; images are never cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_data import MODEL, PIXELS, conversation, media_index, processor

from mllm_jax.data.chat_template import ASSISTANT, OWN_TEMPLATE, SEAM, USER
from mllm_jax.data.message import TEXT_ROLE, Audio, Example, Image, Message, Segment, Text, Video
from mllm_jax.data.processing.composed import ComposedLayout, ImageTokens
from mllm_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.processor import Processor

MEDIA = MODEL.media_tokens
TURNS = (("what is this?", "a red apple"), ("is it a cat?", "no"), ("which colour?", "red, mostly"))


def captions(turns, regions=None) -> Example:
    """Returns an example of an image with captions."""
    messages = (Message("user", (Image(PIXELS),)), *(Message("assistant", text) for text in turns))
    regions = regions or [None] * len(turns)
    return Example(messages, tuple(Segment((i + 1,), region) for i, region in enumerate(regions)))


def example(images: int, turns=TURNS, context: str = "") -> Example:
    return conversation(images, turns, context)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([text for turn in TURNS for text in turn], 280)


@pytest.fixture(scope="module")
def reader(tokenizer):
    return processor(MODEL, tokenizer)


def loss_texts(encoded, tokenizer) -> list[str]:
    """Returns the texts of the runs of tokens that carry loss, each of which must end with <eos>."""
    answers, run = [], []
    for token, weight in zip(encoded.tokens, encoded.loss_weights, strict=True):
        assert weight in (0.0, 1.0)
        if weight:
            run.append(token)
        elif run:
            raise AssertionError("a run with loss that does not end with <eos>")
        if run and token == tokenizer.eos_token_id:
            answers.append(tokenizer.decode(run))
            run = []
    assert not run
    return answers


@pytest.mark.parametrize("images", [0, 1, 2])
def test_tokens_with_loss_decode_to_the_answers(reader, tokenizer, images):
    encoded = reader.encode(example(images), 200)
    assert loss_texts(encoded, tokenizer) == [answer for _, answer in TURNS]
    assert len(encoded.media) == encoded.slots.get("image", 0) == images and encoded.dropped_turns == 0
    positions = images * MEDIA
    assert encoded.tokens[0] == tokenizer.bos_token_id
    assert media_index(encoded) == [-1, *range(positions)] + [-1] * (len(encoded.tokens) - 1 - positions)
    assert ((encoded.tokens == tokenizer.image_token_id) == (encoded.row.owners >= 0)).all()
    assert encoded.tokens.dtype.kind == "i" and encoded.loss_weights.dtype == np.float32


def test_an_image_has_the_position_that_the_message_gives_it(reader, tokenizer):
    t = tokenizer
    inside = Message("user", (Text("is"), Image(PIXELS), Text("like"), Image(PIXELS)))
    later = Message("user", (Image(PIXELS), Text("this?")))
    talk = Example((inside, Message("assistant", "no"), later, Message("assistant", "a cat")))
    encoded = reader.encode(talk, 200)
    image, user, assistant = [t.image_token_id] * MEDIA, t.id_of(USER), t.id_of(ASSISTANT)
    wanted = [t.bos_token_id, *t.words("is"), *image, *t.words("like"), *image, user]
    wanted += [assistant, *t.words("no"), t.eos_token_id, *image, user, *t.words("this?")]
    assert encoded.tokens.tolist() == [*wanted, assistant, *t.words("a cat"), t.eos_token_id]
    assert [i for i in media_index(encoded) if i >= 0] == list(range(3 * MEDIA))
    assert loss_texts(encoded, t) == ["no", "a cat"]


def test_words_may_name_each_region_of_an_image(reader, tokenizer):
    words = ("one", "two", "three", "four")
    assert len(words) == MEDIA
    ids = [tokenizer.words(word) for word in words]
    named = Processor(MODEL, tokenizer, ComposedLayout({"image": ImageTokens(8, MEDIA, ids)}, tokenizer.image_token_id))
    encoded, plain = named.encode(example(2), 200), reader.encode(example(2), 200)
    assert loss_texts(encoded, tokenizer) == loss_texts(plain, tokenizer)
    index = media_index(encoded)
    assert [i for i in index if i >= 0] == list(range(2 * MEDIA))
    ids, where = encoded.tokens.tolist(), [i for i, number in enumerate(index) if number >= 0]
    before = [ids[a + 1 : b] for a, b in zip([0, *where], where, strict=False)]
    assert [tokenizer.decode(each) for each in before] == list(words) * 2
    assert ids[where[-1] + 1 :] == plain.tokens.tolist()[1 + 2 * MEDIA :]
    prompt = named.prompt(example(2).messages[:1])
    assert prompt.tokens.tolist() == ids[: len(prompt.tokens)]
    assert named.fingerprint() != reader.fingerprint(), "rows have other lengths"
    assert not encoded.loss_weights[: where[-1] + 1].any()
    with pytest.raises(ConfigError, match="words for 4 .*which has 9"):
        ImageTokens(8, 9, [[1]] * 4)


@pytest.mark.parametrize("images", [0, 2])
def test_learning_all_leaves_out_the_start_and_the_images_only(reader, images):
    talk = example(images, context="a fruit")
    answers, everything = reader.encode(talk, 200), reader.encode(talk, 200, learn="all")
    assert everything.tokens.tolist() == answers.tokens.tolist()
    assert media_index(everything) == media_index(answers)
    given = 1 + images * MEDIA
    assert everything.loss_weights.tolist() == [0.0] * given + [1.0] * (len(answers.tokens) - given)
    assert 0 < answers.loss_weights.sum() < everything.loss_weights.sum()
    assert everything.loss_weights.dtype == np.float32


def test_all_answers_of_a_shortened_row_carry_loss(reader):
    whole = reader.encode(example(1, TURNS[:2]), 200, learn="all")
    short = reader.encode(example(1), len(whole.tokens), learn="all")
    assert short.dropped_turns == 1 and short.tokens.tolist() == whole.tokens.tolist()
    assert short.loss_weights.tolist() == whole.loss_weights.tolist()


def test_layout_of_a_conversation(reader, tokenizer):
    t = tokenizer
    encoded = reader.encode(example(1, TURNS[:2], context="a fruit"), 200)
    wanted = [t.bos_token_id, *[t.image_token_id] * MEDIA, *t.words("a fruit")]
    for question, answer in TURNS[:2]:
        wanted += [t.id_of(USER), *t.words(question), t.id_of(ASSISTANT), *t.words(answer), t.eos_token_id]
    assert encoded.tokens.tolist() == wanted


def test_a_template_that_is_not_known_to_only_add_gives_the_same_rows(reader, tokenizer):
    """Checks a template whose answers are searched for and whose rows are checked."""
    looked = processor(MODEL, Tokenizer(tokenizer.backend, OWN_TEMPLATE + "{# as before #}"))
    assert looked.tokenizer.answer_id is None is not reader.tokenizer.answer_id
    for talk in (example(2), example(0, context="a fruit <assistant>"), example(1, TURNS[:1])):
        for learn in ("answers", "all"):
            mine, theirs = reader.encode(talk, 60, learn), looked.encode(talk, 60, learn)
            assert mine.tokens.tolist() == theirs.tokens.tolist() and mine.dropped_turns == theirs.dropped_turns
            assert mine.loss_weights.tolist() == theirs.loss_weights.tolist()


def test_shortening_goes_by_whole_turns(reader, tokenizer):
    """Checks that at every length the row has the first turns that fit, whole."""
    wholes = [reader.encode(example(2, TURNS[:n]), 200) for n in (1, 2, 3)]
    lengths = [len(w.tokens) for w in wholes]
    for length in range(lengths[0], lengths[2] + 3):
        kept = sum(n <= length for n in lengths)
        encoded = reader.encode(example(2), length)
        assert len(encoded.tokens) == encoded.length <= length
        assert encoded.tokens.tolist() == wholes[kept - 1].tokens.tolist()
        assert encoded.dropped_turns == 3 - kept
        assert loss_texts(encoded, tokenizer) == [answer for _, answer in TURNS[:kept]]
        assert (encoded.row.owners >= 0).sum() == 2 * MEDIA, "images are never cut"


def test_an_example_that_does_not_fit_is_refused_with_its_three_parts(reader):
    need = len(reader.encode(example(2, TURNS[:1]), 200).tokens)
    with pytest.raises(DataError) as refusal:
        reader.encode(example(2), need - 1)
    assert refusal.value.given == f"an example of {need} tokens with 2 images"
    assert refusal.value.expected == f"at most {need - 1} tokens with its first turn"
    assert "length" in refusal.value.todo and "images" in refusal.value.todo
    text = str(refusal.value)
    assert all(part in text for part in (refusal.value.given, refusal.value.expected, refusal.value.todo))


@pytest.mark.parametrize("answer", ["", "  ", "\n\t"])
@pytest.mark.parametrize("place", [0, 2])
def test_an_empty_answer_is_refused(reader, answer, place):
    turns = list(TURNS)
    turns[place] = ("which one?", answer)
    with pytest.raises(DataError) as refusal:
        reader.encode(example(0, turns), 200)
    assert refusal.value.given == "an empty answer to 'which one?'"
    assert refusal.value.expected == "an answer with text" and refusal.value.todo


@pytest.mark.parametrize(
    "messages",
    [(), (Message("user", "a?"),), (Message("user", "a?"), Message("assistant", "b"), Message("user", "c?"))],
    ids=["nothing", "no answer", "a question at the end"],
)
def test_a_conversation_that_does_not_end_with_an_answer_is_refused(reader, messages):
    with pytest.raises(DataError) as refusal:
        reader.encode(Example(messages), 200)
    assert "a conversation of" in refusal.value.given and refusal.value.expected and refusal.value.todo


def test_prompt_is_the_conversation_up_to_the_answer(reader):
    for context in ("", "a fruit"):
        talk = example(2, TURNS[:1], context)
        whole, prompt = reader.encode(talk, 200), reader.prompt(talk.messages[:1])
        n = len(prompt.tokens)
        assert prompt.tokens.tolist() == whole.tokens[:n].tolist()
        assert media_index(prompt) == media_index(whole)[:n]
        assert whole.loss_weights[:n].sum() == 0 == prompt.loss_weights.sum()
        assert whole.loss_weights[n:].all()


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_no_message_can_forge_a_special_token(reader, tokenizer, special):
    """Checks questions, answers, system messages, texts, captions and prompts that spell a special token."""
    text = f"a {special} b"
    honest = (Message("user", (Image(PIXELS), Text("a b"))), Message("assistant", "a b"))
    forged = (Message("user", (Image(PIXELS), Text(text))), Message("assistant", text))
    token = tokenizer.id_of(special)

    def count(encoded) -> int:
        return (encoded.tokens == token).sum()

    assert count(reader.encode(Example(forged), 200)) == count(reader.encode(Example(honest), 200))
    assert loss_texts(reader.encode(Example(forged), 200), tokenizer) == [text]
    assert count(reader.prompt(forged[:1])) == count(reader.prompt(honest[:1]))
    systems = [(Message("system", said), *honest) for said in (text, "a b")]
    assert len({count(reader.encode(Example(each), 200)) for each in systems}) == 1
    texts = [Example((Message(TEXT_ROLE, (Image(PIXELS), Text(said))),)) for said in (text, "a b")]
    assert len({count(reader.encode(each, 200)) for each in texts}) == 1
    assert count(reader.encode_captions(captions([text]), 200, 1)) == count(
        reader.encode_captions(captions(["a b"]), 200, 1)
    )


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
@pytest.mark.parametrize("role", ["user", TEXT_ROLE])
def test_two_parts_cannot_forge_one_together(reader, tokenizer, special, role):
    parts = (Image(PIXELS), Text(f"a {special[:2]}"), Text(special[2:]))
    honest = (Image(PIXELS), Text("a "), Text("b"))
    rows = []
    for content in (parts, honest):
        messages = (Message(role, content), Message("assistant", "no"))
        rows.append(reader.encode(Example(messages[:1] if role == TEXT_ROLE else messages), 200))
    forged, plain = ((row.tokens == tokenizer.id_of(special)).sum() for row in rows)
    assert forged == plain


def test_a_text_with_the_seam_in_it_is_refused(reader):
    with pytest.raises(DataError, match="U\\+FDD0"):
        reader.encode(example(0, [(f"a{SEAM}b", "c")]), 200)
    with pytest.raises(DataError, match="U\\+FDD0"):
        reader.encode_captions(captions([f"a{SEAM}b"]), 200, 1)


@pytest.mark.parametrize("part,kind", [(Video([PIXELS], fps=1), "video"), (Audio(np.zeros(9, np.float32)), "audio")])
def test_a_part_that_the_model_does_not_read_is_refused(reader, part, kind):
    messages = (Message("user", (part, Text("what?"))), Message("assistant", "a cat"))
    for read in (lambda: reader.encode(Example(messages), 200), lambda: reader.prompt(messages[:1])):
        with pytest.raises(DataError) as refusal:
            read()
        assert kind in refusal.value.given.lower() and "image" in refusal.value.expected and refusal.value.todo


def test_an_image_of_another_size_is_resized(reader):
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    talk = Example((Message("user", (Image(large), Text("what?"))), Message("assistant", "a cat")))
    (medium,) = reader.encode(talk, 200).media
    assert medium.arrays["images"].shape == (1, 8, 8, 3) and medium.slots == 1
    np.testing.assert_allclose(medium.arrays["images"][0], large.reshape(8, 2, 8, 3, 3).mean((1, 3)), atol=1)
    same = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    (medium,) = reader.encode(replace(talk, messages=(Message("user", (Image(same),)), talk.messages[1])), 200).media
    np.testing.assert_array_equal(medium.arrays["images"][0], same)


# ---- texts without a chat template


def test_a_text_carries_loss_after_its_image(reader, tokenizer):
    t = tokenizer
    encoded = reader.encode(Example((Message(TEXT_ROLE, (Image(PIXELS), Text("a red apple"))),)), 200)
    written = t.encode("<image>a red apple\n")
    assert written[:2] == [t.bos_token_id, *t.ids(" ")] and written[2] == t.image_token_id
    assert encoded.tokens.tolist() == [*written[:2], *[t.image_token_id] * MEDIA, *written[3:]]
    assert encoded.loss_weights.tolist() == [0.0] * (2 + MEDIA) + [1.0] * len(written[3:])
    everything = reader.encode(Example((Message(TEXT_ROLE, (Image(PIXELS), Text("a red apple"))),)), 200, "all")
    assert everything.loss_weights.tolist() == [0, 1, *[0] * MEDIA, *[1] * len(written[3:])]
    alone = reader.encode(Example((Message(TEXT_ROLE, "a red apple"),)), 200)
    assert alone.tokens.tolist() == t.encode("a red apple\n") and alone.loss_weights.all()


def test_texts_that_no_row_can_hold_are_refused(reader):
    caption = Example((Message(TEXT_ROLE, (Image(PIXELS), Text("a red apple"))),))
    need = reader.encode(caption, 200).length
    with pytest.raises(DataError, match=f"a caption of {need} tokens with 1 "):
        reader.encode(caption, need - 1)
    with pytest.raises(DataError, match="a text without words"):
        reader.encode(Example((Message(TEXT_ROLE, (Image(PIXELS), Text(" \n"))),)), 200)


# ---- captions


def test_captions_of_an_image_and_of_its_regions(reader, tokenizer):
    said, regions = ("a red apple", "an apple"), (None, 2)
    encoded = reader.encode_captions(captions(said, regions), 50, 2)
    for number, (text, region) in enumerate(zip(said, regions, strict=True), start=1):
        here = encoded.segments == number
        ids = encoded.tokens[here]
        assert tokenizer.decode(ids) == text
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        index = np.asarray(media_index(encoded))[here]
        assert (index == (-1 if region is None else region)).all()
    assert set(encoded.segments) == {1, 2} and encoded.slots == {"image": 1} and encoded.loss_weights.all()
    batch = reader.pack([[encoded]], 50, {"image": 1})
    for number in (1, 2):
        positions = batch["positions"][0, batch["segments"][0] == number]
        assert positions.tolist() == list(range((encoded.segments == number).sum()))
    alone = replace(captions(said), segments=())
    assert reader.encode_captions(alone, 50, 2).tokens.tolist() == encoded.tokens.tolist()


@pytest.mark.parametrize(
    "said,regions,length,message",
    [
        ((" ",), None, 50, "an empty caption"),
        (("a red apple",), None, 4, "1 caption(s) of"),
        ((), None, 50, "0 captions"),
        (("a red apple",) * 3, None, 50, "3 captions"),
        (("an apple",), (4,), 50, "a caption of region 4"),
        (("an apple",), (-1,), 50, "a caption of region -1"),
    ],
)
def test_captions_that_no_row_can_hold_are_refused(reader, said, regions, length, message):
    with pytest.raises(DataError) as refusal:
        reader.encode_captions(captions(said, regions), length, 2)
    assert message in refusal.value.given and refusal.value.expected and refusal.value.todo
