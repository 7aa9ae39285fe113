"""Media that a model produces: signal tokens in answers, their loss, and the targets of a batch."""

from __future__ import annotations

import numpy as np
import pytest
from toy_data import MODEL, PIXELS

from mllm_jax.data.batch import assemble, targets_spec, text_spec
from mllm_jax.data.message import Audio, Example, Image, Message, Text
from mllm_jax.data.processing.captions import Captions
from mllm_jax.data.processing.composed import ComposedLayout, ImageTokens
from mllm_jax.data.processing.encode import ExampleEncoder, encode_turns
from mllm_jax.data.processing.signals import SignalTokens, ids_of, signal_names
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import ConfigError, DataError

SIDE, LENGTH = 4, 6
RED, BLUE = np.full((SIDE, SIDE, 3), 200, np.uint8), np.full((SIDE, SIDE, 3), 90, np.uint8)
TEXTS = ["draw a red cat", "here it is", "a blue dog", "what is this?", "a cat"]


def encoder_of(markers: bool, count: int = 3) -> ExampleEncoder:
    names = signal_names("image", count, markers)
    tokenizer = Tokenizer.train(TEXTS, 300, special=names)
    signals = SignalTokens(
        "image",
        ids_of(tokenizer, names, "here"),
        markers,
        (SIDE, SIDE, 3),
        "uint8",
        lambda part: np.asarray(part.source),
        Captions.of(tokenizer, LENGTH),
    )
    reads = {"image": ImageTokens(MODEL.image_size, MODEL.media_tokens)}
    return ExampleEncoder(tokenizer, ComposedLayout(reads, tokenizer.image_token_id, produced={"image": signals}))


def drawing(source=RED, caption="a red cat", after=()) -> Example:
    answer = (Text("here it is"), Image(source, caption=caption), *after)
    asked = (Image(PIXELS), Text("draw a red cat"))
    return Example((Message("user", asked), Message("assistant", answer)))


@pytest.mark.parametrize("markers", [False, True])
def test_an_image_of_an_answer_becomes_signal_tokens_and_one_of_a_question_media_tokens(markers):
    encoder = encoder_of(markers)
    t, ids = encoder.tokenizer, list(encoder.layout.produced["image"].ids)
    encoded = encode_turns(encoder, drawing(after=(Text("a cat"),)), 99, "answers")
    answer = [*t.words("here it is"), *ids, *t.words("a cat"), t.eos_token_id]
    assert encoded.tokens[-len(answer) :].tolist() == answer
    learned = [*t.words("here it is"), *(ids[:1] if markers else ids), *t.words("a cat"), t.eos_token_id]
    assert encoded.tokens[encoded.loss_weights > 0].tolist() == learned
    assert encoded.slots == {"image": 1, "image_targets": 1}
    assert (encoded.row.places[-len(answer) :] == -1).all(), "no encoder's vector is at a signal"
    assert (encoded.row.places >= 0).sum() == MODEL.media_tokens


