"""Batches depend only on (seed, step): not on history, order or the number of hosts; bad records are reported."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from tiny_runs import ROOT
from toy_data import IMAGES, MODEL, PAIRS, SIZE, Toy, ToySource, pipeline, processor, tokenizer

from mllm_jax.data.message import Example, Message, Text
from mllm_jax.data.pipeline import Mixture, Pipeline, Weighted, training_texts
from mllm_jax.data.processing.composed import ComposedLayout, ImageTokens
from mllm_jax.data.source_encoder import SourceEncoder
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.datasets.openmoji import OpenMojiQuestions
from mllm_jax.datasets.openmoji.records import load
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.processor import Processor
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config_file import load_config
from mllm_jax.training.step import local_rows, place_batch

TEXT = Weighted(Toy("toy_text", images=0))


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def differ(a: dict, b: dict) -> bool:
    return any((a[name] != b[name]).any() for name in a)


@pytest.mark.parametrize("mixture", [IMAGES, PAIRS], ids=["conversation", "caption"])
def test_a_batch_needs_no_history_and_no_order(mixture):
    forwards = {step: pipeline(mixture).batch(step) for step in (0, 1, 2, 17, 40, 1000)}
    data = pipeline(mixture)
    for step in (1000, 2, 40, 0, 17, 1, 2):
        assert_equal(data.batch(step), forwards[step])
    assert all(differ(forwards[a], forwards[b]) for a in forwards for b in forwards if a < b)
    assert differ(pipeline(mixture, seed=1).batch(0), forwards[0])


@pytest.mark.parametrize("mixture", [IMAGES, PAIRS], ids=["conversation", "caption"])
def test_some_rows_are_those_of_the_whole(mixture):
    data = pipeline(mixture)
    whole = data.batch(5)
    for rows in ([3], [6, 1, 4], range(2, 7)):
        assert_equal(data.batch(5, rows), {name: x[list(rows)] for name, x in whole.items()})


def test_iterating_gives_the_batches_in_order():
    data = pipeline()
    found = list(data.iterate(3, 21))
    assert len(found) == 18
    for step, batch in enumerate(found, start=3):
        assert_equal(batch, data.batch(step))
    for batch, step in zip(data.iterate(7, 9, rows=[2, 5]), (7, 8), strict=True):
        assert_equal(batch, data.batch(step, [2, 5]))


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_any_number_of_hosts_sees_the_same_global_batch(hosts, devices):
    """Gives each host its own pipeline and the rows of its devices; together they are a single host's batch."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    whole, spec = pipeline().batch(9), pipeline().spec
    places = jax.device_put(
        np.arange(8), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    )
    rows_of = {shard.device: int(shard.data[0]) for shard in places.addressable_shards}
    of_host = np.array(devices).reshape(hosts, -1)
    parts = [sorted(rows_of[device] for device in host) for host in of_host]
    assert sorted(sum(parts, [])) == local_rows(mesh, 8) == list(range(8))
    batches = [pipeline().batch(9, rows) for rows in parts]
    assert_equal({name: np.concatenate([b[name] for b in batches]) for name in whole}, whole)
    placed = place_batch(whole, mesh, spec, list(range(8)))
    for name, array in placed.items():
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[name][shard.index])


def test_shapes_hold_for_every_batch():
    data = pipeline()
    for step in range(6):
        shapes = {name: (x.shape, x.dtype) for name, x in data.batch(step).items()}
        assert shapes == {name: (spec.shape, np.dtype(spec.dtype)) for name, spec in data.spec.items()}
    assert (data.spec["images"].shape, data.spec["images"].dtype) == ((8, 3, SIZE, SIZE, 3), "uint8")


