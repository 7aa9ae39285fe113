"""Media in answers: their places, what they are made of, and runs of signal tokens that a model leaves incomplete."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import linen as nn
from tiny_drawing import LENGTH, SIZE, WIDTH, Drawings, drawing_model

from mllm_jax.data.message import Image, Message, Text
from mllm_jax.data.pipeline import training_texts
from mllm_jax.data.processing.signals import signal_names
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.draw import Drawing
from mllm_jax.generation.media import Media
from mllm_jax.generation.options import Answer
from mllm_jax.generation.produce import joined
from mllm_jax.models.composed_layout import composed_layout
from mllm_jax.models.processor import Processor

FAST = dict(steps=2, guidance_scale=2.0)


def assistant_of(queries: bool) -> Assistant:
    config = drawing_model(queries)
    output = config.output("image")
    names = signal_names("image", output.projector.tokens, queries)
    words = Tokenizer.train(training_texts([Drawings().build()]), 320, special=names)
    processor = Processor(config, words, composed_layout(config, words))
    batch = processor.spec(1, 8, {"image": 1, "image_targets": 1}).empty()
    shapes = jax.eval_shape(lambda: nn.unbox(config.make().init(jax.random.key(0), batch, method="touch")))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.12, leaf.shape)), shapes["params"])
    return Assistant(config.make(), params, processor, by_layer=False)


@pytest.fixture(scope="module", params=[False, True], ids=["signals", "queries"])
def assistant(request):
    return assistant_of(request.param)


class Script:
    """An engine whose answers are given: texts and the token that ended each."""

    def __init__(self, pieces):
        self.pieces, self.asked = list(pieces), []

    def answer(self, requests):
        requests = list(requests)
        self.asked += requests
        return [self.pieces.pop(0) for _ in requests]


def piece(assistant, text: str, end: int | None = None) -> Answer:
    ids = tuple(assistant.processor.tokenizer.words(text) if text else ())
    return Answer(text, ids, reason="length" if end is None else "stop", stop_token=end)


def written(assistant, monkeypatch, *pieces: Answer) -> Script:
    script = Script(pieces)
    monkeypatch.setattr(assistant, "engine", lambda rows: script)
    return script


def test_a_medium_is_drawn_from_the_hidden_states_at_its_signals(assistant):
    asked = ["draw red", "draw green and blue"]
    answers = assistant.generate(asked, produce=("image",), drawing=FAST, max_new_tokens=3, seed=5)
    config, processor = assistant.model.config, assistant.processor
    ids = processor.layout.produced["image"].ids
    for index, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        image = answer.media[0]  # a random model may write signals itself
        assert image.kind == "image" and image.array.shape == (SIZE, SIZE, 3)
        assert ((image.array > 0) & (image.array < 1)).mean() > 0.1, "not all of it is clipped"
        assert answer.tokens[: len(ids)] == ids and answer.text.startswith("<image 1>")
        assert image.metadata["seed"] == str(5 + index) and question in image.metadata["prompt"]
        # The same by hand: a row of prompt and signals, the projector's condition, the sampling loop.
        prompt = assistant.prompt((Message("user", question),))
        encoded = replace(prompt, row=prompt.row.followed_by(ids), loss_weights=np.zeros(len(prompt.tokens) + len(ids)))
        batch = processor.batch([encoded])
        first = len(prompt.tokens) + (len(ids) > config.output("image").projector.tokens)
        batch["image_signals"] = first + np.arange(config.output("image").projector.tokens)[None, None]
        made = assistant.model.apply({"params": assistant.params}, batch, method="conditions")["image"]
        assert made.shape == (1, 1, LENGTH, WIDTH)
        drawn = assistant.drawer.draw_conditions(made[0], [question], Drawing(seed=[5 + index], **FAST))
        np.testing.assert_allclose(drawn[0].media[0].array, image.array, atol=2e-4)


def test_an_answer_goes_on_after_a_medium_that_the_model_begins(assistant, monkeypatch):
    ids = assistant.processor.layout.produced["image"].ids
    end = assistant.processor.tokenizer.eos_token_id
    pieces = (piece(assistant, *each) for each in (("here", ids[0]), ("and", ids[0]), ("red", end)))
    script = written(assistant, monkeypatch, *pieces)
    answer = assistant.generate("draw red", drawing=FAST, max_new_tokens=30)
    assert answer.text == "here <image 1> and <image 2> red" and answer.reason == "stop"
    words = assistant.processor.tokenizer.words
    assert answer.tokens == (*words("here"), *ids, *words("and"), *ids, *words("red"))
    assert [medium.metadata["seed"] for medium in answer.media] == ["0", str(1 << 20)]
    # Each piece is asked with all before it, and with what is left of its tokens.
    assert [request.limit for request in script.asked] == [30, 30 - len(words("here")) - 1] + [script.asked[2].limit]
    assert set(ids[:1]) <= set(script.asked[0].stops) and end in script.asked[0].stops
    following = script.asked[1].prompt.tokens[-len(ids) :]
    assert tuple(following) == ids


def test_an_incomplete_run_is_repaired_or_reported(assistant, monkeypatch):
    ids = assistant.processor.layout.produced["image"].ids
    end, queries = assistant.processor.tokenizer.eos_token_id, assistant.model.config.output("image").queries
    written(assistant, monkeypatch, piece(assistant, "", ids[2]), piece(assistant, "red", end))
    answer = assistant.generate("draw red", drawing=FAST)
    assert answer.text == "<image 1> red" and len(answer.media) == 1 and answer.tokens[: len(ids)] == ids
    written(assistant, monkeypatch, piece(assistant, "a", ids[2]))
    with pytest.warns(UserWarning, match="0 of the .* signal tokens of the image"):
        answer = assistant.generate("draw red", drawing=FAST, incomplete="report")
    assert (answer.reason, answer.media, answer.text) == ("incomplete", (), "a")
    if queries:
        return
    # The model writes the others itself: all of them, or not.
    first = piece(assistant, "a", ids[0])
    written(assistant, monkeypatch, first, Answer("", ids[1:], reason="length"), piece(assistant, "red", end))
    answer = assistant.generate("draw red", drawing=FAST, incomplete="report")
    assert answer.text == "a <image 1> red" and len(answer.media) == 1
    assert answer.tokens == (*first.tokens, *ids, *assistant.processor.tokenizer.words("red"))
    written(assistant, monkeypatch, first, Answer("", ids[1:2], stop_token=end))
    with pytest.warns(UserWarning, match="answer 0: 2 of the 3 signal tokens of the image"):
        answer = assistant.generate("draw red", drawing=FAST, incomplete="report")
    assert (answer.reason, answer.media) == ("incomplete", ())


def test_answers_end_where_media_no_longer_fit(assistant, monkeypatch):
    ids = assistant.processor.layout.produced["image"].ids
    begin = piece(assistant, "", ids[0])
    written(assistant, monkeypatch, begin, begin, begin)
    answer = assistant.generate("draw red", drawing=FAST, most=2)
    assert len(answer.media) == 2 and answer.reason == "length"
    longest = len(assistant.prompt((Message("user", "draw red"),)).tokens) + len(ids) + 3
    monkeypatch.setattr(assistant, "max_length", longest)
    written(assistant, monkeypatch, begin, begin)
    answer = assistant.generate("draw red", drawing=FAST)
    assert len(answer.media) == 1 and answer.reason == "length"
    monkeypatch.setattr(assistant, "max_length", longest - 4)
    with pytest.raises(DataError, match="of the image to produce"):
        assistant.generate("draw red", produce="image", drawing=FAST)


def test_a_stream_yields_media_at_their_places(assistant, monkeypatch):
    ids = assistant.processor.layout.produced["image"].ids
    pieces = iter([("here", piece(assistant, "here", ids[0])), ("red", piece(assistant, "red", 2))])

    def streamed(engine):
        text, answer = next(pieces)
        yield text
        return answer

    monkeypatch.setattr(assistant, "streamed", streamed)
    stream, found = assistant.stream("draw red", drawing=FAST), []
    try:
        while True:
            found.append(next(stream))
    except StopIteration as end:
        answer = end.value
    assert [found[0], found[2]] == ["here", "red"] and isinstance(found[1], Media)
    assert answer.text == "here <image 1> red" and answer.media[0] is found[1]


def test_a_drawn_image_in_the_conversation_is_its_signals(assistant):
    ids = assistant.processor.layout.produced["image"].ids
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    turns = (Message("user", "draw red"), Message("assistant", (Text("here"), Image(pixels))), Message("user", "again"))
    tokens = tuple(assistant.prompt(turns).tokens.tolist())
    assert any(tokens[i : i + len(ids)] == ids for i in range(len(tokens)))
    answer = assistant.generate(turns, produce="image", drawing=FAST, max_new_tokens=2)
    assert answer.media and answer.tokens[: len(ids)] == ids


def test_a_text_is_drawn_by_the_generator_alone(assistant):
    one, two = assistant.draw(["red", "green"], steps=2, guidance_scale=1.0, seed=[3, 4])
    assert one.media[0].array.shape == (SIZE, SIZE, 3)
    alone = assistant.draw("green", steps=2, guidance_scale=1.0, seed=4)[0]
    np.testing.assert_allclose(alone.media[0].array, two.media[0].array, atol=1e-5)
    other = assistant.with_params(jax.tree.map(lambda leaf: leaf * 0.5, assistant.params))
    changed = other.draw("green", steps=2, guidance_scale=1.0, seed=4)[0]
    assert np.abs(changed.media[0].array - two.media[0].array).max() > 1e-3


def test_what_cannot_be_produced_is_refused(assistant):
    for given, message in (
        (dict(produce=("video",)), "videos from a model that produces text, image"),
        (dict(incomplete="guess"), "'repair' or 'report'"),
        (dict(drawing=dict(start_image="a.png")), "drawing with start_image inside"),
        (dict(drawing=dict(stepz=3)), "drawing with stepz"),
        (dict(logprobs=True), "signal tokens are put in"),
        (dict(most=0), "most=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            assistant.generate("draw red", **given)


def test_spaces_between_texts_and_marks():
    assert joined(["here", "<image 1>", ". Or", "<image 2>"]) == "here <image 1>. Or <image 2>"
    assert joined(["", "<image 1>", " red"]) == "<image 1> red"