@pytest.mark.parametrize("markers", [False, True])
def test_a_batch_has_the_positions_of_signals_the_targets_and_the_captions_of_packed_examples(markers):
    encoder = encoder_of(markers)
    t, layout = encoder.tokenizer, encoder.layout
    two = Example((*drawing().messages, *drawing(BLUE, "a blue dog").messages))
    rows = [
        [encode_turns(encoder, each, 99, "answers") for each in (drawing(BLUE, "a blue dog"), two)],
        [encode_turns(encoder, Example((Message("user", "what is this?"), Message("assistant", "a cat"))), 99, "all")],
    ]
    slots = {"image": 4, "image_targets": 5}
    target = (SIDE, SIDE, 3), "uint8"
    spec = text_spec(2, 99) | targets_spec("image", 2, 5, target, 3, LENGTH)
    batch = assemble(rows, spec, layout, slots)
    signals = [t.id_of(name) for name in ("<image_0>", "<image_1>", "<image_2>")]
    assert batch["image_signals"].shape == (2, 5, 3)
    for slot in range(3):
        at = batch["image_signals"][0, slot]
        assert batch["tokens"][0, at].tolist() == signals
    assert len(np.unique(batch["image_signals"][0, :3])) == 9
    assert (batch["image_signals"][0, 3:] == -1).all() and (batch["image_signals"][1] == -1).all()
    assert (batch["segments"][0, batch["image_signals"][0, :3]] == np.array([[1], [2], [2]])).all()
    for slot, (pixels, caption) in enumerate(((BLUE, "a blue dog"), (RED, "a red cat"), (BLUE, "a blue dog"))):
        assert (batch["image_targets"][0, slot] == pixels).all()
        ids = t.caption_ids(caption)
        assert batch["image_captions"][0, slot].tolist() == (ids + [t.pad_token_id] * LENGTH)[:LENGTH]
    assert not batch["image_targets"][1].any()


def test_a_long_caption_keeps_its_end_and_an_answer_may_be_an_image_alone():
    encoder = encoder_of(False)
    t = encoder.tokenizer
    alone = Example((Message("user", "draw a cat"), Message("assistant", (Image(RED, caption="a cat " * 9),))))
    encoded = encode_turns(encoder, alone, 99, "answers")
    (medium,) = encoded.media
    caption = medium.arrays["image_captions"][0]
    assert caption.shape == (LENGTH,) and caption[-1] == t.eos_token_id and caption[0] == t.bos_token_id
    with pytest.raises(DataError, match="without a caption"):
        encode_turns(encoder, drawing(caption=" "), 99, "answers").media[-1].arrays["image_captions"]
    with pytest.raises(DataError, match="empty answer"):
        encode_turns(encoder, Example((Message("user", "draw"), Message("assistant", ""))), 99, "answers")


def test_dropped_turns_take_their_media_with_them():
    encoder = encoder_of(False)
    first, second = drawing(), drawing(BLUE, "a blue dog")
    whole = encode_turns(encoder, Example((*first.messages, *second.messages)), 99, "answers")
    cut = encode_turns(encoder, Example((*first.messages, *second.messages)), len(whole.tokens) - 1, "answers")
    assert cut.dropped_turns == 1 and cut.slots == {"image": 1, "image_targets": 1}
    assert cut.tokens.tolist() == encode_turns(encoder, first, 99, "answers").tokens.tolist()


def test_an_image_of_an_earlier_answer_in_a_prompt_has_its_tokens_and_no_target():
    encoder = encoder_of(True)
    (media,) = encoder.media_of([drawing().messages[1]], learned=False)
    assert media.slots == 0 and not media.arrays
    assert media.tokens.tolist() == list(encoder.layout.produced["image"].ids)


def test_a_sound_of_an_answer_is_refused_by_a_model_that_produces_images():
    with pytest.raises(DataError, match="type Audio"):
        encode_turns(encoder_of(False), Example((Message("user", "a"), Message("assistant", (Audio(b""),)))), 99, "all")


def test_signal_tokens_are_special_survive_saving_and_cannot_be_spelled_by_a_text(tmp_path):
    names = signal_names("image", 2, True)
    assert names == ("<begin_image>", "<image_0>", "<image_1>", "<end_image>")
    tokenizer = Tokenizer.train(TEXTS, 300, special=names)
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.special_tokens == tokenizer.special_tokens and set(names) < set(again.special_tokens)
    assert again.fingerprint() == tokenizer.fingerprint()
    ids = [again.id_of(name) for name in names]
    assert again.ids("<begin_image><image_0><image_1><end_image>") == ids
    assert not set(again.words("a <image_0> cat")) & set(ids)
    assert again.decode([*again.words("a cat"), *ids]) == "a cat"
    with pytest.raises(ConfigError, match="<image_2>"):
        ids_of(again, signal_names("image", 3, True), "here")