def test_rows_without_an_image_have_the_same_shape():
    """Checks text among images: slots stay empty and no position refers to them."""
    data = pipeline(replace(IMAGES, sources=(Weighted(Toy(), 0.1), TEXT), length=32, slots={"image": 2}))
    found = [(batch, row) for batch in map(data.batch, range(16)) for row in range(8)]
    textual = [(b, r) for b, r in found if (b["media_index"][r] < 0).all()]
    assert 0 < len(textual) < len(found)
    for batch, row in textual:
        assert not batch["images"][row].any() and batch["segments"][row].any()
    alone = pipeline(Mixture((TEXT,), rows=8, length=32, slots={}))
    assert set(alone.batch(0)) == set(data.batch(0)) - {"images"}


def test_media_index_points_at_the_slots_of_the_example():
    data, tokens = pipeline(), MODEL.media_tokens
    assert tokens == 4
    seen = 0
    for step in range(4):
        batch, plan = data.batch(step), data.plan.step(step)
        np.testing.assert_array_equal(batch["media_index"] >= 0, batch["tokens"] == tokenizer().image_token_id)
        for row, examples in enumerate(plan):
            slot = 0
            for segment, (source, index) in enumerate(examples, start=1):
                places = batch["segments"][row] == segment
                images = [np.asarray(part.source) for part in data.sources[source].example(index).media]
                expected = [(slot + m) * tokens + t for m in range(len(images)) for t in range(tokens)]
                found = batch["media_index"][row, places]
                assert found[found >= 0].tolist() == expected
                np.testing.assert_array_equal(batch["positions"][row, places], np.arange(places.sum()))
                for m, image in enumerate(images):
                    np.testing.assert_array_equal(batch["images"][row, slot + m], image)
                slot, seen = slot + len(images), seen + len(images)
            assert not batch["images"][row, slot:].any()
            loss_weights = [w for s, i in examples for w in data.encode(s, i).loss_weights]
            np.testing.assert_array_equal(batch["loss_weights"][row, : len(loss_weights)], loss_weights)
            padding = batch["segments"][row] == 0
            assert (batch["tokens"][row, padding] == tokenizer().pad_token_id).all()
            assert not batch["loss_weights"][row, padding].any()
    assert seen > 50


def test_the_mixture_chooses_the_tokens_that_carry_loss():
    answers, everything = pipeline().batch(3), pipeline(replace(IMAGES, learn="all")).batch(3)
    for name in answers.keys() - {"loss_weights"}:
        np.testing.assert_array_equal(answers[name], everything[name])
    given = (answers["positions"] == 0) | (answers["media_index"] >= 0)
    np.testing.assert_array_equal(everything["loss_weights"], (answers["segments"] > 0) & ~given)
    assert answers["loss_weights"].sum() < 0.7 * everything["loss_weights"].sum()


