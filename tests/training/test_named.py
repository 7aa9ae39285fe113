"""A named model trained from its checkpoint: its own template, packed rows, cached features, export to a folder."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image as Pillow
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_data import COLOURS, Toy, spec_of
from toy_evaluation import colours
from transformers import PreTrainedTokenizerFast

import mllm_jax
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.cli import main
from mllm_jax.data.message import Example, Image, Message, Text
from mllm_jax.data.pipeline import Mixture, Pipeline, Weighted
from mllm_jax.datasets.llava import LLaVARecords
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.llava import LlavaConfig
from mllm_jax.models.multimodal import Connection
from mllm_jax.models.run_weights import load_run
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.training.config import AdamW, CheckpointConfig, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.features import FeatureCache
from mllm_jax.training.loop import train
from mllm_jax.training.objectives.next_token import NextToken

WORDS = ("<pad>", "<s>", "</s>", "user:", "assistant:", "?", "what", "colour", "which", "number", "is", *COLOURS)
NUMBERS = tuple(str(i) for i in range(20))
ID = {word: i for i, word in enumerate((*WORDS, *NUMBERS))}
IMAGE = len(ID)
TEMPLATE = (
    "<s> {% for m in messages %}{{ m['role'] + ': ' }}"
    "{% for p in m['content'] %}{{ ('<image>' if p['type'] == 'image' else p['text']) + ' ' }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
MODEL = LlavaConfig(
    inputs={"image": Branch(ViTConfig(
        8, 4, 24, num_layers=2, num_heads=2, mlp_size=32, class_token=True, activation="quick_gelu",
        image_mean=(0.48145466, 0.4578275, 0.40821073), image_std=(0.26862954, 0.26130258, 0.27577711),
        dialect=ViTDialect(
            pre_norm=True, patch_bias=False, norm_output=False, norm_pooled=True, norm_eps=1e-5, pooler="token",
            family="CLIPVisionModel",
        ),
    ), MLPProjectorConfig(32), Connection(layers=(-2,)))},
    llm=DecoderConfig(
        vocab_size=len(ID) + 1, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=(2,), max_position_embeddings=256,
    ),
    image_token_id=IMAGE,
)  # fmt: skip
DATA = Mixture(
    (Weighted(Toy(), 0.5), Weighted(Toy("toy_pairs", images=2), 0.3), Weighted(Toy("toy_text", images=0), 0.2)),
    rows=4,
    length=64,
    slots={"image": 4},
)
EVALUATION = tuple(
    colours(f"seen/{name}", Toy(images=number), size=3, max_new_tokens=8)
    for number, name in enumerate(("none", "one", "two"))
)
EVALUATED: list[Experiment] = []  # returned by the config file of a test


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes a LLaVA of random weights with its tokenizer and processor, as on the hub."""
    folder = tmp_path_factory.mktemp("named") / "llava"
    module = MODEL.make()
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), module.config.batch_spec().empty()))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(abstract))
    mllm_jax.save_pretrained(module, params, folder)
    backend = Tokenizer(models.WordLevel(ID, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}, "crop_size": 8}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return mllm_jax.Processor.from_pretrained(folder)


def experiment(folder, *, cache_features: bool = False, steps: int = 4) -> Experiment:
    return Experiment(
        name="named",
        model=mllm_jax.pretrained_config(folder),
        tokenizer=TokenizerConfig(folder=str(folder)),
        pretrained=(Pretrained("*", str(folder)),),
        log_every=1,
        checkpoint=CheckpointConfig(every_steps=2),
        stages=(
            Stage(
                "align",
                NextToken(),
                ("projector_image/*",),
                DATA,
                steps,
                AdamW(learning_rate=1e-2, warmup_steps=1),
                cache_features=cache_features,
                validation=DATA,
                validate_every=2,
                validation_batches=1,
            ),
            Stage("instruct", NextToken(), ("projector_image/*", "llm/*"), DATA, 2, AdamW(learning_rate=1e-3)),
        ),
    )


def losses(run) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    return train(experiment(folder), tmp_path_factory.mktemp("plain")).path


