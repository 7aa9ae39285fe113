"""The assistant of a language model: the tokens of full passes for any batch, bucket and options."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_language import CONFIG, answers, byte_tokenizer, language, random_params, started, write_folder

from mllm_jax.data.message import Message, Text
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.options import Options, read_options
from mllm_jax.generation.program import BUCKET, bucket
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
def assistant(params):
    return language(CONFIG.make(), params, byte_tokenizer())


@pytest.fixture(scope="module")
def reference(params):
    """Returns tokens and log probabilities by full passes over one padded row, without a cache."""

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


def tokens(found) -> list[list[int]]:
    return [list(answer.tokens) for answer in found]


# ---- which tokens


def test_unequal_prompts_get_the_tokens_of_full_passes(assistant, wanted):
    found = answers(assistant, PROMPTS, FREE)
    assert tokens(found) == wanted
    assert {c.reason for c in found} == {"length"}
    assert [c.text for c in found] == [assistant.processor.tokenizer.decode(row) for row in wanted]


def test_alone_in_another_order_and_in_another_batch(assistant, wanted):
    for i in (0, 2):
        assert tokens(answers(assistant, [PROMPTS[i]], FREE)) == [wanted[i]]
    assert tokens(answers(assistant, PROMPTS[::-1], FREE)) == wanted[::-1]


@pytest.mark.parametrize("by_layer", [False, True])
def test_scanned_and_unrolled_layers_say_the_same(params, wanted, by_layer):
    other = language(CONFIG.make(), params, by_layer=by_layer)
    assert other.program.steps.by_layer == by_layer
    assert tokens(answers(other, PROMPTS, FREE)) == wanted


def test_sharded_over_a_mesh(params, wanted, devices):
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices[:4])
    boxed = jax.eval_shape(lambda: CONFIG.make().init(jax.random.key(0), jnp.ones((1, 4), jnp.int32)))["params"]
    placed = jax.device_put(params, param_shardings(boxed, mesh))
    other = language(CONFIG.make(), placed, mesh=mesh)
    assert tokens(answers(other, PROMPTS[:4], FREE)) == wanted[:4]
    state, _ = started(other, PROMPTS[:4])
    spread = {leaf.sharding.spec for leaf in jax.tree.leaves(state) if leaf.ndim == 4}
    assert spread and all(spec[0] == "data" and spec[2] == "tensor" for spec in spread), spread


def test_logprobs_are_the_models_own(assistant, reference):
    sampling = Sampling(repetition_penalty=1.5)
    found = answers(assistant, PROMPTS, dataclasses.replace(FREE, logprobs=True), sampling)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        whole, logprobs = reference(prompt, sampling)
        assert list(answer.tokens) == whole
        np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-3)


def test_a_penalty_counts_prompt_and_answer(assistant, reference, wanted):
    sampling = Sampling(repetition_penalty=50.0)
    found = tokens(answers(assistant, PROMPTS, FREE, sampling))
    assert found == [reference(prompt, sampling)[0] for prompt in PROMPTS] != wanted


def test_samples_depend_on_seed_and_position_in_the_list_only(assistant):
    def draw(prompts, seed=1):
        return tokens(answers(assistant, prompts, FREE, Sampling(temperature=1.5, seed=seed)))

    first = draw(PROMPTS)
    assert draw(PROMPTS) == first != draw(PROMPTS, seed=2)
    assert draw(PROMPTS[:1]) == first[:1] and draw(PROMPTS[:3]) == first[:3]
    # The same neighbours in other rows: a longer last prompt is sorted elsewhere.
    assert draw([*PROMPTS[:2], PROMPTS[2] + [1, 2]])[:2] == first[:2]
    same = draw([PROMPTS[0]] * 4)
    assert same[0] == first[0] and len(set(map(tuple, same))) == 4


# ---- where it ends


def test_stop_tokens(assistant, wanted):
    stops = (wanted[0][3], wanted[3][0])
    found = answers(assistant, PROMPTS, dataclasses.replace(FREE, stop_tokens=stops, logprobs=True))
    for answer, whole in zip(found, wanted, strict=True):
        ends = [i for i, token in enumerate(whole) if token in stops]
        assert list(answer.tokens) == (whole[: ends[0]] if ends else whole)
        assert answer.reason == ("stop" if ends else "length")
        assert len(answer.logprobs) == len(answer.tokens)
    assert found[3].tokens == () and found[3].text == "" and any(c.reason == "length" for c in found)


def test_the_end_tokens_of_config_and_tokenizer_end_an_answer(params, assistant, wanted):
    config = dataclasses.replace(CONFIG, eos_token_id=(wanted[0][2],))
    other = language(config.make(), params, assistant.processor.tokenizer)
    found = answers(other, PROMPTS[:1], Options(NEW))[0]
    assert (list(found.tokens), found.reason) == (wanted[0][:2], "stop")
    tokenizer = byte_tokenizer()
    tokenizer.stop_ids = (wanted[0][1],)
    found = answers(language(CONFIG.make(), params, tokenizer), PROMPTS[:1], Options(NEW))[0]
    assert (list(found.tokens), found.reason) == (wanted[0][:1], "stop")
    assert tokens(answers(other, PROMPTS[:1], FREE)) == wanted[:1]


def test_stop_strings_cut_the_text_before_them(assistant, wanted):
    decode = assistant.processor.tokenizer.decode
    stop = decode(wanted[2])[4:6]
    found = answers(assistant, PROMPTS, dataclasses.replace(FREE, stop_strings=(stop, "never said")))
    for answer, whole in zip(found, wanted, strict=True):
        text = decode(whole)
        assert answer.text == text.split(stop)[0]
        assert answer.reason == ("stop" if stop in text else "length")
        n = next((n for n in range(len(whole)) if stop in decode(whole[:n])), NEW)
        assert list(answer.tokens) == whole[:n]
    assert found[2].reason == "stop" and any(c.reason == "length" for c in found)


def test_streamed_pieces_are_the_answer(assistant, reference):
    for question in ("hi", "why is this so long a question?"):
        stream, pieces = assistant.stream(question, max_new_tokens=NEW, ignore_eos=True), []
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as end:
                answer = end.value
                break
        ids = assistant.processor.tokenizer.encode_chat([{"role": "user", "content": question}])
        assert list(answer.tokens) == reference(ids)[0]
        assert answer == assistant.generate(question, max_new_tokens=NEW, ignore_eos=True)
        assert "".join(pieces) == answer.text and len(pieces) > 1


# ---- limits and refusals


def test_an_answer_ends_where_the_model_does(assistant, reference):
    long = PROMPTS[2] + PROMPTS[4] + [7] * 13  # 86 of 96
    found = answers(assistant, [long, PROMPTS[0]], dataclasses.replace(FREE, max_new_tokens=40))
    assert [len(c.tokens) for c in found] == [10, 40] and found[0].reason == "length"
    assert list(found[1].tokens)[:NEW] == reference(PROMPTS[0])[0]
    assert len(answers(assistant, [[1] * 95], FREE)[0].tokens) == 1


@pytest.mark.parametrize(
    "prompts,message",
    [
        ([[1, 2], [1] * 96], "96 tokens"),
        ([[1, 2], []], "empty prompt"),
        ([[1, 260]], "260"),
        ([[-1]], "-1"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_before_anything_runs(assistant, prompts, message, monkeypatch):
    def run(*_):
        raise AssertionError("something ran")

    monkeypatch.setattr(assistant, "_batch", run)
    with pytest.raises(DataError, match=message):
        answers(assistant, prompts)


def test_conversations_that_cannot_be_answered_are_refused_before_anything_runs(assistant, params, monkeypatch):
    def run(*_):
        raise AssertionError("something ran")

    bare = language(CONFIG.make(), params, byte_tokenizer(template=None))
    for each in (assistant, bare):
        monkeypatch.setattr(each, "_batch", run)
    with pytest.raises(DataError, match="empty prompt"):
        bare.generate(["hi", ""])
    with pytest.raises(DataError, match="without a chat template"):
        bare.generate([Message("user", "hi"), Message("assistant", "ho"), Message("user", "hm")])
    with pytest.raises(DataError, match="roles must alternate"):
        assistant.generate(["hi", [Message("user", "hi"), Message("user", "hm")]])
    with pytest.raises(DataError, match="a conversation given as int"):
        assistant.generate(["hi", 3])
    for ask in (assistant.generate, assistant.stream):
        with pytest.raises(DataError, match="103 tokens"):
            ask("x" * 101)
    with pytest.raises(DataError, match="a stream of 2 conversations"):
        assistant.stream(["hi", "ho"])
    with pytest.raises(ConfigError, match="batch_size 0"):
        assistant.generate(["hi", "ho"], batch_size=0)


def test_a_given_max_length_replaces_the_configs(params):
    other = language(CONFIG.make(), params, max_length=20)
    assert len(answers(other, [[1] * 15], FREE)[0].tokens) == 5
    with pytest.raises(DataError, match="20 tokens(.|\n)*at most 19"):
        answers(other, [[1] * 20])
    assert len(answers(language(CONFIG.make(), params, max_length=128), [[1] * 100], FREE)[0].tokens) == NEW


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


def test_options_that_exclude_one_another_are_refused(assistant):
    with pytest.raises(ConfigError, match="beam search, or sampling"):
        answers(assistant, PROMPTS, Options(num_beams=2), Sampling(temperature=1.0))
    with pytest.raises(ConfigError, match="a stream"):
        assistant.stream("hi", num_beams=2)
    with pytest.raises(ConfigError, match="generation with stop_string, tempera(.|\n)*max_new_tokens"):
        assistant.generate("hi", stop_string="a", tempera=1.0)


def test_options_by_name():
    options, sampling = read_options(dict(stop="a", stop_tokens=3, top_k=2, max_new_tokens=4))
    assert (options, sampling) == (Options(4, (3,), ("a",)), Sampling(top_k=2))
    assert read_options(dict(stop=["a", "b"], stop_tokens=[1, 2]))[0] == Options(
        stop_tokens=(1, 2), stop_strings=("a", "b")
    )


# ---- what is compiled


def test_buckets_waste_little_and_are_few():
    sizes = [bucket(n) for n in range(1, 4097)]
    assert all(0 <= size - n < max(BUCKET, n / 2) for n, size in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert sizes == sorted(sizes) and bucket(100, 120) == 120
    assert [bucket(n, least=1) for n in (0, 1, 2, 3, 4, 5, 7, 13)] == [1, 1, 2, 3, 4, 6, 8, 16]


def test_one_compilation_a_bucket(params):
    """Checks that lengths, limits, seeds, temperatures of zero, stops and other rows compile nothing; a bucket does."""
    other = language(CONFIG.make(), params, byte_tokenizer())
    program = other.program

    def compiled():
        return program.start._cache_size(), program.advance._cache_size()

    answers(other, [[1] * 3, [2] * 9], Options(5), batch_size=2)
    assert compiled() == (1, 1)
    answers(other, [[1] * BUCKET, [4]], Options(17, stop_tokens=(1, 2, 3)), Sampling(seed=3), batch_size=2)
    answers(other, [[9] * 20, [4] * 2], Options(BUCKET, ignore_eos=True), batch_size=2)
    assert compiled() == (1, 1)
    list(other.stream("why", max_new_tokens=8))  # one row instead of two
    assert compiled() == (2, 2)
    answers(other, [[1] * 3, [2] * (BUCKET + 1)], Options(5), batch_size=2)
    assert compiled() == (3, 3)


def test_the_loop_writes_its_cache_in_place(assistant):
    """Checks that the compiled loop makes no stack of the layers' caches, and that the state's buffers are donated."""
    program = assistant.program
    state, rows = started(assistant, PROMPTS[:2])
    kept = jax.tree.leaves(state)
    args = program.params, state, rows, np.int32(4), np.int32(0)
    compiled = program.advance.lower(*args, sampling=Sampling()).compile()
    state_bytes = sum(leaf.nbytes for leaf in kept)
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes
    stacked = {f"f32[2,{','.join(map(str, leaf.shape))}]" for leaf in kept if leaf.ndim == 4}
    assert stacked and not any(shape in compiled.as_text() for shape in stacked)
    program.advance(*args, sampling=Sampling())
    assert all(leaf.is_deleted() for leaf in kept if leaf.ndim == 4)


# ---- other models


def test_an_encoder_decoder_is_asked_in_the_same_way():
    config = T5Config(260, 16, 4, 24, num_layers=3, num_decoder_layers=2, num_heads=4, eos_token_id=())
    module = config.make()
    ones = jnp.ones((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), ones, None, None, ones))["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32)), nn.meta.unbox(shapes))
    assistant = language(module, params)
    found = tokens(answers(assistant, PROMPTS[:3], FREE))
    assert len(set(map(tuple, found))) == 3
    apply = jax.jit(module.apply)
    for prompt, answer in zip(PROMPTS[:3], found, strict=True):
        target = jnp.array([[config.decoder_start_token_id, *answer[:-1]]])
        logits = apply({"params": params}, jnp.array([prompt]), None, None, target)
        assert logits[0].argmax(-1).tolist() == answer
    short = language(module, params, max_length=8)
    assert len(answers(short, [[1] * 8], FREE)[0].tokens) == 8, "source and answer have a row each"
    with pytest.raises(DataError, match="at most 8"):
        answers(short, [[1] * 9])


def test_a_folder_is_loaded_with_its_tokenizer(tmp_path, wanted):
    assistant = Assistant.load(write_folder(tmp_path / "model"), dtype="float32")
    assert tokens(answers(assistant, PROMPTS[:1], FREE)) == wanted[:1]
    prompt = assistant.prompt((Message("user", "hi"),))
    assert prompt.tokens.tolist() == [257, *assistant.processor.tokenizer.encode("hi"), 258]
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer"):
        Assistant.load(tmp_path / "model")


# ---- forms of a conversation


def test_a_conversation_in_every_form_gets_one_answer_and_a_list_gets_a_list(assistant, reference):
    ask = partial(assistant.generate, max_new_tokens=NEW, ignore_eos=True)
    [dict_form] = [[{"role": "user", "content": "hi"}]]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    forms = ("hi", Message("user", "hi"), [Message("user", "hi")], dict_form, parts, Message("user", (Text("hi"),)))
    whole = reference(assistant.processor.tokenizer.encode_chat(dict_form))[0]
    for form in forms:
        answer = ask(form)
        assert list(answer.tokens) == whole and answer.text == assistant.processor.tokenizer.decode(whole), form
    said = [Message("system", "be brief"), *dict_form, Message("assistant", "ho"), Message("user", "and?")]
    found = ask([said, *forms[:1], forms[2]])
    assert isinstance(found, list) and [list(a.tokens) for a in found[1:]] == [whole] * 2
    shown = [{"role": m.role, "content": m.content} if isinstance(m, Message) else m for m in said]
    assert list(found[0].tokens) == reference(assistant.processor.tokenizer.encode_chat(shown))[0] != whole
    assert ask(["hi"]) == [ask("hi")] and ask([]) == []


def test_a_text_is_continued_without_a_chat_template(params, assistant, reference):
    bare = language(CONFIG.make(), params, byte_tokenizer(template=None))
    ids = bare.processor.tokenizer.encode("hi")
    whole = reference(ids)[0]
    assert list(bare.generate("hi", max_new_tokens=NEW, ignore_eos=True).tokens) == whole
    found = assistant.generate(Message("text", "hi"), max_new_tokens=NEW, ignore_eos=True)
    assert list(found.tokens) == whole, "a message of role text is none of a conversation"
