"""A C-Former in a composed model: its golden, the bound of its media tokens, its target lengths and its objective."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

from mllm_jax import NextToken, QuantityGuided, Stage
from mllm_jax.data.message import Audio, Message, Text
from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.cformer import CFormerConfig
from mllm_jax.encoders.hubert import HubertConfig
from mllm_jax.encoders.whisper import WhisperEncoderConfig
from mllm_jax.errors import ConfigError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.cformer_projector import CFormerProjectorConfig
from mllm_jax.models.composed_layout import composed_layout
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.processor import Processor
from mllm_jax.models.registry import from_pretrained
from mllm_jax.models.sound_targets import answer_lengths, sound_targets
from mllm_jax.projectors.stacked import StackedProjectorConfig

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "training"))
from toy_data import quick_compilation, tokenizer  # noqa: E402

RATE = 16_000
LLM = DecoderConfig(320, 28, num_layers=2, num_heads=2, num_kv_heads=1, mlp_size=24)
PROJECTOR = CFormerProjectorConfig(cif_size=8, hidden_size=8, num_layers=1, num_heads=2, mlp_size=12, max_length=64)
ENCODERS = {
    "hubert": HubertConfig(16, 1, 2, 24, conv_channels=(8,) * 7, position_kernel=4, position_groups=2),
    "whisper": WhisperEncoderConfig(8, 16, num_layers=1, num_heads=2, mlp_size=32, max_source_positions=100),
}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


def composed(encoder=ENCODERS["hubert"], seconds: float = 1.0, **changes) -> MultimodalConfig:
    return MultimodalConfig({"audio": Branch(encoder, replace(PROJECTOR, **changes), seconds=seconds)}, LLM)


def random_params(config: MultimodalConfig, bias: float | None = None):
    """Returns random parameters; `bias` is that of the map to a vector's weight."""
    module = config.make()
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), config.batch_spec().empty(), method="touch"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(abstract))
    if bias is not None:
        params["params"]["projector_audio"]["cif"]["weight"]["bias"][:] = bias
    return params


def ask(seconds: float, seed: int = 0) -> tuple[Message, ...]:
    sound = np.random.default_rng(seed).normal(0, 0.2, round(seconds * RATE)).astype(np.float32)
    return (Message("user", (Audio(sound, rate=RATE), Text("what"))),)


def processor(config: MultimodalConfig) -> Processor:
    return Processor(config, tokenizer(), composed_layout(config, tokenizer()))


def encode(config, params, batch):
    return jax.jit(lambda batch: config.make().apply(params, batch, method="encode_media"))(batch)


