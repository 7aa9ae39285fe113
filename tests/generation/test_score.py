"""The assistant's probabilities of given answers, against full passes, in batches and alone."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_assistant_media import CONFIG as MULTIMODAL
from test_assistant_media import IdTokenizer, asked, make_image, random_params_of
from tiny_language import CONFIG, byte_tokenizer, language, random_params
from toy_data import processor as processor_of

from mllm_jax.data.message import Message
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import DataError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.llms.t5 import T5Config
from mllm_jax.models.multimodal import MultimodalConfig

QUESTIONS = ["hi", "why is that so?", "how many of them are there, and where do they stand?"]
SAID = ["a cat", "yes", "as many as a spider has"]
END = 256  # <|end|>
T5 = T5Config(260, 16, 4, 24, num_layers=2, num_decoder_layers=2, num_heads=4)


@lru_cache
def applied(config):
    return jax.jit(config.make().apply)


def random_of(module, *given) -> dict:
    shapes = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *given)))["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape).astype(np.float32)), shapes)


@pytest.fixture(scope="module")
def decoder():
    return language(CONFIG.make(), random_params(), byte_tokenizer())


def check(found, wanted) -> None:
    assert [len(a) for a in found] == [len(b) for b in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=1e-4)


def of_rows(logits, ids, first) -> np.ndarray:
    """Returns the log probabilities of ids[first:]."""
    chosen = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
    return chosen[first - 1 :]


def wanted_of(assistant: Assistant, conversations, said) -> list[np.ndarray]:
    """Computes them by a full pass over one row of the template at a time; the answer's end token counts."""
    tokenizer, out = assistant.processor.tokenizer, []
    for messages, answer in zip(conversations, said, strict=True):
        before = tokenizer.encode_chat(messages)
        ids = [*before, *tokenizer.encode(answer), END]
        assert ids == tokenizer.encode_chat([*messages, dict(role="assistant", content=answer)], False)
        out.append(of_rows(applied(CONFIG)({"params": assistant.params}, np.array([ids]))[0], ids, len(before)))
    return out


def test_a_decoder(decoder):
    found = decoder.score(QUESTIONS, SAID, batch_size=2)
    check(found, wanted_of(decoder, [[dict(role="user", content=q)] for q in QUESTIONS], SAID))
    assert [len(a) for a in found] == [len(s) + 1 for s in SAID]
    for question, answer, together in zip(QUESTIONS, SAID, found, strict=True):
        check(decoder.score(question, answer), [together])
    check(decoder.score(QUESTIONS[::-1], SAID[::-1]), found[::-1])


def test_of_a_conversation_the_last_answer_counts(decoder):
    said = [("user", "hi"), ("assistant", "ho"), ("user", "and?")]
    [found] = decoder.score([Message(*m) for m in said], "so")
    check([found], wanted_of(decoder, [[dict(role=r, content=c) for r, c in said]], ["so"]))
    assert len(found) == 3


def test_greedy_answers_have_the_probabilities_that_generation_gives(decoder):
    answer = decoder.generate(Message("text", "hi"), max_new_tokens=6, ignore_eos=True, logprobs=True)
    ids = decoder.prompt([Message("text", "hi")]).tokens.tolist() + list(answer.tokens)
    logits = applied(CONFIG)({"params": decoder.params}, np.array([ids]))[0]
    np.testing.assert_allclose(answer.logprobs, of_rows(logits, ids, 2), atol=1e-4)


def test_a_text_without_a_chat_template():
    config = dataclasses.replace(CONFIG, eos_token_id=(7,))
    bare = language(config.make(), random_params(), byte_tokenizer(template=None))
    ids = bare.processor.tokenizer.encode("hi there")
    whole = [*ids, 7]
    logits = applied(config)({"params": bare.params}, np.array([whole]))[0]
    check(bare.score("hi", " there"), [of_rows(logits, whole, 2)])


def test_an_encoder_decoder():
    ones = jnp.ones((1, 4), jnp.int32)
    params = random_of(T5.make(), ones, None, None, ones)
    assistant = language(T5.make(), params, byte_tokenizer(template=None))
    encode, wanted = assistant.processor.tokenizer.encode, []
    for question, answer in zip(QUESTIONS, SAID, strict=True):
        target = [T5.decoder_start_token_id, *encode(answer), T5.eos_token_id[0]]
        logits = applied(T5)({"params": params}, jnp.array([encode(question)]), None, None, jnp.array([target]))
        wanted.append(of_rows(logits[0], target, 1))
    found = assistant.score(QUESTIONS, SAID, batch_size=2)
    check(found, wanted)
    for question, answer, together in zip(QUESTIONS, SAID, found, strict=True):
        check(assistant.score([question], [answer]), [together])


@pytest.mark.parametrize("llm", [MULTIMODAL.llm, dataclasses.replace(T5, vocab_size=280)], ids=["decoder", "t5"])
def test_a_model_with_images(llm):
    config: MultimodalConfig = dataclasses.replace(MULTIMODAL, llm=llm)
    tokenizer = IdTokenizer(Tokenizer.train(["what is this? a red apple"] * 3, 280).backend)
    params = random_params_of(config)
    assistant = Assistant(config.make(), params, processor_of(config, tokenizer))
    asks = [
        asked("what?", make_image(0)),
        asked("is it a red apple, or what?", make_image(1), make_image(2)),
        asked("why"),
    ]
    said = ["a red apple", "it is", "so"]
    wanted = []
    for messages, answer in zip(asks, said, strict=True):
        batch = assistant.processor([{"role": "user", "content": list(messages[0].content)}])
        ids = [*tokenizer.ids(answer), T5.eos_token_id[0]]
        if config.encoder_decoder:
            first, row = 1, np.array([[T5.decoder_start_token_id, *ids]])
            counted = np.arange(row.shape[1])[None]
            batch |= dict(decoder_tokens=row, decoder_segments=np.ones_like(row), decoder_positions=counted)
        else:
            ids = [*tokenizer.ids(f" {answer}"), tokenizer.eos_token_id]
            first = batch["tokens"].shape[1]
            row = np.concatenate([batch["tokens"], [ids]], axis=1)
            more = np.full((1, len(ids)), -1)
            batch |= dict(tokens=row, positions=np.arange(row.shape[1])[None], segments=np.ones_like(row))
            batch |= dict(media_index=np.concatenate([batch["media_index"], more], axis=1))
        wanted.append(of_rows(applied(config)({"params": params}, batch).logits[0], row[0], first))
    found = assistant.score(asks, said)
    check(found, wanted)
    for each, answer, together in zip(asks, said, found, strict=True):
        check(assistant.score(each, answer), [together])
    other = assistant.score(asked("what?", make_image(3)), said[0])[0]
    assert np.abs(other - found[0]).max() > 1e-2, "the image counts"


def test_what_cannot_be_scored_is_refused(decoder):
    with pytest.raises(DataError, match=r"3 conversation\(s\), 2 answer\(s\)"):
        decoder.score(QUESTIONS, SAID[:2])
    with pytest.raises(DataError, match=r"1 conversation\(s\), 2 answer\(s\)"):
        decoder.score("hi", ["a", "b"])
    with pytest.raises(DataError, match="an empty answer to"):
        decoder.score("hi", " ")
    with pytest.raises(DataError, match="at most 96"):
        decoder.score("hi", "x" * 100)
    # Training would drop its last turn; an absent answer has no probability.
    long = [Message("user", "hi"), Message("assistant", "ho"), Message("user", "x" * 80)]
    with pytest.raises(DataError, match="more than 96 tokens"):
        decoder.score(long, "y" * 20)
