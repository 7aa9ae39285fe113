"""ChatGLM-6B (the first) against numbers recorded from its own code, see tests/goldens/chatglm6b_v1.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import chatglm_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny_language import answers, language

import mllm_jax
from mllm_jax.checkpoints.layout import named, parameter_view
from mllm_jax.generation.options import Options
from mllm_jax.layers.compute import Compute
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.llms.chatglm import (
    FAR,
    ChatGLMBlock,
    find_marks,
    from_hf_config,
    rotary_angles_2d,
    table,
    two_positions,
)

GOLDEN = Path(__file__).parents[1] / "goldens" / "chatglm6b_v1"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def hf_config():
    config = json.loads(GOLDEN.with_suffix(".json").read_text("utf-8"))["config"]
    return config | {"architectures": ["ChatGLMModel"], "position_encoding_2d": True}


@pytest.fixture(scope="module")
def weights(golden):
    return {name.removeprefix("weights/"): array for name, array in golden.items() if name.startswith("weights/")}


@pytest.fixture(scope="module")
def folder(weights, hf_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("chatglm")
    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(hf_config), "utf-8")
    return path


@pytest.fixture(scope="module")
def model(folder):
    """Returns (module, {"params": parameters}), read by the library."""
    module, params = mllm_jax.from_pretrained(folder)
    return module, {"params": params}


@pytest.fixture(scope="module")
def tokens(golden):
    return golden["inputs/input_ids"].astype(np.int32)


def test_positions_and_mask(model, tokens, golden):
    c = model[0].config
    places = np.broadcast_to(np.arange(14), tokens.shape)
    positions = np.asarray(two_positions(places, find_marks(c, tokens, places, None)))
    np.testing.assert_array_equal(positions, golden["outputs/position_ids"])
    seen = (positions[:, 1] == 0)[:, None, :] | np.tri(14, dtype=bool)
    np.testing.assert_array_equal(~seen, golden["outputs/attention_mask_True_is_masked"][:, 0])


def test_frequencies_are_rounded_to_half_precision(model, weights):
    one = jnp.ones((1, 2, 1), jnp.int32)
    cos, sin = rotary_angles_2d(one, model[0].config.head_dim)
    frequencies = weights["transformer.layers.0.attention.rotary_emb.inv_freq"]
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 0, 0], frequencies, rtol=1e-6)
    exact = 1 / 10_000 ** (np.arange(0, 6, 2) / 6)
    assert np.abs(frequencies / exact - 1).max() > 1e-4, "the golden cannot show a difference"


def test_logits(model, tokens, golden, assert_close):
    module, variables = model
    assert_close(module.apply(variables, tokens), golden["outputs/logits"], 1e-5)


def test_every_layer(model, tokens, golden, assert_close):
    """Compares the stream before each layer, and after the last norm, with the recorded one."""
    module, variables = model
    c, params = module.config, variables["params"]
    positions = jnp.asarray(golden["outputs/position_ids"])
    bias = jnp.where(jnp.asarray(golden["outputs/attention_mask_True_is_masked"]), -1e30, 0.0)
    angles = rotary_angles_2d(positions, c.head_dim)
    x = module.apply(variables, tokens, method="embed")
    for i in range(c.num_layers):
        assert_close(x, golden[f"outputs/hidden{i}"], 1e-5, f"before layer {i}")
        layer = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])}
        x, _ = ChatGLMBlock(c).apply(layer, x, None, None, angles, bias, None)
    x = LayerNorm(c.norm_eps).apply({"params": params["final_norm"]}, x)
    assert_close(x, golden["outputs/hidden3"], 1e-5, "after the last norm")


def test_speech_in_the_place_of_the_first_tokens(model, tokens, golden, assert_close):
    module, variables = model
    embedded = module.apply(variables, tokens, method="embed").at[:, :3].set(golden["inputs/input_speech"])
    logits = module.apply(variables, tokens, embeddings=embedded)
    assert_close(logits, golden["outputs/with_input_speech/logits"], 1e-5)


def test_loss_and_gradients(model, tokens, golden, assert_close):
    module, variables = model
    labels = golden["inputs/labels"][:, 1:]

    def loss(variables):
        logs = jax.nn.log_softmax(module.apply(variables, tokens)[:, :-1])
        each = jnp.take_along_axis(logs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -(each * (labels >= 0)).sum() / (labels >= 0).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(variables)
    assert_close(value, golden["outputs/loss"], 1e-5, "loss")
    grads, checked = flatten_dict(grads["params"], sep="/"), set()
    for line in table(module.config).weights:
        for layer in range(module.config.num_layers):
            name = f"grads/{named(line.name, layer)}"
            if name in golden:
                ours = grads[line.path][layer] if "{layer}" in line.name else grads[line.path]
                assert_close(ours, parameter_view(line, golden[name]), 1e-3, f"{name}, {line.path}")
                checked.add(name)
    assert checked == {name for name in golden if name.startswith("grads/")}


def test_prefill_and_steps(model, tokens, golden, assert_close):
    """Reads the first row's prompt, then one token at a time, with positions from the cache."""
    module, variables = model
    logits, cache = module.apply(variables, tokens[:1, :8], cache=module.config.make_cache(1, 12))
    assert_close(logits, golden["outputs/incr/prefill_logits"], 1e-5, "prefill")
    keys = np.moveaxis(golden["outputs/incr/past_key_layer0"], 0, 1)
    assert_close(cache.keys[0, :, :8], keys, 1e-5, "keys")
    assert cache.marks.tolist() == [[7, 6, FAR]]
    step = jax.jit(lambda *args: module.apply(variables, args[0], cache=args[1]))
    for i in range(2):
        logits, cache = step(tokens[:1, 8 + i : 9 + i], cache)
        assert_close(logits[:, 0], golden["outputs/incr/step_logits"][:, i], 1e-5, f"step {i}")
    assert cache.blocks[0, 8] == golden["outputs/incr/step_position_ids"][0, 1, 0]