# ---- the golden, through the projector and a decoder


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Returns a composed model with the golden's C-Former, and its arrays.

    The recorded vectors have been fired already: with a weight of 1, each vector of the encoder fires itself.
    """
    arrays = np.load(TESTS / "goldens" / "xllm_speech_interface.npz")
    sizes = json.loads((TESTS / "goldens" / "xllm_speech_interface.json").read_text())["config"]
    stored = {name.removeprefix("weights/"): arrays[name] for name in arrays.files if name.startswith("weights/")}
    width = sizes["cif_dim"]
    stored |= {"weight_proj.weight": np.zeros((1, width), np.float32), "weight_proj.bias": np.full(1, 50, np.float32)}
    bert = dict(
        hidden_size=sizes["bert_hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["inter"],
        max_position_embeddings=sizes["max_pos"],
    )
    config = dict(
        architectures=["CFormer"],
        encoder_embed_dim=width,
        cif_embedding_dim=width,
        produce_weight_type="linear",
        cif_threshold=1.0,
        apply_scaling=True,
        apply_tail_handling=True,
        tail_handling_firing_threshold=0.5,
        llm_hidden_size=sizes["llm_hidden"],
        speech_adaptor_type="bert",
        bert_config=bert,
    )
    folder = tmp_path_factory.mktemp("interface")
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    module, params = from_pretrained(folder)
    fields = {f.name: getattr(module.config, f.name) for f in dataclasses.fields(CFormerConfig) if f.name != "family"}
    encoder = replace(ENCODERS["hubert"], hidden_size=width, position_groups=1)
    llm = replace(LLM, hidden_size=sizes["llm_hidden"])
    model = MultimodalConfig({"audio": Branch(encoder, CFormerProjectorConfig(**fields, factor=1), seconds=0.5)}, llm)
    drawn = random_params(model)["params"]
    assert jax.tree.map(np.shape, drawn["projector_audio"]) == jax.tree.map(np.shape, params)
    return model, {"params": drawn | {"projector_audio": params}}, arrays


def test_the_interface_of_x_llm_in_a_composed_model(golden):
    """Compares media tokens with those recorded, and logits with the LLM's alone on the recorded tokens."""
    model, params, arrays = golden
    vectors, mask = arrays["inputs/speech_input"], arrays["outputs/attention_mask"]
    rows, size = mask.shape
    batch = {"audio_features": vectors[:, None], "audio_masks": mask[:, None]}
    media = encode(model, params, batch)
    np.testing.assert_array_equal(media.mask, mask)
    expected = arrays["outputs/speech_embeds"]
    assert np.abs(media.tokens - expected).max() <= 1e-5 * np.abs(expected).max()

    tokens = np.random.default_rng(0).integers(0, 320, (rows, size + 5)).astype(np.int32)
    index = np.full_like(tokens, -1)
    index[:, 2 : 2 + size] = np.arange(size)
    ones = np.ones_like(tokens)
    text = dict(tokens=tokens, segments=ones, positions=np.cumsum(ones, axis=1) - 1, media_index=index)
    logits = jax.jit(lambda batch: model.make().apply(params, batch).logits)(batch | text)
    llm = model.llm.make()
    table = params["params"]["llm"]["token_embedding"]["embedding"]
    run = jax.jit(lambda x: llm.apply({"params": params["params"]["llm"]}, None, embeddings=x))
    for b, length in enumerate(mask.sum(axis=1)):
        words = table[tokens[b]]
        alone = run(np.concatenate([words[:2], expected[b, :length], words[2 + size :]])[None])[0]
        real = [0, 1, *range(2, 2 + length), *range(2 + size, size + 5)]
        np.testing.assert_allclose(logits[b, real], alone, atol=1e-4)


# ---- the bound, and what fires


@pytest.mark.parametrize("kind", ENCODERS)
def test_as_many_positions_as_tokens_at_most(kind):
    """Checks that the layout and the projector count the same bound, for sounds of any length."""
    config = composed(ENCODERS[kind], factor=4)
    params, lengths = random_params(config, bias=50.0), (0.11, 0.5, 0.98, 1.0)
    ours = processor(config)
    batch = ours([ask(seconds) for seconds in lengths], slots={"audio": 1})
    media = encode(config, params, batch)
    positions = (batch["media_index"] >= 0).sum(axis=1)
    assert media.mask.sum(axis=1).tolist() == positions.tolist() == media.heard[0].count[:, 0].tolist()
    assert len(set(positions)) >= 3 and positions.max() == config.branch("audio").tokens
    assert (media.heard[0].fires[:, 0] > 3 * positions - 3).all(), "every vector fires; three of four are cut"
    few = encode(composed(ENCODERS[kind], factor=4, max_fires=3), params, batch)
    assert few.mask.sum(axis=1).tolist() == np.minimum(positions, 3).tolist() and few.mask.shape == (4, 3)


def test_the_tail_of_a_full_slot_fires():
    """Checks that a sound has the tail that it has in a longer slot."""
    config = composed(factor=1, tail_threshold=0.1)
    params = random_params(config)
    features = np.random.default_rng(0).normal(size=(1, 1, 20, 16)).astype(np.float32)
    longer = np.pad(features, ((0, 0), (0, 0), (0, 9), (0, 0)))
    masks = (np.arange(29) < 20).astype(np.int32)[None, None]
    one = encode(config, params, {"audio_features": features})
    two = encode(config, params, {"audio_features": longer, "audio_masks": masks})
    count = int(one.mask.sum())
    assert count == two.mask.sum() == one.heard[0].fires[0, 0]
    np.testing.assert_allclose(one.tokens[0, :count], two.tokens[0, :count], atol=1e-5)
    alone = encode(composed(factor=1, fire_tail=False), params, {"audio_features": features})
    assert count == alone.mask.sum() + 1, "the last token of these weights is the tail"


