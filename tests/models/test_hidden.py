"""Positions of a row without a media token: the rest of the row is computed as if they were not there."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.encoders.hubert import HubertConfig
from mllm_jax.errors import ConfigError
from mllm_jax.generation.beam import Rule
from mllm_jax.generation.program import Asked, Program
from mllm_jax.generation.sampling import Sampling
from mllm_jax.layers.rotary import RopeScaling
from mllm_jax.llms.chatglm import ChatGLMConfig
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.llms.t5 import T5Config
from mllm_jax.models.branch import Branch
from mllm_jax.models.cformer_projector import CFormerProjectorConfig
from mllm_jax.models.hidden import hide
from mllm_jax.models.multimodal import MultimodalConfig

sys.path.append(str(Path(__file__).parents[1] / "training"))
from toy_data import quick_compilation  # noqa: E402

WIDTH, WORDS = 16, 29
ENCODER = HubertConfig(WIDTH, 1, 2, 24, conv_channels=(8,) * 7, position_kernel=4, position_groups=2)
PROJECTOR = CFormerProjectorConfig(cif_size=8, hidden_size=8, num_layers=1, num_heads=2, mlp_size=12, max_length=32)
SIZES = dict(vocab_size=WORDS, hidden_size=WIDTH, num_layers=2, num_heads=4, mlp_size=24)
LLAMA = DecoderConfig(num_kv_heads=2, **SIZES)
DECODERS = {
    "rotary": LLAMA,
    "dynamic": replace(LLAMA, dialect=DecoderDialect(rope_scaling=RopeScaling("dynamic", 2.0, 3))),
    "learned": DecoderConfig(num_kv_heads=4, **SIZES, dialect=DecoderDialect(norm="layer", positions="learned")),
    "prefix": ChatGLMConfig(**SIZES, bos_token_id=28, gmask_token_id=27, mask_token_id=26, eos_token_id=(25,)),
}
T5 = T5Config(WORDS, WIDTH, 4, num_heads=2, mlp_size=24, num_layers=2, num_decoder_layers=2)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


def composed(llm) -> MultimodalConfig:
    return MultimodalConfig({"audio": Branch(ENCODER, PROJECTOR, seconds=0.5)}, llm)


def random_params(config: MultimodalConfig):
    """Returns random parameters, without compiling `init`."""
    module = config.make()
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), config.batch_spec().empty(), method="touch"))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(abstract))


# Two packed texts and padding. The first sound has a hidden position in its middle and at its end, and the second text
# begins with a sound that begins with a hidden position.
INDEX = np.array([[-1, 0, 1, 2, 3, -1, -1, -1, 4, 5, 6, -1, -1, -1]])
SEGMENTS = np.array([[1] * 8 + [2] * 5 + [0]])
MASK = np.array([[True, False, True, False, False, True, True, True]])
VISIBLE = [i for i in range(14) if INDEX[0, i] < 0 or MASK[0, INDEX[0, i]]]


def row(llm=LLAMA, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 25, (1, 14))
    tokens[0, [5, 6, 11]] = [27, 28, 28]  # marks and beginnings of answers, for a prefix model
    positions = np.array([[*range(8), *range(5), 0]])
    media = rng.normal(size=(1, 8, WIDTH)).astype(np.float32)
    out = dict(tokens=tokens, positions=positions, segments=SEGMENTS, media_index=INDEX)
    if llm.encoder_decoder:
        out |= dict(decoder_tokens=tokens[:, :6], decoder_segments=np.array([[1, 1, 1, 2, 2, 0]]))
    return {name: array.astype(np.int32) for name, array in out.items()} | dict(media=media, media_mask=MASK)


def compact(batch: dict[str, np.ndarray], kept: list[int] = VISIBLE) -> dict[str, np.ndarray]:
    """Returns the row without its hidden positions, and without a mask."""
    short = {name: batch[name][:, kept] for name in ("tokens", "segments", "media_index")}
    segments = short["segments"][0]
    positions = np.array([[(segments[:i] == segment).sum() for i, segment in enumerate(segments)]], np.int32)
    rest = {name: batch[name] for name in batch if name.startswith("decoder") or name == "media"}
    return rest | short | dict(positions=positions)


def logits_of(config: MultimodalConfig, params):
    return jax.jit(lambda batch: config.make().apply(params, batch).logits)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_reads_the_row_without_them(kind):
    """Compares with the shorter row, changes tokens that are not fired, and reads the last visible ones for them."""
    config = composed(DECODERS[kind])
    params, batch = random_params(config), row()
    run = logits_of(config, params)
    found, short = run(batch), run(compact(batch))
    real = [i for i in VISIBLE if SEGMENTS[0, i]]
    np.testing.assert_allclose(found[0, real], short[0, : len(real)], atol=2e-5)
    other = np.where(MASK[..., None], batch["media"], -2 * batch["media"])
    np.testing.assert_array_equal(run(batch | {"media": other})[0, real], found[0, real])
    np.testing.assert_array_equal(found[0, [2, 4]], found[0, [1, 3]])
    shown = run(batch | {"media_mask": np.ones_like(MASK)})
    assert np.abs(shown[0, 5:8] - found[0, 5:8]).max() > 1e-3
    moved = np.where(MASK[..., None], -2 * batch["media"], batch["media"])
    assert np.abs(run(batch | {"media": moved})[0, 5:8] - found[0, 5:8]).max() > 1e-3


def test_an_encoder_decoder_reads_the_row_without_them():
    config = composed(T5)
    params, batch = random_params(config), row(T5)
    run = logits_of(config, params)
    found = run(batch)
    np.testing.assert_allclose(found[0, :5], run(compact(batch))[0, :5], atol=2e-5)
    other = np.where(MASK[..., None], batch["media"], -2 * batch["media"])
    np.testing.assert_array_equal(run(batch | {"media": other})[0, :5], found[0, :5])
    assert np.abs(run(batch | {"media_mask": np.ones_like(MASK)})[0, :5] - found[0, :5]).max() > 1e-3


def test_hidden_positions_by_hand():
    hidden = jnp.asarray([[1, 0, 1, 0, 0, 1, 1, 0, 1]], bool)
    seen = hide(hidden, jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 0]]), jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 0]]))
    assert seen.segments.tolist() == [[0, 1, 0, 1, 2, 0, 0, 2, 0]]
    assert seen.positions.tolist() == [[-1, 0, 0, 1, 0, 0, 0, 1, 0]]
    assert seen.last.tolist() == [[0, 1, 1, 3, 4, 4, 4, 7, 8]], "none of another segment, and none of padding"
    axes = hide(hidden, jnp.broadcast_to(jnp.arange(9)[None, :, None], (1, 9, 3)), jnp.ones((1, 9), jnp.int32))
    assert axes.positions[0, :, 1].tolist() == [-1, 0, 0, 1, 2, 2, 2, 3, 3]
    counted = hide(hidden, None, jnp.ones((1, 9), jnp.int32))
    assert counted.positions.tolist() == axes.positions[..., 0].tolist()


# ---- generation


def prompts() -> dict[str, np.ndarray]:
    """Returns two prompts: one with hidden positions inside, and one that ends with them."""
    one, two = row(seed=2), row(seed=3)
    tokens = np.concatenate([one["tokens"][:, :8], two["tokens"][:, :8]])
    index = np.array([[-1, 0, 1, 2, 3, -1, -1, -1], [-1, -1, 4, 5, 6, 7, 0, 0]], np.int32)
    segments = np.array([[1] * 8, [1] * 6 + [0] * 2], np.int32)
    positions = np.tile(np.arange(8, dtype=np.int32), (2, 1)) * segments
    mask = np.array([[1, 0, 1, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0]], bool)
    media = np.concatenate([one["media"], two["media"]])
    return dict(tokens=tokens, segments=segments, positions=positions, media_index=index, media=media, media_mask=mask)


def shorter(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the prompts without hidden positions: six and four tokens."""
    rows = [{name: array[i : i + 1] for name, array in batch.items()} for i in range(2)]
    short = [compact(each, kept) for each, kept in zip(rows, ([0, 1, 3, 5, 6, 7], [0, 1, 2, 3, 6, 7]), strict=True)]
    return {name: np.concatenate([each[name] for each in short]) for name in short[0]}


