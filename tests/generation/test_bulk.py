"""Conversations of an iterator: the answers of a list, in order, in bounded memory, with few programs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_assistant_media import CONFIG as WITH_IMAGES
from test_assistant_media import PROMPTS, IdTokenizer, asked, make_image, random_params_of
from tiny_language import CONFIG, byte_tokenizer, language, random_params
from toy_data import processor as processor_of

from mllm_jax.data.message import Message
from mllm_jax.data.processing import composed
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation import bulk
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.bulk import outcomes
from mllm_jax.generation.generate import complete
from mllm_jax.generation.options import Answer, Options
from mllm_jax.generation.rows import padded_slots

HOW = dict(max_new_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def assistant():
    config = replace(CONFIG, max_position_embeddings=512)
    return language(config.make(), random_params(config), byte_tokenizer())


@pytest.fixture(scope="module")
def seeing():
    tokenizer = IdTokenizer(Tokenizer.train(["what is this? a red apple"] * 3, 280).backend)
    return Assistant(WITH_IMAGES.make(), random_params_of(WITH_IMAGES), processor_of(WITH_IMAGES, tokenizer))


def words(count: int, longest: int = 110) -> list[str]:
    """Returns texts of unequal lengths that the tokenizer of bytes encodes."""
    rng = np.random.default_rng(count)
    return ["".join(rng.choice(list("abcdefgh"), int(n))) for n in rng.integers(1, longest, count)]


class Read:
    """An iterator that counts the items taken from it."""

    def __init__(self, conversations):
        self.taken, self._rest = 0, iter(conversations)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        found = next(self._rest)
        self.taken += 1
        return found


def test_an_iterator_gives_the_answers_of_a_list_and_of_each_alone(seeing):
    prompts = [*PROMPTS, *PROMPTS[::-1]]
    listed = seeing.generate(prompts, batch_size=2, **HOW)
    found = seeing.generate(iter(prompts), batch_size=2, **HOW)
    assert isinstance(listed, list) and isinstance(found, Iterator)
    found = [answer.tokens for answer in found]
    assert found == [answer.tokens for answer in listed] and len(set(found)) > 6
    for i in (1, 3, 7):  # an image and a longer text, an image, a text alone
        assert seeing.generate(prompts[i], **HOW).tokens == found[i]


def test_sampled_answers_are_drawn_by_the_position(assistant):
    texts, how = words(40, 20), HOW | dict(temperature=1.0, seed=4)
    listed = assistant.generate(texts, batch_size=2, **how)
    assert list(assistant.generate(iter(texts), batch_size=2, **how)) == listed
    numbered = outcomes(assistant, [(7, texts[7])], Options(5, ignore_eos=True), _sampling(how), batch_size=2)
    assert list(numbered) == [(7, listed[7])]


def _sampling(how):
    from mllm_jax.generation.sampling import Sampling

    return Sampling(temperature=how["temperature"], seed=how["seed"])


def test_many_are_read_a_little_ahead_in_order_with_few_programs(assistant):
    """Checks unequal prompts, and answers that end after any number of tokens."""
    texts, source, rows = words(1500, 60), Read(words(1500, 60)), 8
    how = dict(max_new_tokens=12, temperature=1.0, stop_tokens=range(64))
    program = assistant.program
    before = [f._cache_size() for f in (program.start, program.refill, program.advance)]
    found, ahead = [], 0
    for answer in assistant.generate(source, batch_size=rows, **how):
        found.append(answer)
        ahead = max(ahead, source.taken - len(found))
    assert len(found) == len(texts) and len({len(answer.tokens) for answer in found}) == 13
    assert 0 < ahead <= (2 * bulk.AHEAD + 1) * rows  # conversations and answers
    after = [f._cache_size() for f in (program.start, program.refill, program.advance)]
    assert sum(after) - sum(before) <= 6 < len(set(map(len, texts)))
    listed = assistant.generate(texts[:40], batch_size=rows, **how)
    assert found[:40] == listed and len(set(answer.text for answer in listed)) > 20


def test_images_are_dropped_once_they_are_read(seeing, monkeypatch):
    alive: set[int] = set()
    most = 0

    def conversations() -> Iterator[tuple[Message, ...]]:
        nonlocal most
        for number in range(300):
            image = make_image(number % 7, 20, 20)
            alive.add(number)
            weakref.finalize(image, alive.discard, number)
            most = max(most, len(alive))
            yield asked("red" if number % 3 else "what is this?", image)
            del image

    prepared = _count_prepared(monkeypatch)
    found = list(seeing.generate(conversations(), batch_size=2, **HOW))
    assert len(found) == 300 and found[0].tokens == found[21].tokens != found[1].tokens
    assert most <= (bulk.AHEAD + 1) * 2 + 1, "images of conversations that were answered are held"
    assert max(prepared) <= (bulk.AHEAD + 1) * 2 + 1, "prepared media are held after they were read"


def _count_prepared(monkeypatch) -> list[int]:
    """Returns a list that gets the number of live prepared images each time that one is made."""
    fitted, alive, seen = composed.fitted, set(), []

    def counted(image, side):
        made, number = fitted(image, side), len(seen)
        alive.add(number)
        weakref.finalize(made, alive.discard, number)
        seen.append(len(alive))
        return made

    monkeypatch.setattr(composed, "fitted", counted)
    return seen


def test_a_window_ends_where_its_media_are_large(seeing, monkeypatch):
    monkeypatch.setattr(bulk, "MEDIA_BYTES", 3 * 8 * 8 * 3 - 1)  # of three images
    source = Read(asked("red", make_image(n)) for n in range(40))
    next(seeing.generate(source, batch_size=2, **HOW))
    assert source.taken <= 3 + 2 + 3


def test_a_bad_conversation_fails_alone_and_in_its_place(assistant):
    unread, alike = DataError("line 5", "json", "correct it"), [Message("user", "b"), Message("user", "c")]
    given = ["a", Message("text", ""), alike, 3, unread, "d" * 600, "e"]
    found = list(outcomes(assistant, enumerate(given), Options(4, ignore_eos=True), batch_size=2))
    assert [number for number, _ in found] == list(range(7))
    assert [isinstance(outcome, Answer) for _, outcome in found] == [True, *[False] * 5, True]
    reasons = ("an empty prompt", "alternate", "int 3", "line 5", "a prompt of 6")
    for (_, outcome), reason in zip(found[1:6], reasons, strict=True):
        with pytest.raises(DataError, match=reason):
            raise outcome
    stream = assistant.generate(iter(given), batch_size=2, **HOW)
    assert next(stream).tokens == assistant.generate("a", **HOW).tokens
    with pytest.raises(DataError):
        next(stream)


def test_answers_wait_for_an_early_long_one_and_reading_stops(assistant, monkeypatch):
    monkeypatch.setattr(bulk, "HELD", 4)
    source = Read(["abc"] * 500)
    engine = assistant.engine(2)
    never = engine.submit  # the first request never ends: it is never submitted

    def submit(request):
        return -1 if request.index == 0 else never(request)

    engine.submit = submit
    monkeypatch.setattr(assistant, "engine", lambda rows: engine, raising=False)
    answers = bulk._Bulk(assistant, enumerate(source), Options(1), _sampling(dict(temperature=0, seed=0)), 2)
    steps, step = 0, engine.step

    def counted():
        nonlocal steps
        steps += 1
        if steps > 200:
            raise TimeoutError
        return step()

    engine.step = counted
    with pytest.raises(TimeoutError):
        next(answers.run())
    assert source.taken <= 2 * (4 + bulk.AHEAD)


def test_numbers_of_media_share_programs():
    tiles, patches = (SimpleNamespace(packed=p, encoder=SimpleNamespace(merge_unit=4)) for p in (False, True))
    config = SimpleNamespace(branch=dict(image=tiles, video=patches).__getitem__)
    for count, wanted in ((1, 1), (2, 2), (3, 3), (5, 6), (7, 8), (13, 16)):
        assert padded_slots({"image": count}, config) == {"image": wanted}
        assert padded_slots({"video": 4 * count, "image": 1}, config) == {"image": 1, "video": 4 * wanted}
    assert padded_slots({}, config) == {}


def test_padded_slots_do_not_change_an_answer(seeing):
    """Checks five images in a row for six against a batch for five."""
    prompt = asked("red", *(make_image(n) for n in range(5)))
    batch = seeing.processor([prompt])
    [wanted] = complete(seeing.model, seeing.params, batch, seeing.processor, **HOW)
    assert batch["images"].shape[1] == 5
    assert seeing._batch([seeing.prompt(prompt)], 1, 64)["images"].shape[1] == 6
    assert seeing.generate(prompt, **HOW).tokens == wanted.tokens


def test_rows_that_are_too_long_are_replaced(assistant):
    """Checks that short conversations get short rows again after a window with a long one."""
    long, short = "a" * 300, ["abc"] * 100
    rows = []
    engine, real = assistant.engine(2), assistant.program
    begin = engine._begin

    def begun():
        begin()
        rows.append(engine._length)

    engine._begin = begun
    assistant.__dict__["engine"] = lambda _: engine
    try:
        assert len(list(assistant.generate(iter([long, *short]), batch_size=2, **HOW))) == 101
    finally:
        del assistant.__dict__["engine"]
    assert assistant.program is real and max(rows) >= 304 and rows[-1] == 32


def test_what_cannot_be_asked_at_all_is_refused_at_once(assistant):
    never = (fail for fail in [1 / 1])
    with pytest.raises(ConfigError, match="batch_size 0"):
        assistant.generate(never, batch_size=0)
    with pytest.raises(ConfigError, match="beam search, or sampling"):
        assistant.generate(never, num_beams=2, temperature=1.0)
    with pytest.raises(ConfigError, match="tempera"):
        assistant.generate(never, tempera=1.0)
    assert next(never) == 1, "the iterator was read"