def talk(*said: str, images: int = 0) -> Example:
    """Makes questions and answers in turn, with images before the first question."""
    shown = [Image(np.zeros((8, 8, 3), np.uint8))] * images
    messages = [Message(("user", "assistant")[number % 2], text) for number, text in enumerate(said)]
    return Example((replace(messages[0], content=(*shown, Text(said[0]))), *messages[1:]))


def test_rows_are_the_templates_own(processor):
    said = talk("what colour ?", "red", "which number ?", "7 red", images=2)
    e = processor.encode(said, 64)
    text = "<s> user: I I what colour ? assistant: red </s> user: which number ? assistant: 7 red </s>"
    wanted = [i for word in text.split(" ") for i in ([IMAGE] * 4 if word == "I" else [ID[word]])]
    assert e.tokens.tolist() == wanted
    learnt = [word for word, weight in zip(wanted, e.loss_weights, strict=True) if weight]
    assert learnt == [ID[word] for word in ("red", "</s>", "7", "red", "</s>")]
    short = processor.encode(said, len(wanted) - 1)
    assert short.dropped_turns == 1 and short.tokens.tolist() == wanted[: len(short.tokens)]
    with pytest.raises(DataError, match="with its first turn"):
        processor.encode(said, len(short.tokens) - 1)
    with pytest.raises(DataError, match="has '<image>' in it"):
        processor.encode(talk("what <image> ?", "red"), 64)
    with pytest.raises(DataError, match="an empty answer to 'what \\?'"):
        processor.encode(talk("what ?", " "), 64)


def test_packed_examples_say_what_each_says_alone(processor, folder):
    data = Pipeline(DATA, processor, seed=0)
    batch = data.batch(3)
    assert {n: (x.shape, x.dtype) for n, x in spec_of(batch).items()} == {
        n: (x.shape, x.dtype) for n, x in data.spec.items()
    }
    assert batch["segments"].max() > 1
    model, params = mllm_jax.from_pretrained(folder)
    apply = jax.jit(lambda b: model.apply({"params": params}, b).logits)
    packed = np.asarray(apply(batch))
    plan = data.plan.step(3)
    for row, examples in enumerate(plan[:2]):
        start = 0
        for source, index in examples:
            alone = processor.encode(data.sources[source].example(index), DATA.length)
            single = processor.pack([[alone]] * DATA.rows, DATA.length, DATA.slots)
            n = len(alone.tokens)
            np.testing.assert_allclose(packed[row, start : start + n], np.asarray(apply(single))[0, :n], atol=2e-5)
            start += n


def test_stages_train_from_the_checkpoint_and_leave_as_a_folder(folder, run, tmp_path, capsys, monkeypatch):
    # Stored configs name only classes of the package, and the toys are not in it.
    monkeypatch.setattr(RunFolder, "experiment", lambda self: experiment(folder))
    _, before = mllm_jax.from_pretrained(folder)
    _, model, params, own, _ = load_run(RunFolder(run))
    assert own.tokenizer.template == TEMPLATE
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), before, params)
    assert all(jax.tree.leaves(same["encoder_image"])) and not any(jax.tree.leaves(same["projector_image"]))
    found = losses(run)
    assert len(found) == 6 and np.isfinite(found).all() and found[3] < found[0]
    assert main(["convert", str(run), str(tmp_path / "out")]) == 0
    assert "written to" in capsys.readouterr().out
    again, read = mllm_jax.from_pretrained(tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), read, params)
    assert again.config == model.config
    processor = mllm_jax.Processor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.backend.chat_template == TEMPLATE

    Pillow.fromarray(np.full((20, 9, 3), 90, np.uint8)).save(tmp_path / "a.png")
    command = [str(tmp_path / "out"), "what colour ?", "--image", str(tmp_path / "a.png"), "--max-new-tokens", "5"]
    assert main(["generate", *command]) == 0
    parts = [{"type": "image", "image": tmp_path / "a.png"}, {"type": "text", "text": "what colour ?"}]
    batch = processor([{"role": "user", "content": parts}])
    wanted = mllm_jax.generate(again, read, batch, processor, max_new_tokens=5)
    assert capsys.readouterr().out.strip() == wanted[0].strip()
    assert main(["generate", str(run), *command[1:]]) == 0
    assert capsys.readouterr().out.strip() == wanted[0].strip(), "the run's folder answers as what leaves it"


