"""The assistant of a model with images: generation with a cache against one full pass per token and row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image as Pillow
from toy_data import processor as processor_of

import mllm_jax
from mllm_jax.data.message import Image, Message, Text
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import DataError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.program import BUCKET
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig, make_mesh

CONFIG = MultimodalConfig(
    inputs={
        "image": Branch(ViTConfig(8, 4, 12, num_layers=1, num_heads=2, mlp_size=16), MLPProjectorConfig(output_size=16))
    },
    llm=DecoderConfig(vocab_size=280, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=24),
)
MEDIA, NEW = CONFIG.media_tokens, 6
WIDEST = 2 * BUCKET + NEW


class IdTokenizer(Tokenizer):
    """A tokenizer that writes ids as numbers, so that different answers differ as text."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)


@pytest.fixture(scope="module")
def tokenizer():
    return IdTokenizer(Tokenizer.train(["what is this? a red apple"] * 3, 280).backend)


def random_params_of(config: MultimodalConfig) -> dict:
    """Returns random parameters without compiling `init`."""
    module = config.make()
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), config.batch_spec().empty()))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(abstract))["params"]


@pytest.fixture(scope="module")
def params():
    return random_params_of(CONFIG)


@pytest.fixture(scope="module")
def assistant(params, tokenizer):
    return Assistant(CONFIG.make(), params, processor_of(CONFIG, tokenizer))


def make_image(seed: int, *size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*(size or (8, 8)), 3)).astype(np.uint8)


def asked(question: str, *images: np.ndarray) -> tuple[Message, ...]:
    return (Message("user", (*map(Image, images), Text(question))),)


# Prompts of unequal length, in two buckets, with no, one or two images; more prompts than rows.
PROMPTS = [
    asked("what?", make_image(0)),
    asked("what is this? a red apple", make_image(1)),
    asked("how many pears, cows and umbrellas are there?", make_image(2)),
    asked("is it?", make_image(3)),
    asked("is it?", make_image(4)),
    asked("red", make_image(5), make_image(6)),
    asked("red", make_image(6), make_image(5)),
    asked("what is red?"),
    asked("why"),
]


@pytest.fixture(scope="module")
def row(tokenizer):
    """Returns a function that lays out a prompt by hand: its ids, the media token at each position and its images."""

    def of(messages: tuple[Message, ...]) -> tuple[list[int], list[int], list[np.ndarray]]:
        images = [part.source for part in messages[0].content if isinstance(part, Image)]
        shown = [{"type": "image"}] * len(images) + [{"type": "text", "text": messages[0].text}]
        ids = tokenizer.ids(tokenizer.render_chat([{"role": "user", "content": shown}]))
        tokens, index = [], []
        for token in ids:
            if token == tokenizer.image_token_id:
                first = max(index, default=-1) + 1
                tokens += [token] * MEDIA
                index += range(first, first + MEDIA)
            else:
                tokens.append(token)
                index.append(-1)
        return tokens, index, images

    return of


@pytest.fixture(scope="module")
def forward(params):
    """Returns a function of ids, media tokens and images -> float32[n, V], log probabilities of the next tokens."""
    model = CONFIG.make()
    apply = jax.jit(lambda batch: jax.nn.log_softmax(model.apply({"params": params}, batch).logits))

    def logprobs(ids: list[int], index: list[int], images: list[np.ndarray]) -> np.ndarray:
        n, slots = len(ids), np.zeros((1, 2, 8, 8, 3), np.uint8)
        slots[0, : len(images)] = images or 0
        batch = {
            "tokens": np.pad(np.array(ids, np.int32), (0, WIDEST - n))[None],
            "positions": np.arange(WIDEST, dtype=np.int32)[None],
            "segments": np.int32(np.arange(WIDEST) < n)[None],
            "media_index": np.pad(np.int32(index), (0, WIDEST - len(index)), constant_values=-1)[None],
            "images": slots,
        }
        return np.asarray(apply(batch)[0, :n])

    return logprobs


@pytest.fixture(scope="module")
def wanted(row, forward):
    """Returns the greedy ids of each prompt by full passes over a padded row."""

    def answer(messages: tuple[Message, ...]) -> list[int]:
        ids, index, images = row(messages)
        said: list[int] = []
        for _ in range(NEW):
            said.append(int(forward([*ids, *said], index, images)[-1].argmax()))
        return said

    return [answer(prompt) for prompt in PROMPTS]


