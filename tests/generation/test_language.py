"""Generation from a language model: the tokens of full passes, whatever the batch, the bucket and the options."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from mllm_jax.generation.language import LanguageGenerator
from tiny_language import CONFIG, byte_tokenizer, random_params, write_folder

from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.engine import BUCKET, bucket
from mllm_jax.generation.options import Options
from mllm_jax.generation.sampling import Sampling, filtered
from mllm_jax.llms.t5 import T5Config
from mllm_jax.sharding.mesh import MeshConfig, make_mesh, param_shardings

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, n).tolist() for n in (5, 1, 40, 17, 33)]
NEW = 12


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def generator(params):
    return LanguageGenerator(CONFIG.make(), params, byte_tokenizer(), batch_size=4)


@pytest.fixture(scope="module")
def reference(params):
    """Tokens and log probabilities by full passes over one padded row, without a cache."""

    @partial(jax.jit, static_argnames="sampling")
    def choose(row, length, seen, sampling):
        segments = jnp.int32(jnp.arange(64)[None] < length)
        logits = CONFIG.make().apply({"params": params}, row, None, segments)[:, length - 1]
        token = filtered(logits, sampling, seen)[0].argmax()
        return token, jax.nn.log_softmax(logits[0])[token]

    def continue_(prompt: list[int], sampling: Sampling = Sampling(), new: int = NEW) -> tuple[list[int], list[float]]:
        ids, logprobs = list(prompt), []
        for _ in range(new):
            row, seen = np.zeros((1, 64), np.int32), np.zeros((1, CONFIG.vocab_size), bool)
            row[0, : len(ids)], seen[0, ids] = ids, True
            token, logprob = choose(row, len(ids), seen, sampling)
            logprobs.append(float(logprob))
            ids.append(int(token))
        return ids[len(prompt) :], logprobs

    return continue_


@pytest.fixture(scope="module")
def wanted(reference):
    found = [reference(prompt)[0] for prompt in PROMPTS]
    assert len(set(map(tuple, found))) == len(PROMPTS) and all(len(set(row)) >= 3 for row in found)
    return found


FREE = Options(NEW, ignore_eos=True)


def ids(completions) -> list[list[int]]:
    return [list(c.ids) for c in completions]


# ---- which tokens


def test_unequal_prompts_get_the_tokens_of_full_passes(generator, wanted):
    found = generator.generate(PROMPTS, FREE)
    assert ids(found) == wanted
    assert {c.finish for c in found} == {"length"}
    assert [c.text for c in found] == [generator.tokenizer.decode(row) for row in wanted]


def test_alone_in_another_order_and_in_another_company(generator, wanted):
    for i in (0, 2):
        assert ids(generator.generate([PROMPTS[i]], FREE)) == [wanted[i]]
    assert ids(generator.generate(PROMPTS[::-1], FREE)) == wanted[::-1]


@pytest.mark.parametrize("by_layer", [False, True])
def test_scanned_and_unrolled_layers_say_the_same(params, wanted, by_layer):
    other = LanguageGenerator(CONFIG.make(), params, by_layer=by_layer)
    assert other._answers.engine.steps.by_layer == by_layer
    assert ids(other.generate(PROMPTS, FREE)) == wanted


def test_sharded_over_a_mesh(params, wanted, devices):
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices[:4])
    boxed = jax.eval_shape(lambda: CONFIG.make().init(jax.random.key(0), jnp.ones((1, 4), jnp.int32)))["params"]
    placed = jax.device_put(params, param_shardings(boxed, mesh))
    other = LanguageGenerator(CONFIG.make(), placed, mesh=mesh, batch_size=4)
    assert ids(other.generate(PROMPTS[:4], FREE)) == wanted[:4]
    batch = other._batch(PROMPTS[:4])
    rows = other._answers.engine.rows(np.full(4, NEW), np.arange(4), (), Sampling())
    state = other._answers.engine.start(batch, rows, 32, Sampling()).state
    spread = {leaf.sharding.spec for leaf in jax.tree.leaves(state) if leaf.ndim == 4}
    assert spread and all(spec[0] == "data" and spec[2] == "tensor" for spec in spread), spread


def test_logprobs_are_the_models_own(generator, reference):
    sampling = Sampling(repetition_penalty=1.5)
    found = generator.generate(PROMPTS, dataclasses.replace(FREE, logprobs=True), sampling)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        tokens, logprobs = reference(prompt, sampling)
        assert list(completion.ids) == tokens
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-3)


def test_a_penalty_counts_prompt_and_answer(generator, reference, wanted):
    sampling = Sampling(repetition_penalty=50.0)
    found = ids(generator.generate(PROMPTS, FREE, sampling))
    assert found == [reference(prompt, sampling)[0] for prompt in PROMPTS] != wanted


def test_samples_hang_on_seed_and_place_in_the_list(generator):
    def draw(prompts, seed=1):
        return ids(generator.generate(prompts, FREE, Sampling(temperature=1.5, seed=seed)))

    first = draw(PROMPTS)
    assert draw(PROMPTS) == first != draw(PROMPTS, seed=2)
    assert draw(PROMPTS[:1]) == first[:1] and draw(PROMPTS[:3]) == first[:3]
    # The same neighbours in other rows: a longer last prompt is sorted elsewhere.
    assert draw([*PROMPTS[:2], PROMPTS[2] + [1, 2]])[:2] == first[:2]
    same = draw([PROMPTS[0]] * 4)
    assert same[0] == first[0] and len(set(map(tuple, same))) == 4


# ---- where it ends


def test_stop_tokens(generator, wanted):
    stops = (wanted[0][3], wanted[3][0])
    found = generator.generate(PROMPTS, dataclasses.replace(FREE, stop_tokens=stops, logprobs=True))
    for completion, whole in zip(found, wanted, strict=True):
        ends = [i for i, token in enumerate(whole) if token in stops]
        assert list(completion.ids) == (whole[: ends[0]] if ends else whole)
        assert completion.finish == ("stop" if ends else "length")
        assert len(completion.logprobs) == len(completion.ids)
    assert found[3].ids == () and found[3].text == "" and any(c.finish == "length" for c in found)


def test_the_end_tokens_of_config_and_tokenizer_end_an_answer(params, generator, wanted):
    config = dataclasses.replace(CONFIG, eos_token_id=(wanted[0][2],))
    other = LanguageGenerator(config.make(), params, generator.tokenizer)
    found = other.generate(PROMPTS[:1], Options(NEW))[0]
    assert (list(found.ids), found.finish) == (wanted[0][:2], "stop")
    tokenizer = byte_tokenizer()
    tokenizer.stop_ids = (wanted[0][1],)
    found = LanguageGenerator(CONFIG.make(), params, tokenizer).generate(PROMPTS[:1], Options(NEW))[0]
    assert (list(found.ids), found.finish) == (wanted[0][:1], "stop")
    assert ids(other.generate(PROMPTS[:1], FREE)) == wanted[:1]


def test_stop_strings_cut_the_text_before_them(generator, wanted):
    decode = generator.tokenizer.decode
    stop = decode(wanted[2])[4:6]
    found = generator.generate(PROMPTS, dataclasses.replace(FREE, stop_strings=(stop, "never said")))
    for completion, whole in zip(found, wanted, strict=True):
        text = decode(whole)
        assert completion.text == text.split(stop)[0]
        assert completion.finish == ("stop" if stop in text else "length")
        n = next((n for n in range(len(whole)) if stop in decode(whole[:n])), NEW)
        assert list(completion.ids) == whole[:n]
    assert found[2].finish == "stop" and any(c.finish == "length" for c in found)


def test_streamed_pieces_are_the_answer(generator, wanted):
    for prompt, whole in zip(PROMPTS[:3], wanted[:3], strict=True):
        stream, pieces = generator.stream(prompt, FREE), []
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as end:
                completion = end.value
                break
        assert list(completion.ids) == whole and completion == generator.generate([prompt], FREE)[0]
        assert "".join(pieces) == completion.text and len(pieces) > 1


# ---- limits and refusals


def test_an_answer_ends_where_the_model_does(generator, reference):
    long = PROMPTS[2] + PROMPTS[4] + [7] * 13  # 86 of 96
    found = generator.generate([long, PROMPTS[0]], dataclasses.replace(FREE, max_new_tokens=40))
    assert [len(c.ids) for c in found] == [10, 40] and found[0].finish == "length"
    assert list(found[1].ids)[:NEW] == reference(PROMPTS[0])[0]
    assert len(generator.generate([[1] * 95], FREE)[0].ids) == 1


@pytest.mark.parametrize(
    "prompts,message",
    [
        ([[1, 2], [1] * 96], "96 tokens"),
        ([[1, 2], []], "empty prompt"),
        ([""], "empty prompt"),
        ([[1, 260]], "260"),
        ([[-1]], "-1"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_before_anything_runs(generator, prompts, message, monkeypatch):
    def run(*_):
        raise AssertionError("something ran")

    monkeypatch.setattr(generator._answers, "complete", run)
    monkeypatch.setattr(generator, "_batch", run)
    with pytest.raises(DataError, match=message):
        generator.generate(prompts)


def test_a_given_max_length_replaces_the_configs(params):
    other = LanguageGenerator(CONFIG.make(), params, max_length=20)
    assert len(other.generate([[1] * 15], FREE)[0].ids) == 5
    with pytest.raises(DataError, match="20 tokens(.|\n)*at most 19"):
        other.generate([[1] * 20])
    assert len(LanguageGenerator(CONFIG.make(), params, max_length=128).generate([[1] * 100], FREE)[0].ids) == NEW


@pytest.mark.parametrize(
    "options",
    [
        dict(max_new_tokens=0),
        dict(num_beams=0),
        dict(stop_strings=("",)),
        dict(num_beams=2, stop_strings=("a",)),
        dict(num_beams=2, logprobs=True),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError):
        Options(**options)


def test_options_that_exclude_one_another_are_refused(generator, params):
    with pytest.raises(ConfigError, match="beam search, or sampling"):
        generator.generate(PROMPTS, Options(num_beams=2), Sampling(temperature=1.0))
    with pytest.raises(ConfigError, match="a stream"):
        next(generator.stream(PROMPTS[0], Options(num_beams=2)))
    bare = LanguageGenerator(CONFIG.make(), params)
    with pytest.raises(ConfigError, match="stop_strings"):
        bare.generate(PROMPTS, Options(stop_strings=("a",)))
    with pytest.raises(DataError, match="without a tokenizer"):
        bare.generate(["text"])


# ---- what is compiled


def test_buckets_waste_little_and_are_few():
    sizes = [bucket(n) for n in range(1, 4097)]
    assert all(0 <= size - n < max(BUCKET, n / 4) for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes) and len(set(sizes)) < 30


def test_one_compilation_a_bucket(params):
    """Lengths, limits, seeds, temperatures of zero, stops and company change nothing; a new bucket does."""
    other = LanguageGenerator(CONFIG.make(), params, batch_size=2)
    engine = other._answers.engine

    def compiled():
        return engine._start._cache_size(), engine._advance._cache_size()

    other.generate([[1] * 3, [2] * 9], Options(5))
    assert compiled() == (1, 1)
    other.generate([[1] * BUCKET, [4]], Options(17, stop_tokens=(1, 2, 3)), Sampling(seed=3))
    other.generate([[9] * 20, [4] * 2], Options(BUCKET, ignore_eos=True))
    assert compiled() == (1, 1)
    list(other.stream([5] * 8, Options(8)))  # one row instead of two
    assert compiled() == (2, 2)
    other.generate([[1] * 3, [2] * (BUCKET + 1)], Options(5))
    assert compiled() == (3, 3)


def test_the_loop_writes_its_cache_in_place(generator):
    """No stack of the layers' caches is made in the compiled loop, and the state's buffers are given over."""
    engine = generator._answers.engine
    batch = generator._batch(PROMPTS[:2])
    rows = engine.rows(np.full(2, NEW), np.arange(2), (), Sampling())
    progress = engine.start(batch, rows, 32, Sampling())
    kept = jax.tree.leaves(progress.state)
    args = engine.params, progress.state, progress.replace(state=None), rows, np.int32(4)
    compiled = engine._advance.lower(*args, sampling=Sampling()).compile()
    state_bytes = sum(leaf.nbytes for leaf in kept)
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes
    stacked = {f"f32[2,{','.join(map(str, leaf.shape))}]" for leaf in kept if leaf.ndim == 4}
    assert stacked and not any(shape in compiled.as_text() for shape in stacked)
    engine.advance(progress, rows, 4, Sampling())
    assert all(leaf.is_deleted() for leaf in kept if leaf.ndim == 4)


# ---- other models


def test_an_encoder_decoder_is_asked_in_the_same_way():
    config = T5Config(260, 16, 4, 24, num_layers=3, num_decoder_layers=2, num_heads=4, eos_token_id=None)
    module = config.make()
    tokens = jnp.ones((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, None, None, tokens))["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32)), nn.meta.unbox(shapes))
    generator = LanguageGenerator(module, params, batch_size=4)
    found = ids(generator.generate(PROMPTS[:3], FREE))
    assert len(set(map(tuple, found))) == 3
    apply = jax.jit(module.apply)
    for prompt, answer in zip(PROMPTS[:3], found, strict=True):
        target = jnp.array([[config.decoder_start_token_id, *answer[:-1]]])
        logits = apply({"params": params}, jnp.array([prompt]), None, None, target)
        assert logits[0].argmax(-1).tolist() == answer
    short = LanguageGenerator(module, params, max_length=8)
    assert len(short.generate([[1] * 8], FREE)[0].ids) == 8, "source and answer have a row each"
    with pytest.raises(DataError, match="at most 8"):
        short.generate([[1] * 9])


def test_a_folder_is_loaded_with_its_tokenizer(tmp_path, wanted):
    generator = LanguageGenerator.load(write_folder(tmp_path / "model"), dtype="float32")
    assert ids(generator.generate(PROMPTS[:1], FREE)) == wanted[:1]
    text = [{"role": "user", "content": "hi"}]
    assert generator.encode(text) == [257, *generator.tokenizer.encode("hi"), 258]
    assert generator.generate([text, "hi"], FREE)[0].text
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer"):
        LanguageGenerator.load(tmp_path / "model")
