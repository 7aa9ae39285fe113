"""BEATs against stored outputs of its own code, see tests/goldens/beats.json, and against its formulas in torch.

Sizes are read from the goldens: others, of other variants, can be put in their place.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beats_reference import Reference, fbank, normalised_fbank, random_weights, shapes
from safetensors.numpy import load_file, save_file

from mllm_jax.encoders.beats import FAMILIES, MEAN, SCALE, STD, from_hf_config
from mllm_jax.errors import CheckpointError, ConfigError, DataError
from mllm_jax.layers import fbank as ours
from mllm_jax.models.registry import abstract_params, from_pretrained, save_pretrained

GOLDENS = ("beats", "beats_finetuned")
NAMED = dict(architectures=["BEATs"], model_type="beats")
BASE = dict(
    input_patch_size=16,
    embed_dim=512,
    conv_bias=False,
    encoder_layers=12,
    encoder_embed_dim=768,
    encoder_ffn_embed_dim=3072,
    encoder_attention_heads=12,
    activation_fn="gelu",
    layer_norm_first=False,
    deep_norm=True,
    conv_pos=128,
    conv_pos_groups=16,
    relative_position_embedding=True,
    num_buckets=320,
    max_distance=800,
    gru_rel_pos=True,
    finetuned_model=False,
)
TINY = dict(embed_dim=10, encoder_layers=2, encoder_embed_dim=24, encoder_ffn_embed_dim=20, encoder_attention_heads=3)
TINY |= dict(conv_pos=7, conv_pos_groups=3, num_buckets=12, max_distance=9)
VARIANTS = {
    "norms first, gated MLP, no gate of the bias": dict(
        layer_norm_first=True, deep_norm=False, activation_fn="glu", gru_rel_pos=False
    ),
    "norms after, no deep-norm, no bias, an even kernel": dict(
        deep_norm=False, relative_position_embedding=False, gru_rel_pos=False, conv_pos=8, activation_fn="relu"
    ),
    "one width, biases of the patches, gated MLP": dict(
        embed_dim=24, conv_bias=True, activation_fn="glu", finetuned_model=True, predictor_class=5
    ),
    "norms first, large patches, classes": dict(
        input_patch_size=24,
        layer_norm_first=True,
        deep_norm=False,
        activation_fn="gelu_accurate",
        finetuned_model=True,
        predictor_class=3,
    ),
    "tanh, an odd number of buckets": dict(activation_fn="tanh", num_buckets=13, encoder_layers=3),
}


@pytest.fixture(scope="module", params=GOLDENS)
def golden(request):
    """Returns a golden's arrays, and its description."""
    path = Path(__file__).parents[1] / "goldens" / request.param
    with np.load(path.with_suffix(".npz")) as arrays:
        return dict(arrays), json.loads(path.with_suffix(".json").read_text("utf-8"))


def weights_of(golden):
    return {name.removeprefix("weights/"): x for name, x in golden[0].items() if name.startswith("weights/")}


