"""Generation with a cache against one full forward pass a token, row by row and without a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from mllm_jax.data.templates import encode_prompt

from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import DataError
from mllm_jax.generation.engine import BUCKET
from mllm_jax.generation.generate import Generator, Prompt
from mllm_jax.generation.sampling import Sampling
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig, make_mesh

CONFIG = MultimodalConfig(
    encoder=ViTConfig(8, 4, 12, num_layers=1, num_heads=2, mlp_size=16),
    projector=MLPProjectorConfig(output_size=16),
    llm=DecoderConfig(vocab_size=280, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=24),
)
MEDIA, NEW = CONFIG.media_tokens, 6
WIDEST = 2 * BUCKET + NEW


class IdTokenizer(Tokenizer):
    """Answers as numbers, so that no two different answers look alike."""

    def decode(self, ids) -> str:
        return " ".join(str(int(i)) for i in ids)


@pytest.fixture(scope="module")
def tokenizer():
    return IdTokenizer(Tokenizer.train(["what is this? a red apple"] * 3, 280).backend)


@pytest.fixture(scope="module")
def params():
    module = CONFIG.make()
    abstract = jax.eval_shape(
        lambda: module.init(jax.random.key(0), module.config.batch_spec().empty(), method="touch")
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(abstract))["params"]


@pytest.fixture(scope="module")
def generator(params, tokenizer):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Generator(CONFIG.make(), params, tokenizer, mesh, batch_size=4, max_new_tokens=NEW)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)


# Prompts of unequal length, of two buckets, with a picture and without; more of them than rows.
PROMPTS = [
    Prompt("what?", (picture(0),)),
    Prompt("what is this? a red apple", (picture(1),)),
    Prompt("how many pears, cows and umbrellas are there?", (picture(2),)),
    Prompt("is it?", (picture(3),)),
    Prompt("is it?", (picture(4),)),
    Prompt("red", (picture(5),)),
    Prompt("what is red?"),
    Prompt("why"),
]


@pytest.fixture(scope="module")
def reference(params, tokenizer):
    """Greedy ids of one prompt by full passes over a padded row."""
    model = CONFIG.make()
    forward = jax.jit(lambda batch: model.apply({"params": params}, batch).logits)

    def answer(prompt: Prompt) -> list[int]:
        encoded = encode_prompt(prompt.question, len(prompt.images), tokenizer, MEDIA)
        ids = encoded.tokens.tolist()
        prompt_length = len(ids)
        for _ in range(NEW):
            n = len(ids)
            batch = {
                "tokens": np.pad(np.array(ids, np.int32), (0, WIDEST - n))[None],
                "positions": np.arange(WIDEST, dtype=np.int32)[None],
                "segments": np.int32(np.arange(WIDEST) < n)[None],
                "media_index": np.pad(encoded.media_index, (0, WIDEST - prompt_length), constant_values=-1)[None],
                "images": np.stack(prompt.images or [np.zeros((8, 8, 3), np.uint8)])[None],
            }
            ids.append(int(forward(batch)[0, n - 1].argmax()))
        return ids[prompt_length:]

    return answer


@pytest.fixture(scope="module")
def wanted(reference):
    return [reference(prompt) for prompt in PROMPTS]


def texts(ids: list[list[int]]) -> list[str]:
    return [" ".join(map(str, row)) for row in ids]


def test_answers_are_those_of_full_passes(generator, wanted, tokenizer):
    lengths = [len(encode_prompt(p.question, len(p.images), tokenizer, MEDIA).tokens) for p in PROMPTS]
    assert min(lengths) < BUCKET < max(lengths) < 2 * BUCKET, "the prompts must span two buckets"
    assert len(set(texts(wanted))) >= 6 and any(len(set(row)) > 2 for row in wanted), "a reference that tells nothing"
    assert generator.generate(PROMPTS) == texts(wanted)


def test_a_prompt_alone_gives_what_it_gives_in_a_batch(generator, wanted):
    for i in (0, 2, 4, 7):
        assert generator.generate([PROMPTS[i]]) == texts(wanted)[i : i + 1]
    order = [5, 7, 2, 0, 6, 1]
    assert generator.generate([PROMPTS[i] for i in order]) == [texts(wanted)[i] for i in order]


def test_the_picture_decides(generator, wanted):
    assert PROMPTS[3].question == PROMPTS[4].question and wanted[3] != wanted[4]


def test_an_answer_ends_before_eos_and_others_go_on(generator, wanted, monkeypatch):
    """The second token of one answer is made the end token; each answer stops before its own first one."""
    eos = wanted[2][1]
    assert eos not in wanted[2][:1]
    monkeypatch.setattr(generator.tokenizer, "eos", eos)
    other = Generator(
        generator.model, generator.params, generator.tokenizer, generator.mesh, batch_size=4, max_new_tokens=NEW
    )
    cut = [row[: row.index(eos)] if eos in row else row for row in wanted]
    assert len(cut[2]) == 1 and max(map(len, cut)) == NEW
    assert other.generate(PROMPTS[:4]) == texts(cut[:4])


def test_seeds(generator):
    def drawn(seed):
        return generator.generate(PROMPTS[:4], Sampling(temperature=1.5, seed=seed))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_sharded_generator_says_the_same(params, tokenizer, wanted):
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    sharded = Generator(CONFIG.make(), params, tokenizer, mesh, batch_size=4, max_new_tokens=NEW)
    short = [0, 1, 3, 4]
    assert sharded.generate([PROMPTS[i] for i in short]) == [texts(wanted)[i] for i in short]


def test_a_picture_of_another_size_is_refused(generator):
    with pytest.raises(DataError, match=r"\(9, 8, 3\)"):
        generator.generate([Prompt("what?", (np.zeros((9, 8, 3), np.uint8),))])


def test_media_of_a_prompt_are_its_pictures_in_order(generator):
    first, second = picture(0), picture(1)
    both = generator.encode_images([first, second, first, second, first])
    assert both.shape == (5, MEDIA, 16)
    np.testing.assert_allclose(both[0], both[4], atol=1e-6)
    np.testing.assert_allclose(both[1], generator.encode_images([second])[0], atol=1e-6)
    assert jnp.abs(both[0] - both[1]).max() > 1e-3