def test_training_ends_with_an_evaluation_and_images_in_the_report(folder, tmp_path, capsys):
    """Runs `mllm train`, then `mllm evaluate` of one task again, with a named model."""
    made = experiment(folder)
    stage = replace(made.stages[0], steps=1, validation=None)
    EVALUATED.append(replace(made, stages=(stage,), evaluation=EVALUATION))
    (tmp_path / "named.py").write_text(f"def config():\n    import {__name__} as t\n    return t.EVALUATED[-1]\n")
    assert main(["train", str(tmp_path / "named.py"), "--run-dir", str(tmp_path / "run")]) == 0
    assert f"mllm generate {tmp_path / 'run'}" in " ".join(capsys.readouterr().out.split())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {task: found["n"] for task, found in results.items()} == {"seen/none": 3, "seen/one": 3, "seen/two": 3}
    examples = json.loads((tmp_path / "run" / "examples.json").read_text())
    shown = {task: [e["image_png_base64"] for e in examples if e["task"] == task] for task in results}
    assert [{len(images) for images in each} for each in shown.values()] == [{0}, {1}, {2}]
    first = Pillow.open(io.BytesIO(base64.b64decode(shown["seen/one"][0][0])))
    np.testing.assert_array_equal(np.asarray(first), Toy().build().image(0))
    report = (tmp_path / "run" / "report.html").read_text()
    assert all(png in report for each in shown.values() for images in each for png in images)
    assert main(["evaluate", str(tmp_path / "run"), "--tasks", "two"]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results, "greedy answers are the same again"


def test_kept_features_change_no_loss(folder, run, tmp_path):
    cached = train(experiment(folder, cache_features=True), tmp_path).path
    np.testing.assert_allclose(losses(cached), losses(run), rtol=1e-5)
    (features,) = (cached / "features").iterdir()
    held = (features / "keys.bin").stat().st_size // 16
    shown = {
        image.tobytes()
        for step in range(4)
        for image in Pipeline(DATA, mllm_jax.Processor.from_pretrained(folder), seed=0)
        .batch(step)["images"]
        .reshape(-1, 192)
    }
    assert held >= len(shown), "every image of the stage, and those of its validation"


def test_the_cache_encodes_once_and_survives_a_kill(tmp_path):
    calls = []

    def encode(images):
        calls.append(len(images))
        return images.astype(np.float32).mean(axis=(1, 2))[:, None] * np.ones((1, 2, 1), np.float32)

    images = np.random.default_rng(0).integers(0, 256, (2, 2, 4, 4, 3), dtype=np.uint8)
    images[1, 1] = images[0, 0]
    cache = FeatureCache(tmp_path, encode, (2, 3), "float32")
    one = cache({"images": images, "tokens": np.zeros(2)})
    assert calls == [3] and set(one) == {"features", "tokens"} and one["features"].shape == (2, 2, 2, 3)
    np.testing.assert_allclose(one["features"][:, :, 0], images.astype(np.float32).mean(axis=(2, 3)), rtol=1e-6)
    cache.close()
    with (tmp_path / "features.bin").open("ab") as file:
        file.write(b"torn")  # as after a kill between the two writes
    again = FeatureCache(tmp_path, encode, (2, 3), "float32")
    assert len(again) == 3
    np.testing.assert_array_equal(again({"images": images})["features"], one["features"])
    assert calls == [3]
    other = 255 - images
    np.testing.assert_allclose(
        again({"images": other})["features"][:, :, 1], other.astype(np.float32).mean(axis=(2, 3)), rtol=1e-6
    )
    again.close()


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda e: replace(e, tokenizer=TokenizerConfig(vocab_size=8)), "without TokenizerConfig"),
        (
            lambda e: replace(e, stages=(replace(e.stages[0], cache_features=True, trainable=("*",)),)),
            "cache_features of LlavaConfig",
        ),
        (lambda e: replace(e, pretrained=(Pretrained("*", "x"), Pretrained("llm", "x"))), "or '\\*' alone"),
        (
            lambda e: replace(e, model=replace(e.model, llm=change_fields(e.model.llm, rope_theta=7.0))),
            "as model, which is another model",
        ),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        train(change(experiment(folder)), tmp_path)