def write(folder, config, weights):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | NAMED))
    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def opened(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    return from_pretrained(write(folder / "beats", golden[1]["config"], weights_of(golden)))


def every_output(module, params, waveform, mask):
    """Returns the outputs by the goldens' names."""

    @jax.jit
    def run(params, waveform, mask):
        out, kept = module.apply(
            {"params": params}, waveform, mask, True, capture_intermediates=True, mutable="intermediates"
        )
        kept = {name: kept["intermediates"][name]["__call__"] for name in ("patch_norm", "relative_bias")
                if name in kept["intermediates"]}  # fmt: skip
        probabilities = None
        if module.config.num_classes:
            probabilities = module.apply({"params": params}, waveform, mask, method="classify")
        return out, kept, probabilities

    out, kept, probabilities = run(params, waveform, mask)
    found = dict(features=out.last_hidden_state, patch_layer_norm=kept["patch_norm"][0])
    found |= {f"layer{i}": state for i, state in enumerate(out.hidden_states[1:])}
    if "relative_bias" in kept:
        found["pos_bias_layer0"] = kept["relative_bias"][0][0]
    if out.mask is not None:
        found["padding_mask_out"] = ~out.mask
    if probabilities is not None:
        found["probs"] = probabilities
    return found


def test_every_stored_output(golden, opened, assert_close):
    arrays, _ = golden
    module, params = opened
    waveform = arrays["inputs/waveform"]
    found = {"fbank_normalised": jax.jit(lambda w: (ours.fbank(w * SCALE) - MEAN) / (2 * STD))(waveform)}
    for case, mask in (("nomask", None), ("mask", 1 - arrays["inputs/padding_mask"].astype(np.int32))):
        outputs = every_output(module, params, waveform, mask)
        found |= {f"{case}/{name}": array for name, array in outputs.items()}
        found["pos_bias_layer0"] = outputs.get("pos_bias_layer0")
    stored = {name.removeprefix("outputs/"): x for name, x in arrays.items() if name.startswith("outputs/")}
    assert stored
    for name, array in stored.items():
        if array.dtype == bool:
            assert array.any() and not array.all()
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        else:
            assert_close(found[name], array, 5e-5 if "fbank" in name else 2e-5, name)


def test_the_reference_in_torch_is_the_original(golden, assert_close):
    """Checks the reference with which the variants below are compared."""
    arrays, described = golden
    reference = Reference(weights_of(golden), described["config"])
    waveform = arrays["inputs/waveform"]
    for case, padding in (("nomask", None), ("mask", arrays["inputs/padding_mask"])):
        found = reference(normalised_fbank(waveform), padding)
        stored = {name: x for name, x in arrays.items() if name.startswith(f"outputs/{case}/")}
        assert stored
        for name, array in stored.items():
            assert_close(found[name.rpartition("/")[2]], array, 2e-5, name)
    names = {name: tuple(arrays[f"weights/{name}"].shape) for name in described["param_names"]}
    assert shapes(described["config"]) == names


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_with_rows_of_unequal_lengths(variant, assert_close, tmp_path):
    config = BASE | TINY | VARIANTS[variant]
    weights = random_weights(config)
    module, params = from_pretrained(write(tmp_path / "theirs", config, weights))
    rng = np.random.default_rng(1)
    lengths, samples = (9_000, 5_137, 2_000), 9_000
    padding = np.arange(samples) >= np.array(lengths)[:, None]
    waveform = np.where(padding, 0, rng.normal(0, 0.1, padding.shape)).astype(np.float32)
    spectrum = normalised_fbank(waveform)
    for mask in (None, padding):
        theirs = Reference(weights, config)(spectrum, mask)
        found = every_output(module, params, waveform, None if mask is None else ~mask)
        for name, array in theirs.items():
            assert_close(found[name], array, 5e-5, f"{name}, {'no' if mask is None else 'with'} mask")
    save_pretrained(module, params, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all((written[name] == weights[name]).all() for name in weights)
    assert from_pretrained(tmp_path / "ours")[0] == module


def test_a_folder_written_again(golden, opened, tmp_path):
    """Checks that a tensor that the original stores under every layer is read from the first and written once."""
    _, described = golden
    weights, names = weights_of(golden), described["param_names"]
    save_pretrained(*opened, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert sorted(written) == sorted(names)
    for name in names:
        np.testing.assert_array_equal(written[name], weights[name], err_msg=name)
    config = json.loads((tmp_path / "ours" / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["BEATs"] and config["model_type"] == "beats"
    assert {name: config[name] for name in described["config"]} == described["config"]
    module, params = from_pretrained(tmp_path / "ours")
    assert module == opened[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, opened[1]))

    newer = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    for old, new in newer.items():
        written[f"encoder.pos_conv.0.{new}"] = written.pop(f"encoder.pos_conv.0.{old}")
    again = from_pretrained(write(tmp_path / "newer", described["config"], written))[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


@pytest.mark.parametrize("classes", [0, 527])
def test_full_size_parameters(classes):
    config = BASE | dict(finetuned_model=bool(classes), predictor_class=classes or 527)
    read = from_hf_config(config | NAMED)
    assert read.num_classes == classes and (read.rate, read.feature_size) == (16_000, 768)
    assert read.inputs(30.0) == (480_000,) and read.frames(480_000) == 1_496
    found = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(read, FAMILIES[0])))
    layer = 4 * (768 * 768 + 768) + (64 * 8 + 8) + 12 + (2 * 768 * 3072 + 3072 + 768) + 4 * 768
    position = 768 * (768 // 16) * 128 + 128 + 768
    embedding = 512 * 16 * 16 + 2 * 512 + 512 * 768 + 768
    assert found == 12 * layer + 320 * 12 + position + 2 * 768 + embedding + (768 + 1) * classes
    assert found == sum(math.prod(shape) for shape in shapes(config).values())
    assert found == 90_311_792 + 769 * classes


# ---- masks


def small():
    """Returns a small model with random weights, and its parameters."""
    config = from_hf_config(BASE | TINY | dict(finetuned_model=True, predictor_class=4))
    abstract = abstract_params(config, FAMILIES[0])
    rng = np.random.default_rng(0)
    return config.make(), jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract)


def test_rows_of_a_batch_do_not_change_each_other(assert_close):
    module, params = small()
    waveform = np.random.default_rng(0).normal(0, 0.1, (3, 7_000)).astype(np.float32)
    mask = np.arange(7_000) < np.array([7_000, 4_000, 0])[:, None]
    run = jax.jit(lambda waveform, mask: module.apply({"params": params}, waveform, mask, method="run"))
    (found, classes), (other, _) = run(waveform, mask), run(np.roll(waveform, 1, 0), np.roll(mask, 1, 0))
    assert_close(found.last_hidden_state, np.roll(other.last_hidden_state, -1, 0), 1e-5)
    assert not found.mask[2].any() and classes.shape == (3, 4), "a row of padding"
    assert np.isfinite(found.last_hidden_state).all() and np.isfinite(classes).all()
    unmasked = jax.jit(module.apply)({"params": params}, waveform)
    assert unmasked.mask is None and unmasked.hidden_states is None
    assert_close(found.last_hidden_state[0], unmasked.last_hidden_state[0], 1e-5, "all valid")
    assert np.abs(found.last_hidden_state[1] - unmasked.last_hidden_state[1]).max() > 1e-3


def test_padding_has_no_effect_on_valid_vectors(assert_close):
    """Checks it where the reference has the property: at the end of the valid chunks, between two rows of patches."""
    module, params = small()
    config, samples = module.config, 7_000
    bands = 128 // config.patch_size
    valid = max(n for n in range(samples) if config.frames(n, samples) == bands)
    read = 400 + (config.patch_size - 1) * 160  # samples of the first row of patches
    waveform = np.random.default_rng(0).normal(0, 0.1, (2, samples)).astype(np.float32)
    waveform[1, read:] *= 100
    waveform[1, :read] = waveform[0, :read]
    run = jax.jit(lambda mask: module.apply({"params": params}, waveform, mask).last_hidden_state)
    states = run(np.broadcast_to(np.arange(samples) < valid, waveform.shape))
    assert_close(states[0, :bands], states[1, :bands], 1e-5)
    assert np.abs(states[0, bands:] - states[1, bands:]).max() < 1e-5, "padding is zero, whatever it was"
    whole = run(np.ones(waveform.shape, bool))
    assert np.abs(whole[0, :bands] - whole[1, :bands]).max() > 1e-3


@pytest.mark.parametrize("samples", [2_800, 5_200, 9_600, 16_001])
def test_numbers_of_vectors(samples):
    """Checks `frames` against the module: of whole rows, and of valid samples in a row."""
    module, params = small()
    lengths = np.unique(np.r_[0, 1, np.linspace(1, samples, 40).astype(int), samples])
    mask = np.arange(samples) < lengths[:, None]
    waveform = np.zeros(mask.shape, np.float32)
    found = jax.eval_shape(module.apply, {"params": params}, waveform).last_hidden_state.shape[1]
    assert module.config.frames(samples) == found and type(module.config.frames(samples)) is int
    mask = jax.jit(lambda mask: module.apply({"params": params}, waveform, mask).mask)(mask)
    counts = module.config.frames(lengths, samples)
    np.testing.assert_array_equal(mask.sum(axis=1), counts)
    np.testing.assert_array_equal(mask, np.arange(found) < counts[:, None])
    assert [module.config.frames(int(n), samples) for n in lengths] == counts.tolist()
    np.testing.assert_array_equal(module.config.frames(np.array([0, 399, 2_799, 2_800, 5_360])), [0, 0, 0, 8, 16])


def test_every_parameter_has_a_gradient():
    module, params = small()
    waveform = np.random.default_rng(0).normal(0, 0.1, (2, 6_000)).astype(np.float32)
    waveform[1, 2_000:] = 0  # silence
    mask = np.arange(6_000) < np.array([6_000, 4_000])[:, None]

    def loss(params, waveform):
        out, classes = module.apply({"params": params}, waveform, mask, method="run")
        return (out.last_hidden_state[..., 0] ** 3).sum() + (classes**2).sum()

    of_params, of_waveform = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, waveform)
    of_params["layers"]["attention"]["k"].pop("bias")  # it cancels in the softmax but for the gate
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_params):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)
    assert np.isfinite(of_waveform).all()