def ask(assistant: Assistant, prompts: list, **options) -> list[list[int]]:
    how = dict(max_new_tokens=NEW, ignore_eos=True, batch_size=4) | options
    return [list(answer.tokens) for answer in assistant.generate(list(prompts), **how)]


def test_answers_are_those_of_full_passes(assistant, wanted, row):
    lengths = [len(row(prompt)[0]) for prompt in PROMPTS]
    assert min(lengths) < BUCKET < max(lengths) < 2 * BUCKET, "the prompts must span two buckets"
    assert len(set(map(tuple, wanted))) >= 7 and any(len(set(ids)) > 2 for ids in wanted), "it tells nothing"
    assert ask(assistant, PROMPTS) == wanted
    text = assistant.generate(PROMPTS[0], max_new_tokens=NEW, ignore_eos=True).text
    assert text == " ".join(map(str, wanted[0]))


def test_a_prompt_alone_gives_what_it_gives_in_a_batch(assistant, wanted):
    for i in (0, 2, 5, 8):
        assert ask(assistant, [PROMPTS[i]]) == [wanted[i]]
    order = [5, 7, 2, 0, 6, 1]
    assert ask(assistant, [PROMPTS[i] for i in order]) == [wanted[i] for i in order]


def test_the_image_and_the_order_of_images_decide(wanted):
    assert PROMPTS[3][0].text == PROMPTS[4][0].text and wanted[3] != wanted[4]
    assert wanted[5] != wanted[6]


def test_an_answer_ends_before_eos_and_others_go_on(params, tokenizer, wanted):
    """Makes the second token of one answer the end token; each answer must end before its first end token."""
    eos = wanted[2][1]
    assert eos not in wanted[2][:1]
    config = dataclasses.replace(CONFIG, llm=dataclasses.replace(CONFIG.llm, eos_token_id=(eos,)))
    other = Assistant(config.make(), params, processor_of(config, tokenizer))
    ends = (eos, *tokenizer.stop_ids)
    cut = [ids[: next((n for n, i in enumerate(ids) if i in ends), NEW)] for ids in wanted[:4]]
    assert len(cut[2]) == 1 and max(map(len, cut)) == NEW
    assert ask(other, PROMPTS[:4], ignore_eos=False) == cut


def test_seeds(assistant):
    def drawn(seed):
        return ask(assistant, PROMPTS[:4], temperature=1.5, seed=seed)

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_sharded_assistant_says_the_same(params, tokenizer, wanted):
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    sharded = Assistant(CONFIG.make(), params, processor_of(CONFIG, tokenizer), mesh=mesh)
    short = [0, 1, 3, 4]
    assert ask(sharded, [PROMPTS[i] for i in short]) == [wanted[i] for i in short]


def test_an_image_of_another_size_is_resized_as_in_training(assistant, tmp_path):
    large = make_image(0, 20, 13)
    Pillow.fromarray(large).save(tmp_path / "a.png")
    resized = assistant.processor.layout.image(large).arrays["images"][0]
    paths = [
        {"role": "user", "content": [{"type": "image", "path": tmp_path / "a.png"}, {"type": "text", "text": "what?"}]}
    ]
    first, second, third = ask(assistant, [asked("what?", resized), asked("what?", large), paths])
    assert first == second == third != ask(assistant, [asked("what?", make_image(0))])[0]


def test_images_that_cannot_be_read_are_refused_before_anything_runs(assistant, tmp_path, monkeypatch):
    def run(*_):
        raise AssertionError("something ran")

    monkeypatch.setattr(assistant, "_batch", run)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for source, message in (
        (np.zeros((4, 4)), r"float64\[4, 4\]"),
        (tmp_path / "broken.png", "broken.png"),
        (tmp_path / "absent.png", "absent.png"),
    ):
        with pytest.raises(DataError, match=message):
            ask(assistant, [PROMPTS[0], asked("what?", source)])


def test_a_processors_batch_is_answered_alike(assistant, params, wanted):
    messages = [[{"role": "user", "content": list(PROMPTS[i][0].content)}] for i in (3, 8)]
    batch = assistant.processor(messages)
    found = mllm_jax.generate(CONFIG.make(), params, batch, assistant.processor, max_new_tokens=NEW, ignore_eos=True)
    assert found == [" ".join(map(str, wanted[i])) for i in (3, 8)]
