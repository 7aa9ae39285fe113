"""Rows that are refilled while others continue: every request gets the tokens that it gets alone, in fewer steps."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_language import CONFIG, encoded, language, random_params

from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.engine import Engine, Request
from mllm_jax.generation.options import Options
from mllm_jax.generation.program import BUCKET
from mllm_jax.generation.sampling import Sampling
from mllm_jax.llms.t5 import T5Config
from mllm_jax.sharding.mesh import MeshConfig, make_mesh

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 256, n).tolist() for n in (7, 30, 3, 12, 1, 9, 20)]
LIMITS = (2, 11, 3, 1, 14, 5, 8)
FREE = Options(ignore_eos=True)


@pytest.fixture(scope="module")
def assistant():
    return language(CONFIG.make(), random_params())


def engine_of(assistant, slots: int) -> Engine:
    return Engine(assistant.program, assistant._batch, slots, assistant.max_length)


def requests(assistant, sampling: Sampling = Sampling(), options: Options = FREE, limits=LIMITS) -> list[Request]:
    prompts = encoded(assistant, PROMPTS[: len(limits)])
    return [
        assistant.request(prompt, len(prompt.tokens), limit, index, options, sampling)
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]


WAYS = {
    "greedy": (Sampling(), FREE),
    "sampled": (Sampling(1.2, top_k=50, top_p=0.9, repetition_penalty=1.3, seed=5), replace(FREE, logprobs=True)),
}


@pytest.mark.parametrize("way", WAYS)
def test_refilled_rows_give_the_tokens_of_one_at_a_time(assistant, way):
    asked = requests(assistant, *WAYS[way])
    alone = [engine_of(assistant, 1).answer([request])[0] for request in asked]
    assert [len(answer.tokens) for answer in alone] == list(LIMITS)
    for order in (1, -1):
        found = engine_of(assistant, 3).answer(asked[::order])[::order]
        assert [a.tokens for a in found] == [a.tokens for a in alone]
        for ours, own in zip(found, alone, strict=True):
            assert (ours.logprobs is None) == (own.logprobs is None)
            np.testing.assert_allclose(ours.logprobs or (), own.logprobs or (), atol=1e-4)


def test_a_long_answer_holds_up_no_other(assistant):
    """Compares with batches, which would wait for the longest of each pair: 19 + 1 + 1 + 1 steps."""
    engine = engine_of(assistant, 2)
    asked = requests(assistant, limits=(20, 2, 2, 2, 2, 2, 2))
    ended = []
    for request in asked:
        engine.submit(request)
    while len(ended) < len(asked):
        ended += [ticket for ticket, _ in engine.step()]
    assert engine.decode_steps == 19
    assert ended[:5] == [1, 2, 3, 4, 5] and sorted(ended[5:]) == [0, 6]


def test_a_request_between_steps_gets_a_free_row(assistant):
    first, late = requests(assistant, limits=(30, 3))
    alone = engine_of(assistant, 1).answer([first])[0]
    engine = engine_of(assistant, 2)
    assert engine.submit(first) == 0
    assert engine.step(4) == [] and engine.step(4) == []
    assert engine.submit(late) == 1
    done = []
    while not done:
        done = engine.step(2)
    [(ticket, answer)] = done
    assert ticket == 1 and len(answer.tokens) == 3
    [(ticket, answer)] = engine.step()
    assert ticket == 0 and answer.tokens == alone.tokens


def test_pieces_add_up_and_a_stop_string_frees_the_row(assistant):
    whole = engine_of(assistant, 1).answer(requests(assistant, limits=(12,)))[0]
    stop = f" {whole.tokens[3]} "  # the tokenizer writes ids with spaces between them
    asked = requests(assistant, options=replace(FREE, stop_strings=(stop,)), limits=(12, 12, 12, 12))
    engine = engine_of(assistant, 2)
    tickets = [engine.submit(request) for request in asked]
    texts, found = dict.fromkeys(tickets, ""), {}
    while len(found) < len(tickets):
        found |= engine.step(3)
        for ticket, piece in engine.pieces.items():
            texts[ticket] += piece
    assert texts == {ticket: answer.text for ticket, answer in found.items()}
    assert found[0].reason == "stop" and found[0].text == whole.text.split(stop)[0]
    assert any(answer.reason == "length" for answer in found.values())


def test_what_does_not_go_together_waits_and_is_answered(assistant):
    """Checks other filters, beams and longer prompts: each gets the answer that it gets alone."""
    greedy, sampled = requests(assistant), requests(assistant, Sampling(temperature=1.0, seed=2))
    beams = requests(assistant, options=replace(FREE, num_beams=3))
    [long] = encoded(assistant, [[5] * (2 * BUCKET + 1)])
    asked = [greedy[1], sampled[1], beams[1], beams[4], assistant.request(long, 65, 6, 0, FREE, Sampling())]
    alone = [engine_of(assistant, 1).answer([request])[0].tokens for request in asked]
    assert [a.tokens for a in engine_of(assistant, 2).answer(asked)] == alone
    assert len(set(alone)) == len(alone)


def test_another_seed_shares_rows_and_compiles_nothing(assistant):
    asked = requests(assistant, Sampling(temperature=1.0))
    mixed = [replace(r, sampling=replace(r.sampling, seed=i % 2)) for i, r in enumerate(asked)]
    alone = [engine_of(assistant, 1).answer([request])[0].tokens for request in mixed]
    compiled = assistant.program.advance._cache_size()
    assert [a.tokens for a in engine_of(assistant, 1).answer(mixed)] == alone
    assert assistant.program.advance._cache_size() == compiled
    assert [a.tokens for a in engine_of(assistant, 2).answer(mixed)] == alone


def test_prompts_are_read_together(assistant, monkeypatch):
    """Checks eight rows: first all at once, then two at a time."""
    widths = []

    def collate(prompts, rows, length):
        widths.append((len(prompts), rows))
        return assistant._batch(prompts, rows, length)

    engine = Engine(assistant.program, collate, 8)
    [prompt] = encoded(assistant, PROMPTS[:1])
    limits = (2, 3, 4, 5, 6, 7, 8, 9, 2, 2, 2)
    engine.answer(assistant.request(prompt, 7, limit, i, FREE, Sampling()) for i, limit in enumerate(limits))
    assert widths == [(8, 8), (2, 2), (1, 2)]


def test_an_encoder_decoder_is_refilled():
    config = T5Config(260, 16, 4, 24, num_layers=1, num_decoder_layers=1, num_heads=4, eos_token_id=())
    module, ones = config.make(), jnp.ones((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), ones, None, None, ones))["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32)), nn.meta.unbox(shapes))
    assistant = language(module, params)
    long = encoded(assistant, [[7, *range(40)]])[0]
    asked = [*requests(assistant), assistant.request(long, 41, 4, 7, FREE, Sampling())]
    alone = [engine_of(assistant, 1).answer([request])[0].tokens for request in asked]
    assert [a.tokens for a in engine_of(assistant, 2).answer(asked)] == alone and len(set(alone)) == len(alone)


def test_rows_over_a_mesh_are_refilled(assistant, devices):
    asked = requests(assistant)
    sharded = language(CONFIG.make(), random_params(), mesh=make_mesh(MeshConfig(data=2, tensor=2), devices[:4]))
    wanted = [a.tokens for a in engine_of(assistant, 4).answer(asked)]
    assert [a.tokens for a in engine_of(sharded, 4).answer(asked)] == wanted
    compiled = [function._cache_size() for function in (sharded.program.refill, sharded.program.advance)]
    assert compiled == [1, 1], "what was made in another way is split over the mesh in the same way"


def test_without_a_request_nothing_is_computed(assistant):
    engine = engine_of(assistant, 2)
    assert engine.step() == [] == engine.step(3) == engine.answer([])
    engine.answer(requests(assistant))
    assert engine.step() == []


def test_what_cannot_be_answered_is_refused_when_it_is_submitted(assistant):
    engine, [request] = engine_of(assistant, 2), requests(assistant, limits=(3,))
    for change in (dict(length=0), dict(limit=0), dict(length=97)):
        with pytest.raises(DataError, match="new ones") as refusal:
            engine.submit(replace(request, **change))
        assert refusal.value.expected == "at least one of each, and prompts of at most 96 tokens"
    with pytest.raises(ConfigError, match="beam search, or sampling"):
        engine.submit(replace(request, options=Options(num_beams=2), sampling=Sampling(temperature=1.0)))
    with pytest.raises(ConfigError, match="batch_size 0"):
        engine_of(assistant, 0)
    assert engine.step() == []


class Torn(Exception):
    pass


def refusing(assistant, bad: set[int]):
    """Returns a collate that refuses prompts with these numbers, and the list of widths of its calls."""
    asked = requests(assistant)
    numbers = {id(request.prompt): i for i, request in enumerate(asked)}
    widths = []

    def collate(prompts, rows, length):
        widths.append(len(prompts))
        if found := bad & {numbers[id(prompt)] for prompt in prompts}:
            raise Torn(f"prompt {min(found)}")
        return assistant._batch(prompts, rows, length)

    return asked, collate, widths


@pytest.mark.parametrize("bad", [{0}, {2}, {1, 5, 6}, {6}])
def test_a_prompt_that_cannot_be_read_fails_alone(assistant, bad):
    """Checks prompts that begin the rows, and prompts read into a row while others continue."""
    asked, collate, _ = refusing(assistant, bad)
    wanted = engine_of(assistant, 3).answer(requests(assistant))
    engine = Engine(assistant.program, collate, 3, assistant.max_length)
    tickets, found = [engine.submit(request) for request in asked], {}
    while len(found) < len(tickets):
        found |= engine.step()
    for i, ticket in enumerate(tickets):
        if i in bad:
            assert isinstance(found[ticket], Torn) and str(found[ticket]) == f"prompt {i}"
        else:
            assert found[ticket].tokens == wanted[i].tokens
    assert engine.step() == [] and engine.waiting == 0
    with pytest.raises(Torn, match=f"prompt {min(bad)}"):
        Engine(assistant.program, collate, 3).answer(asked)


def test_prompts_that_cannot_be_read_together_are_read_one_by_one(assistant):
    asked, collate, widths = refusing(assistant, set())

    def alone(prompts, rows, length):
        if len(prompts) > 1:
            raise Torn
        return collate(prompts, rows, length)

    wanted = engine_of(assistant, 4).answer(asked)
    assert [a.tokens for a in Engine(assistant.program, alone, 4).answer(asked)] == [a.tokens for a in wanted]
    assert widths == [1] * len(asked)


def test_a_search_by_beams_fails_alone_too(assistant):
    asked, collate, _ = refusing(assistant, {1})
    asked = [replace(request, options=replace(FREE, num_beams=2)) for request in asked[:3]]
    engine = Engine(assistant.program, collate, 2, assistant.max_length)
    tickets, found = [engine.submit(request) for request in asked], {}
    while len(found) < len(tickets):
        found |= engine.step()
    assert [isinstance(found[ticket], Torn) for ticket in tickets] == [False, True, False]


def test_a_prompt_is_dropped_once_it_has_a_row(assistant):
    engine, asked = engine_of(assistant, 2), requests(assistant)
    for request in asked:
        engine.submit(request)
    engine.step(1)
    assert [request.prompt for _, request, _ in engine._running] == [None, None]
    assert engine.waiting == len(asked) - 2 and engine.length == BUCKET