def test_packed_rows_equal_each_text_alone(model, golden, tokens, assert_close):
    """Checks two texts and padding in a row: gMASK and bos count inside their own text."""
    module, variables = model
    lengths = (9, 13)
    row = np.concatenate([[7, 4], tokens[1, :9], tokens[2, :13], [4]])[None]
    segments = np.repeat([0, 1, 2, 0], [2, *lengths, 1])[None]
    ours = np.asarray(module.apply(variables, row, None, segments))
    assert_close(ours[0, 2:11], golden["outputs/logits"][1, :9], 1e-5, "first")
    assert_close(ours[0, 11:24], golden["outputs/logits"][2, :13], 1e-5, "second")
    places = np.concatenate([[0, 0], np.arange(9), np.arange(13), [0]])[None]
    np.testing.assert_array_equal(module.apply(variables, row, places, segments)[0, 2:24], ours[0, 2:24])


def test_bfloat16(model, tokens, golden):
    module, variables = model
    half = replace(module.config, compute=Compute(dtype="bfloat16")).make()
    ours = np.asarray(half.apply(jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables), tokens))
    theirs = golden["outputs/logits"]
    assert np.linalg.norm(ours - theirs) <= 2e-2 * np.linalg.norm(theirs)


def test_written_as_it_was_read(model, folder, weights, hf_config, tmp_path):
    module, variables = model
    mllm_jax.save_pretrained(module, variables["params"], tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    trained = {name: array for name, array in weights.items() if not name.endswith("inv_freq")}
    assert written.keys() == trained.keys()
    for name, array in trained.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    config = json.loads((tmp_path / "ours" / "config.json").read_text("utf-8"))
    assert from_hf_config(config) == from_hf_config(hf_config)
    assert {name: config[name] for name in hf_config if name != "use_cache"} == {
        name: value for name, value in hf_config.items() if name != "use_cache"
    }


# ---- configs that the golden lacks, against NumPy, which reproduces the golden's logits first

SIZES = dict(hidden_size=24, num_layers=2, num_attention_heads=3, inner_hidden_size=40, vocab_size=61)
SIZES |= dict(layernorm_epsilon=1e-3, bos_token_id=57, gmask_token_id=58, mask_token_id=59, pad_token_id=3)
CASES = {
    "gMASK": SIZES,
    "MASK": SIZES | dict(num_layers=3, hidden_size=32, num_attention_heads=2),
    "no mark": SIZES | dict(num_attention_heads=1, layernorm_epsilon=1e-5, inner_hidden_size=17),
    "other ids": SIZES | dict(num_attention_heads=6, bos_token_id=5, gmask_token_id=9, mask_token_id=8),
}


def text_of(config: dict, case: str, before: int, after: int, seed: int) -> np.ndarray:
    """Returns a context with its mark, bos, and part of an answer; the context has one token after the mark."""
    words = [i for i in range(10, 57)]
    rng = np.random.default_rng(seed)
    mark = {"MASK": [config["mask_token_id"]], "no mark": []}.get(case, [config["gmask_token_id"]])
    context = [*rng.choice(words, before), *mark, *rng.choice(words, 1)]
    return np.array([*context, config["bos_token_id"], *rng.choice(words, after)])


def test_numpy_gives_the_stored_logits(golden, weights, hf_config, tokens, assert_close):
    for row, text in enumerate(tokens):
        assert_close(reference.logits(hf_config, weights, text), golden["outputs/logits"][row], 1e-5, f"row {row}")


@pytest.fixture(scope="module", params=CASES)
def other(request, hf_config, tmp_path_factory):
    """Returns (case, config, weights, folder)."""
    config = hf_config | CASES[request.param] | dict(eos_token_id=4)
    made, path = reference.random_weights(config, seed=3), tmp_path_factory.mktemp("other")
    save_file(made, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return request.param, config, made, path


def test_more_configs_padded_packed_generated_and_written(other, assert_close, tmp_path):
    case, config, weights, folder = other
    module, params = mllm_jax.from_pretrained(folder)
    texts = [text_of(config, case, 6, 5, 0), text_of(config, case, 3, 2, 1)]
    alone = [reference.logits(config, weights, text) for text in texts]
    rows, segments = np.full((2, 26), 3), np.zeros((2, 26), np.int32)
    ends = np.cumsum([len(text) for text in texts])
    rows[0, : ends[1]], segments[0, : ends[1]] = np.concatenate(texts), np.repeat([1, 2], [len(t) for t in texts])
    rows[1, : len(texts[1])], segments[1, : len(texts[1])] = texts[1], 1
    ours = np.asarray(jax.jit(module.apply)({"params": params}, rows, None, segments))
    assert_close(ours[0, : ends[0]], alone[0], 1e-4, "packed, first")
    assert_close(ours[0, ends[0] : ends[1]], alone[1], 1e-4, "packed, second")
    assert_close(ours[1, : len(texts[1])], alone[1], 1e-4, "padded")

    half = replace(module.config, compute=Compute(dtype="bfloat16")).make()
    rough = half.apply({"params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)}, texts[0][None])[0]
    assert np.linalg.norm(rough - alone[0]) <= 2e-2 * np.linalg.norm(alone[0]), "bfloat16"

    found = answers(language(module, params), [text.tolist() for text in texts], Options(32, ignore_eos=True))
    said = [reference.greedy(config, weights, text, 32) for text in texts]
    assert [list(answer.tokens) for answer in found] == said
    assert len({token for tokens in said for token in tokens}) > 3

    mllm_jax.save_pretrained(module, params, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all((written[name] == array).all() for name, array in weights.items())