@pytest.fixture(scope="module")
def decoder():
    return Program(composed(LLAMA).make(), random_params(composed(LLAMA))["params"])


@pytest.fixture(scope="module")
def encoder_decoder():
    return Program(composed(T5).make(), random_params(composed(T5))["params"])


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_greedy_tokens_and_beams(kind, request):
    """Compares both with those of the shorter prompts."""
    program = request.getfixturevalue(kind)
    full, short = prompts(), shorter(prompts())
    zeros = np.zeros(2, np.int32)
    asked = Asked(zeros, zeros, np.full(2, 6, np.int32), np.full((2, 1), -1, np.int32))
    found = []
    for batch in (full, short):
        sizes = dict(room=20, new=6, sampling=Sampling())
        state, rows = program.start(program.params, batch, asked, rows=2, **sizes)
        _, rows, _ = program.advance(program.params, state, rows, np.int32(6), np.int32(0), sampling=Sampling())
        beams = dict(room=20, new=6, beams=3, num_stops=1, repetition_penalty=1.0)
        rule = Rule(np.float32(1), np.bool_(False))
        best = program.search(program.params, batch, asked.limits, asked.stops, rule, **beams)
        found.append((rows.tokens, best[0], best[2]))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert (found[0][0][0] != found[0][0][1]).any()


def test_greedy_tokens_of_a_loop_without_cache(decoder):
    batch, program = prompts(), decoder
    params = random_params(composed(LLAMA))
    run = jax.jit(lambda batch, at: composed(LLAMA).make().apply(params, batch, logits_at=at).logits[:, 0])
    longer = {
        name: np.pad(batch[name], ((0, 0), (0, 5)), constant_values=fill)
        for name, fill in (("tokens", 0), ("segments", 0), ("positions", 0), ("media_index", -1))
    } | {name: batch[name] for name in ("media", "media_mask")}
    lengths, expected = np.array([8, 6]), []
    for _ in range(5):
        token = np.asarray(run(longer, lengths[:, None] - 1)).argmax(axis=-1)
        expected.append(token)
        for i, length in enumerate(lengths):
            longer["tokens"][i, length], longer["media_index"][i, length] = token[i], -1
            longer["segments"][i, length], longer["positions"][i, length] = 1, length
        lengths = lengths + 1
    zeros = np.zeros(2, np.int32)
    asked = Asked(zeros, zeros, np.full(2, 5, np.int32), np.full((2, 1), -1, np.int32))
    how = dict(room=16, new=5, sampling=Sampling())
    state, rows = program.start(program.params, batch, asked, rows=2, **how)
    _, rows, _ = program.advance(program.params, state, rows, np.int32(5), np.int32(0), sampling=Sampling())
    np.testing.assert_array_equal(rows.tokens, np.stack(expected, axis=1))


def test_a_sliding_window_is_refused():
    window = replace(LLAMA, dialect=DecoderDialect(sliding_window=4))
    with pytest.raises(ConfigError, match="a sliding window after a projector that hides positions"):
        composed(window)