def test_neighbours_of_a_source_stay_together_in_a_batch():
    data = pipeline(replace(PAIRS, group=4))
    single = {index: data.encode(0, index).tokens.tolist() for index in range(len(data.sources[0]))}
    for step in range(30):
        found = [row[0][1] for row in data.plan.step(step)]
        assert [found[0] // 4] * 4 + [found[4] // 4] * 4 == [index // 4 for index in found]
        batch = data.batch(step)
        for row, index in enumerate(found):
            assert batch["tokens"][row, batch["segments"][row] > 0].tolist() == single[index]


@pytest.mark.parametrize(
    "change,given",
    [
        ({"learn": "some"}, "learn 'some'"),
        ({"layout": "list"}, "layout 'list'"),
        ({"layout": "caption", "group": 3}, "groups of 3 in 8 rows"),
        ({"layout": "caption", "group": 0}, "groups of 0"),
        ({"layout": "conversation", "group": 2}, "layout 'conversation'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_impossible_mixtures_are_refused(change, given):
    with pytest.raises(ConfigError) as refusal:
        replace(IMAGES, **change)
    assert given in refusal.value.given and refusal.value.expected and refusal.value.todo


def test_the_description_of_a_step_names_its_examples():
    data = pipeline()
    text = data.describe(2)
    rows = text.split("; ")
    assert len(rows) == 8
    for row, (line, examples) in enumerate(zip(rows, data.plan.step(2), strict=True)):
        assert line == f"row {row}: " + ", ".join(f"{data.sources[s].name}[{i}]" for s, i in examples)


@pytest.fixture(scope="module")
def quickstart():
    """Returns the experiment, and a pipeline for each of its packed mixtures."""
    experiment = load_config(ROOT / "configs" / "quickstart.py")
    sources = {repr(w.source): w.source for stage in experiment.stages for w in stage.data.sources}
    texts = training_texts([source.build() for _, source in sorted(sources.items())])
    words = Tokenizer.train(texts, experiment.vocab_size)
    packed = {s.data: s.name for s in experiment.stages if s.data.layout == "conversation"}
    return {name: Pipeline(data, processor(experiment.model, words), seed=0) for data, name in packed.items()}


def test_the_quickstart_fills_its_rows(quickstart, capsys):
    found = {name: data.plan.statistics(64) for name, data in quickstart.items()}
    with capsys.disabled():
        shown = ", ".join(f"{name} {figures['fill']:.2%}" for name, figures in found.items())
        print(f"\nquickstart, text positions filled: {shown}")
    assert len(found) >= 2
    assert min(figures["fill"] for figures in found.values()) >= 0.97, shown
    assert max(figures["left_over"] for figures in found.values()) <= 0.001


# ---- bad records


@dataclass(frozen=True)
class Broken(Toy):
    """A source with unreadable images and empty answers."""

    bad_images: tuple[int, ...] = ()
    empty_answers: tuple[int, ...] = ()

    def build(self) -> ToySource:
        return BrokenSource(self)


class BrokenSource(ToySource):
    def example(self, index: int) -> Example:
        if index in self.config.empty_answers:
            return Example((Message("user", "what colour"), Message("assistant", "  ")))
        return super().example(index)

    def image(self, index: int, number: int = 0) -> np.ndarray:
        if index in self.config.bad_images:
            raise DataError(f"image {index}: truncated", "a whole PNG", "replace it")
        return super().image(index, number)


def broken(share: float, **kwargs) -> Mixture:
    return replace(IMAGES, sources=(Weighted(Broken("broken", **kwargs)), TEXT), max_bad_share=share)


def test_a_corrupt_png_is_named_by_source_and_index(monkeypatch):
    experiment = load_config(ROOT / "configs" / "smoke.py")
    source = OpenMojiQuestions(image_size=16, variants=1)
    mixture = Mixture((Weighted(source),), rows=8, length=128, slots={"image": 2})
    words = Tokenizer.train(training_texts([source.build()], limit=100), 300)
    data = Pipeline(mixture, processor(experiment.model, words), seed=0)
    index = data.plan.step(3)[2][0][1]
    built = data.sources[0]
    record = built.record_index(index)
    half = load()["train"][record].image[:200]
    records = list(built.catalog.records)
    records[record] = replace(records[record], image=half)
    monkeypatch.setattr(built.catalog, "records", tuple(records))
    with pytest.raises(DataError, match=rf"openmoji_questions\[{index}\]: record {record} "):
        data.batch(3, rows=[2])
    with pytest.raises(DataError, match=r"openmoji_questions\["):
        list(data.iterate(3, 4))


def test_a_tokenizer_is_trained_past_records_that_cannot_be_used(monkeypatch):
    whole = BrokenSource.example

    def some(self, index):
        if index in (5, 60):
            raise DataError(f"record {index}", "text", "correct it")
        return whole(self, index)

    source = Broken("broken").build()
    before = list(training_texts([source]))
    monkeypatch.setattr(BrokenSource, "example", some)
    after = list(training_texts([source]))
    parts = [part for i in (5, 60) for message in whole(source, i).messages for part in message.parts]
    texts = [part.text for part in parts if isinstance(part, Text)]
    assert len(texts) > 2 and set(after) < set(before) and len(after) == len(before) - len(texts)


def test_bad_records_are_counted_and_left_out():
    bad = {"bad_images": (5, 60), "empty_answers": (7,)}
    data = pipeline(broken(0.02, **bad))
    assert [index for index, _ in data.measured[0].bad] == [5, 7, 60]
    assert all(f"broken[{index}]" in reason for index, reason in data.measured[0].bad)
    placed = {(s, i) for step in range(100) for row in data.plan.step(step) for s, i in row}
    assert {i for s, i in placed if s == 0} == set(range(200)) - {5, 7, 60}
    with pytest.raises(DataError, match=r"(?s)broken: 3 of 200 examples cannot be used.*broken\[5\].*at most 1.00%"):
        pipeline(broken(0.01, **bad))


def test_an_unreadable_image_stops_a_run_that_allows_none():
    data = pipeline(broken(0.0, bad_images=tuple(range(200))))
    with pytest.raises(DataError, match=r"broken\[\d+\]: image \d+: truncated"):
        data.batch(0)


def test_measuring_draws_no_image(monkeypatch):
    """Checks a model whose images all have the same size; drawing would be most of the time of a quickstart's start."""
    monkeypatch.setattr(ToySource, "image", lambda *_: pytest.fail("drawn"))
    assert pipeline().measured[0].slots["image"].tolist() == [1] * 200


def test_an_empty_answer_is_refused_at_measuring():
    with pytest.raises(DataError, match=r"broken\[11\]: an empty answer to 'what colour'"):
        pipeline(broken(0.0, empty_answers=(11,)))


def test_more_images_than_slots_are_refused_at_measuring():
    with pytest.raises(DataError, match=r"toy_pairs\[0\]: 2 images\n.*at most 1 image a row"):
        pipeline(replace(IMAGES, slots={"image": 1}))


# ---- stored lengths


def test_lengths_are_measured_once(tmp_path, monkeypatch):
    first = pipeline(cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*/table.npy"))) == len(IMAGES.sources)
    monkeypatch.setattr(SourceEncoder, "measure", lambda *_: pytest.fail("measured again"))
    second = pipeline(cache_dir=tmp_path)
    monkeypatch.undo()
    assert_equal(first.batch(4), second.batch(4))


def test_lengths_are_measured_anew_for_another_processor(tmp_path):
    """Checks another tokenizer, system message or layout of images, which give rows of another length."""
    words, few = tokenizer(), Tokenizer.train(["a text"], 300)
    said = [words.words("here")] * MODEL.media_tokens
    named = ComposedLayout({"image": ImageTokens(SIZE, MODEL.media_tokens, said)}, words.image_token_id)
    readers = [processor(), processor(MODEL, few), Processor(MODEL, words, named)]
    readers += [Processor(MODEL, words, processor().layout, system) for system in ("", "be brief")]
    for number, reader in enumerate(readers, start=1):
        for _ in range(2):
            Pipeline(IMAGES, reader, seed=0, cache_dir=tmp_path)
            assert len(list(tmp_path.glob("*/table.npy"))) == number * len(IMAGES.sources)


def test_lengths_are_measured_anew_for_other_data_or_settings(tmp_path):
    pipeline(cache_dir=tmp_path)
    for change in ({"length": 80}, {"sources": (Weighted(Toy(size=100)), *IMAGES.sources[1:])}):
        before = set(tmp_path.iterdir())
        pipeline(replace(IMAGES, **change), cache_dir=tmp_path)
        assert set(tmp_path.iterdir()) - before


def test_stale_lengths_are_reported(tmp_path, monkeypatch):
    """Checks data that changed while the source's fingerprint did not."""
    pipeline(cache_dir=tmp_path)
    old = ToySource.example

    def changed(self, index):
        talk = old(self, index)
        question, *others = talk.messages
        return replace(talk, messages=(replace(question, content=(*question.content, Text("really"))), *others))

    monkeypatch.setattr(ToySource, "example", changed)
    with pytest.raises(DataError, match=r"toy\w*\[\d+\]: \d+ tokens, measured as \d+(?s:.)*delete the stored lengths"):
        pipeline(cache_dir=tmp_path).batch(0)