def test_a_sound_that_fires_nothing():
    """Checks that the row is read as if the sound were not there, also where the sound ends the prompt."""
    config = composed()
    params = random_params(config, bias=-50.0)
    batch = processor(config)([ask(0.6)])
    run = jax.jit(lambda batch: config.make().apply(params, batch).logits)
    here = batch["media_index"][0] >= 0
    assert not encode(config, params, batch).mask.any() and here.any()
    text = {name: batch[name][:, ~here] for name in ("tokens", "segments", "media_index")}
    text["positions"] = np.arange((~here).sum(), dtype=np.int32)[None]
    found, alone = run(batch), run(text)
    np.testing.assert_allclose(found[0, ~here], alone[0], atol=2e-5)
    before = int(np.flatnonzero(here)[0]) - 1
    np.testing.assert_array_equal(found[0, here], np.broadcast_to(found[0, before], found[0, here].shape))


def test_packed_rows_equal_single_rows():
    config = composed(factor=4)
    params, ours = random_params(config, bias=-2.0), processor(config)
    one, two = (ours([ask(seconds, seed)]) for seed, seconds in ((1, 0.7), (2, 1.0)))
    size, first = one["tokens"].shape[1], config.branch("audio").tokens
    two = two | {"media_index": np.where(two["media_index"] < 0, -1, two["media_index"] + first)}
    two |= {"segments": 2 * two["segments"]}
    names = [name for name in one if name in two]
    both = {name: np.concatenate([one[name], two[name]], axis=1) for name in names}
    run = jax.jit(lambda batch: config.make().apply(params, batch).logits)
    media = encode(config, params, both)
    hidden = ~np.asarray(media.mask)[0][both["media_index"][0][both["media_index"][0] >= 0]]
    assert hidden.any() and media.mask.any()
    packed = run(both)
    np.testing.assert_allclose(packed[:, :size], run(one), atol=2e-5)
    single = run(two | {"media_index": np.where(two["media_index"] < 0, -1, two["media_index"] - first)})
    np.testing.assert_allclose(packed[:, size:], single, atol=2e-5)


# ---- target lengths and the objective


def test_target_lengths_by_hand():
    """Checks a text with a sound; one with a whole and a quarter of one; one without an answer; and padding."""
    segments = jnp.asarray([[1] * 6 + [2] * 9 + [3] * 3 + [0]])
    index = jnp.asarray([[5, 6, -1, -1, -1, -1, 9, 10, 11, 12, 13, -1, -1, -1, -1, 17, 18, -1, -1]])
    weights = jnp.asarray([[0, 0, 0, 1, 0.5, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]])
    batch = dict(segments=segments, media_index=index, loss_weights=weights)
    lengths = answer_lengths(batch, 1)
    assert lengths.tolist() == [[2] * 6 + [3] * 9 + [0] * 4]
    assert answer_lengths(batch, 0)[0, :7].tolist() == [3] * 6 + [4]
    assert sound_targets(batch, 5, 5, 4) is None
    targets = sound_targets(batch | {"answer_lengths": lengths}, 5, 5, 4)
    np.testing.assert_allclose(targets, [[2, 3 * 4 / 5, 3 / 5, 0, 0]], rtol=1e-6)
    decoder = dict(decoder_segments=jnp.asarray([[1, 1, 2, 0]]), loss_weights=jnp.asarray([[1, 1, 1, 0]]))
    read = answer_lengths(batch | decoder | {"decoder_tokens": jnp.zeros((1, 4))}, 0)
    assert read[0, [0, 6, 15, 18]].tolist() == [2, 1, 0, 0]