# ---- refusals


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(layer_norm_first=True), "layer_norm_first"),
        (dict(relative_position_embedding=False), "gru_rel_pos.*relative_position_embedding"),
        (dict(activation_fn="linear"), "activation_fn='linear'"),
        (dict(conv_pos_groups=7), "7 groups of the convolution"),
        (dict(encoder_attention_heads=5), "hidden_size 768 for 5 heads"),
        (dict(input_patch_size=None), "'input_patch_size'"),
        (dict(input_patch_size=129), "patch_size 129"),
        (dict(max_distance=2), "max_distance 2"),
        (dict(rotary=True), "rotary=True"),
        (dict(deep_norm="yes"), "deep_norm='yes'"),
    ],
)
def test_options_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        from_hf_config(BASE | NAMED | options)


def test_options_of_training_have_no_effect():
    training = dict(dropout=0.1, encoder_layerdrop=0.05, dropout_input=0.1, layer_wise_gradient_decay_ratio=0.6)
    assert from_hf_config(BASE | training | dict(predictor_dropout=0.1)) == from_hf_config(BASE)
    plain = from_hf_config(dict(input_patch_size=16))  # the defaults of the original
    assert (plain.embedding_size, plain.dialect.deep_norm, plain.dialect.num_buckets) == (512, False, None)


