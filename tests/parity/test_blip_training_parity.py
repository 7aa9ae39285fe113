"""BLIP-2 and InstructBLIP train on conversations: packed rows give transformers' loss, and stages train."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
from blip_reference import LLAMA, OPT, T5, build, make_image
from PIL import Image as Pillow

import mllm_jax
from mllm_jax.data.message import TEXT_ROLE, Example, Image, Message, Text
from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.llava import LLaVARecords
from mllm_jax.errors import DataError
from mllm_jax.models.run_weights import load_run
from mllm_jax.training.config import AdamW, CheckpointConfig, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.features import stage_spec
from mllm_jax.training.loop import train
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.run_processor import export_run
from mllm_jax.training.step import make_apply

CASES = {
    "InstructBLIP, Flan-T5": ("InstructBlip", T5),
    "InstructBLIP, Vicuna": ("InstructBlip", LLAMA),
    "BLIP-2, Flan-T5": ("Blip2", T5 | dict(dense_act_fn="gelu")),
    "BLIP-2, OPT": ("Blip2", OPT),
}
# As plain as BLIP-2's prompts: the question, the answer and the end token.
TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] + ' ' }}{% endfor %}"
    "{{ '</s> ' if m['role'] == 'assistant' else '' }}{% endfor %}"
)
ASKED = (("question : what is the colour of the cat ?", "red"), ("which one ?", "a dog left"), ("a dog", "two"))
SHOWN = (1, 2, 0)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, randomise):
    kind, text = CASES[request.param]
    folder = tmp_path_factory.mktemp("blip")
    made = build(kind, text, {}, queries=4, eos=2, seed=3, randomise=randomise, folder=folder)
    if text["model_type"] != "t5":
        made.processor.tokenizer.backend.chat_template = TEMPLATE
    return made


def images_of(number: int) -> list[np.ndarray]:
    return [make_image(10 * number + i, 15, 22) for i in range(SHOWN[number])]


def example(number: int, *, question: str | None = None, plain: bool = False, turns: int = 1) -> Example:
    images = map(Image, images_of(number))
    asked, answer = ASKED[number]
    if plain:
        return Example((Message(TEXT_ROLE, (*images, Text(answer))),))
    asked = question or asked
    first, said = Message("user", (*images, Text(asked))), Message("assistant", answer)
    return Example((first, said) + (Message("user", asked), said) * (turns - 1))


@torch.no_grad()
def their_loss(case, number: int) -> tuple[float, int]:
    """Returns an example's summed loss, from the model or (no images) its LLM, and its number of tokens with loss."""
    reference, processor = case.reference, case.their_processor
    (question, answer), images = ASKED[number], images_of(number)
    own, encodes = processor.tokenizer, case.model.config.encoder_decoder
    said = [*own(answer, add_special_tokens=False)["input_ids"], 2]
    asked = own(question, add_special_tokens=encodes)["input_ids"]
    ids = [reference.config.image_token_id] * (4 * len(images)) + asked + ([] if encodes else said)
    given = dict(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    if images:
        given["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        if "InstructBlip" in type(reference).__name__:
            instruction = processor.qformer_tokenizer(question, return_tensors="pt")
            given["qformer_input_ids"] = instruction["input_ids"].repeat(len(images), 1)
            given["qformer_attention_mask"] = instruction["attention_mask"].repeat(len(images), 1)
    if encodes:
        given["decoder_input_ids"] = torch.tensor([[0, *said[:-1]]])
    logits = (reference if images else reference.language_model)(**given).logits[0]
    logits = logits if encodes else logits[-len(said) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(said), reduction="sum")), len(said)


def test_packed_rows_have_their_loss(case, assert_close):
    examples = [case.processor.encode(example(number), 48) for number in range(3)]
    packed = [[examples[0], examples[1]], [examples[2]]]
    batch = case.processor.pack(packed, 64, {"image": 4})
    stage = Stage("instruct", NextToken(), ("*",), Mixture((), rows=2, length=64, slots={"image": 4}), 1)
    planned = stage_spec(
        Experiment("planned", case.model.config, (stage,), TokenizerConfig(folder=str(case.folder))), stage
    )
    shapes = {name: (x.shape, str(x.dtype)) for name, x in batch.items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in planned.items()}
    loss, metrics = jax.jit(lambda p, b: NextToken().loss(make_apply(case.model), p, b, None))(case.params, batch)
    wanted = [their_loss(case, number) for number in range(3)]
    assert float(metrics["weight"]) == sum(count for _, count in wanted)
    assert_close(loss, sum(total for total, _ in wanted) / sum(count for _, count in wanted), 1e-4, "loss")


def test_captions_follow_the_queries(case):
    """Checks that a whole caption carries loss, and that the question is left out, also for the queries."""
    decodes = case.model.config.encoder_decoder
    e = case.processor.encode(example(0, plain=True), 40)
    own, caption = case.processor.tokenizer, ASKED[0][1]
    ids = own.encode("") if decodes else own.encode(f"{caption}\n")
    assert e.tokens.tolist() == [case.model.config.image_token_id] * 4 + ids
    said = [*own.backend(caption, add_special_tokens=False)["input_ids"], 2]
    side, wanted = (e.target, said) if decodes else (e.tokens, ids)
    assert side[e.loss_weights > 0].tolist() == wanted
    if case.processor.layout.instruction_length:
        assert e.instruction.tolist() == [1, 2], "[CLS] and [SEP]"


def test_invalid_training_examples_are_refused(case):
    encode, reads = case.processor.encode, case.processor.layout.instruction_length > 0
    for length in (len(encode(example(0), 64).tokens) - 1, 2):
        with pytest.raises(DataError, match="with 1 image"):
            encode(example(0), length)
    with pytest.raises(DataError, match="'<image>' in it"):
        encode(example(0, question="what is <image> ?"), 64)
    with pytest.raises(DataError, match="a text without words"):
        encode(Example((Message(TEXT_ROLE, (Image(images_of(0)[0]), Text(" "))),)), 64)
    if case.model.config.encoder_decoder or reads:
        with pytest.raises(DataError, match="2 turns.*\n.*one question and its answer"):
            encode(example(0, turns=2), 64)
    else:
        one, both = (encode(example(0, turns=turns), 64).loss_weights.sum() for turns in (1, 2))
        assert both == 2 * one > 0
    if reads:
        with pytest.raises(DataError, match="an instruction of 142 tokens"):
            encode(example(0, question="a dog " * 70), 400)


@pytest.mark.parametrize("case", ["InstructBLIP, Flan-T5"], indirect=True)
def test_stages_train_and_leave_as_a_folder(case, tmp_path):
    for n in range(4):
        Pillow.fromarray(np.full((9, 12 + n, 3), 60 * n, np.uint8)).save(tmp_path / f"{n}.png")
    words = ("red", "a dog", "two", "left")
    records = [
        {"id": n, "image": f"{n % 4}.png"} | {"conversations": [
            {"from": "human", "value": "<image>\nwhich colour ?"}, {"from": "gpt", "value": words[n % 4]}
        ]} for n in range(16)
    ]  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(records))
    read = dict(path="r.json", image_folder=".", data_dir=str(tmp_path))
    plain, chat = (
        Mixture((Weighted(LLaVARecords(**read, version=version)),), rows=2, length=40, slots={"image": 3})
        for version in ("plain", "chat")
    )
    experiment = Experiment(
        name="blip",
        model=mllm_jax.pretrained_config(case.folder),
        tokenizer=TokenizerConfig(folder=str(case.folder)),
        pretrained=(Pretrained("*", str(case.folder)),),
        log_every=1,
        checkpoint=CheckpointConfig(every_steps=4),
        stages=(
            Stage("align", NextToken(), ("projector_image/*",), plain, 4, AdamW(learning_rate=3e-3, warmup_steps=1),
                  cache_features=True),
            Stage("instruct", NextToken(), ("projector_image/*", "llm/*"), chat, 4, AdamW(learning_rate=3e-3)),
        ),
    )  # fmt: skip
    run = train(experiment, tmp_path / "run", devices=jax.devices()[:1])
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8 and np.isfinite(losses).all() and losses[3] < losses[0] and losses[7] < losses[4]
    export_run(run, tmp_path / "out")
    _, params = mllm_jax.from_pretrained(tmp_path / "out")
    trained = load_run(run)[2]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, trained)
    type(case.reference).from_pretrained(tmp_path / "out")
    batch = mllm_jax.Processor.from_pretrained(tmp_path / "out")("a dog", images=[make_image(0, 9, 9)])
    assert batch["query_tokens"].shape == (1, 1, 16), "the Q-Former's own tokenizer is saved too"