def trained(config, bias: float = 0.3):
    """Returns parameters, and a batch of two sounds, encoded already, with answers of five and of three tokens."""
    params = random_params(config, bias)
    batch = processor(config)([ask(0.9), ask(0.5, 1)], slots={"audio": 2})
    encoder, steps = config.branch("audio").encoder, batch.pop("audio_sounds").shape[-1]
    lengths, size = encoder.frames(batch["audio_masks"].sum(axis=-1)), encoder.frames(steps)
    batch["audio_features"] = np.random.default_rng(5).normal(size=(2, 2, size, 16)).astype(np.float32)
    batch["audio_masks"] = (np.arange(size) < lengths[..., None]).astype(np.int32)
    batch["loss_weights"] = np.zeros(batch["tokens"].shape, np.float32)
    for i, answer in enumerate((5, 3)):
        last = int((batch["segments"][i] > 0).sum())
        batch["loss_weights"][i, last - answer : last] = 1
    return params, batch


def loss_of(objective, config):
    def apply(params, batch, method=None):
        return config.make().apply(params, batch, method=method)

    return lambda params, batch: objective.loss(apply, params, batch, jax.random.key(0))


def test_the_quantity_loss_of_a_batch():
    """Checks that both sounds fire what their answers ask for, and the loss against the sums of all weights."""
    config, objective = composed(factor=2), QuantityGuided(quantity=0.5)
    params, batch = trained(config)
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss_of(objective, config), has_aux=True))(params, batch)
    media = encode(config, params, batch)  # unscaled
    sums = np.asarray(media.heard[0].quantity)[:, 0]
    assert abs(metrics["loss_quantity"] - np.abs(sums - [4, 2]).mean()) < 1e-4
    assert abs(value - metrics["loss_language"] - 0.5 * metrics["loss_quantity"]) < 1e-5
    assert metrics["fired"] <= 3 < media.mask.sum() / 2 and metrics["fired"] >= 2 and metrics["cut"] == 0
    assert metrics["weight"] == 8
    leaves = jax.tree.leaves(grads)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert np.abs(grads["params"]["projector_audio"]["cif"]["weight"]["bias"]).max() > 0
    free = jax.jit(loss_of(NextToken(), config))(params, batch)[0]
    unscaled = jax.jit(loss_of(objective, composed(factor=2, scale=False, fire_tail=False)))(params, batch)[1]
    plain = jax.jit(loss_of(NextToken(), composed(factor=2, fire_tail=False)))(params, batch)[0]
    assert abs(unscaled["loss_language"] - plain) < 1e-5 and abs(free - metrics["loss_language"]) > 1e-4


def test_the_share_that_the_bound_cuts():
    config = composed(max_fires=2)
    params, batch = trained(config)
    metrics = jax.jit(loss_of(QuantityGuided(ends=0), config))(params, batch)[1]
    assert metrics["fired"] == 2 and metrics["cut"] + 1e-6 >= 1 - 4 / 6 and metrics["cut"] <= 1 - 4 / 8 + 1e-6


def test_a_row_without_sounds_has_no_quantity_loss():
    config = composed()
    params, batch = trained(config)
    text = {name: array for name, array in batch.items() if not name.startswith("audio")}
    text["media_index"] = np.full_like(text["media_index"], -1)
    value, metrics = jax.jit(loss_of(QuantityGuided(), config))(params, text)
    assert metrics["loss_quantity"] == 0 and value == metrics["loss_language"] > 0


def test_models_that_do_not_fire_are_refused():
    plain = MultimodalConfig({"audio": Branch(ENCODERS["hubert"], StackedProjectorConfig(), seconds=1.0)}, LLM)
    stage = Stage("hear", QuantityGuided(), ("projector_audio/*",), Mixture((), 2, 48, {}), 2)
    with pytest.raises(ConfigError, match="stage 'hear': QuantityGuided for a model whose projectors do not fire"):
        stage.objective.check(stage, plain)
    stage.objective.check(stage, composed())


def test_bounds_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="factor 0"):
        replace(PROJECTOR, factor=0)
    with pytest.raises(ConfigError, match="up to 149 media tokens of a slot"):
        composed(seconds=3.0, factor=1)
    assert composed(seconds=3.0, factor=1, max_fires=60).branch("audio").tokens == 60


def test_widths_come_from_the_neighbours():
    made = composed().branch("audio").projector
    assert (made.input_size, made.output_size) == (16, 28) and PROJECTOR.input_size is None