def test_inputs_that_do_not_fit_are_refused(tmp_path):
    module, params = small()
    apply = lambda *given, **how: module.apply({"params": params}, *given, **how)  # noqa: E731
    for shape in ((2, 2_799), (4_000,), (1, 4_000, 1)):
        with pytest.raises(DataError, match=r"(?s)2800 samples \(0\.175 s.*mask"):
            apply(np.zeros(shape, np.float32))
    with pytest.raises(DataError, match="a mask of shape"):
        apply(np.zeros((2, 4_000), np.float32), np.ones((2, 25)))
    config = from_hf_config(BASE | TINY | dict(input_patch_size=8))
    with pytest.raises(DataError, match="64 patches of 38 frames"):
        jax.eval_shape(config.make().init, jax.random.key(0), jnp.zeros((1, 6_400)), jnp.ones((1, 6_400)))
    with pytest.raises(DataError, match="0 patches of 1 frames"):
        config.frames(300, 400)
    plain = from_hf_config(BASE | TINY)
    with pytest.raises(ConfigError, match="without a predictor"):
        plain.make().apply({}, jnp.zeros((1, 4_000)), method="classify")
    weights = random_weights(BASE | TINY)
    weights.pop("encoder.layers.0.self_attn.relative_attention_bias.weight")
    with pytest.raises(CheckpointError, match="relative_attention_bias.weight: missing"):
        from_pretrained(write(tmp_path, BASE | TINY, weights))


# ---- the filterbank


@pytest.mark.parametrize("num_mel", [80, 128])
def test_fbank_is_that_of_transformers(num_mel):
    rng = np.random.default_rng(0)
    time = np.arange(4_321) / 16_000
    waveform = np.sin(2 * np.pi * 440 * time) + 0.1 * rng.normal(size=(2, time.size)) + 0.2
    waveform = (waveform * 2**13).astype(np.float32)
    found = jax.jit(lambda x: ours.fbank(x, num_mel))(waveform)
    assert found.shape == (2, ours.num_frames(time.size), num_mel) and found.dtype == jnp.float32
    for row, theirs in zip(found, waveform, strict=True):
        np.testing.assert_allclose(row, fbank(theirs, num_mel), atol=5e-4, rtol=1e-4)


def test_fbank_of_silence_and_of_too_little():
    np.testing.assert_allclose(ours.fbank(jnp.full((560,), 3.0)), np.log(ours.FLOOR), rtol=1e-6)
    for samples, frames in ((0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16_000, 98)):
        assert jax.eval_shape(ours.fbank, jnp.zeros((2, samples))).shape == (2, frames, 128)
        assert ours.num_frames(samples) == frames