def test_a_template_without_an_end_token_is_refused_once(folder, tmp_path):
    """Checks that the refusal names the option of the template, not each record (TRIAL, row 33)."""
    endless = "{% for m in messages %}{{ m.content[0].text if m.content is not string else m.content }} {% endfor %}"
    made = experiment(folder)
    with pytest.raises(ConfigError, match=r"none of the stop tokens \['</s>'\]") as refusal:
        train(replace(made, tokenizer=replace(made.tokenizer, template=endless)), tmp_path)
    assert "TokenizerConfig.template" in refusal.value.todo and str(refusal.value).count("none of the stop tokens") == 1


# ---- LLaVA's own records


@pytest.fixture
def records(tmp_path):
    """Writes a file of captions, one of conversations (without an image, and with it after the text), and images."""
    for n in range(4):
        Pillow.fromarray(np.full((8, 8 + n, 3), 60 * n, np.uint8)).save(tmp_path / f"{n}.png")
    captions, talks = [], []
    for n in range(32):
        colour, number = COLOURS[n % len(COLOURS)], str(n % 20)
        asked = {"from": "human", "value": "<image>\nwhat is"}
        said = {"from": "gpt", "value": f"{colour} {number}"}
        captions.append({"id": f"c{n}", "image": f"{n % 4}.png", "conversations": [asked, said]})
        if n % 3 == 0:
            talks.append({"id": f"t{n}", "conversations": [asked | {"value": f"number {number} ?"}, said]})
        else:
            behind = [asked | {"value": "which colour ? <image>"}, said] if n % 3 == 1 else [asked, said]
            more = [asked | {"value": "which number ?"}, said | {"value": number}]
            talks.append({"id": f"t{n}", "image": f"{n % 4}.png", "conversations": behind + more})
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    return tmp_path


def on_records(folder, records) -> Experiment:
    """Makes the two stages of LLaVA: captions without a template, then conversations."""
    read = dict(image_folder=".", data_dir=str(records))
    sources = (LLaVARecords("captions.json", version="plain", **read), LLaVARecords("talks.json", **read))
    made = experiment(folder)
    stages = tuple(
        replace(stage, data=replace(DATA, sources=(Weighted(source),)), validation=None, steps=6)
        for stage, source in zip(made.stages, sources, strict=True)
    )
    return replace(made, stages=stages)


def test_llava_records_train_a_named_model(folder, records, tmp_path):
    run = train(on_records(folder, records), tmp_path / "run")
    found = losses(run.path)
    assert len(found) == 12 and np.isfinite(found).all() and np.mean(found[4:6]) < found[0]


def test_images_are_where_the_records_have_them(records, processor):
    source = LLaVARecords("talks.json", ".", data_dir=str(records)).build()
    encoded = processor.encode(source.example(1), 64)
    row = encoded.row.tokens.tolist()
    start = row.index(IMAGE)
    assert row[start - 3 : start] == [ID["which"], ID["colour"], ID["?"]] and row[start : start + 4] == [IMAGE] * 4
    plain = LLaVARecords("captions.json", ".", version="plain", data_dir=str(records)).build()
    encoded = processor.encode(plain.example(5), 64)
    caption = [ID[word] for word in plain.example(5).messages[0].text.split()]
    assert encoded.row.tokens.tolist() == [IMAGE] * 4 + caption
    assert encoded.loss_weights.tolist() == [0] * 4 + [1] * 2


def test_a_record_without_an_answer_stops_the_run(folder, records, tmp_path):
    talks = json.loads((records / "talks.json").read_text())
    talks[3]["conversations"].pop()
    (records / "talks.json").write_text(json.dumps(talks))
    with pytest.raises(DataError, match="t3.*without an assistant turn"):
        train(on_records(folder, records), tmp_path / "run")
