"""HuBERT against transformers, through real folders both ways: both styles, masks, CTC logits and their text."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from toy_data import quick_compilation

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.data.ctc_tokenizer import CTCTokenizer
from mllm_jax.encoders.ctc import ctc_greedy
from mllm_jax.encoders.hubert import HubertConfig, HubertCTCConfig
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.registry import abstract_params, family_of, family_of_config, from_pretrained, save_pretrained
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh

BASE = dict(
    vocab_size=13,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    layer_norm_eps=1e-2,  # large, so that a wrong epsilon shows
    conv_dim=(6, 8, 8),
    conv_kernel=(10, 3, 2),
    conv_stride=(5, 2, 2),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
)
LARGE = BASE | dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True)
ODD = dict(
    vocab_size=9,
    hidden_size=21,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=17,
    layer_norm_eps=0.1,
    conv_dim=(5, 9, 7, 11),
    conv_kernel=(7, 1, 4, 3),
    conv_stride=(3, 2, 1, 5),
    num_conv_pos_embeddings=5,
    num_conv_pos_embedding_groups=7,
    feat_proj_layer_norm=False,
    feat_extract_activation="relu",
    hidden_act="gelu_new",
    mask_time_prob=0.0,
)
CASES = {
    "base": ("HubertModel", BASE),
    "large": ("HubertModel", LARGE),
    "odd": ("HubertModel", ODD),
    "base with a CTC head": ("HubertForCTC", BASE | dict(pad_token_id=3)),
    "large with a CTC head": ("HubertForCTC", LARGE | dict(mask_time_prob=0.0, mask_feature_prob=0.1)),
    "odd large with a CTC head": ("HubertForCTC", ODD | dict(do_stable_layer_norm=True, feat_extract_norm="layer")),
}
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C", "'"]


@pytest.fixture(autouse=True)
def _quickly():
    with quick_compilation():
        yield


@pytest.fixture
def load(randomise, tmp_path):
    def make(case: str):
        name, options = CASES[case]
        reference = randomise(getattr(transformers, name)(transformers.HubertConfig(**options)))
        reference.save_pretrained(tmp_path / "theirs")
        return reference, *from_pretrained(tmp_path / "theirs")

    return make


@pytest.fixture(scope="module")
def speech():
    """Returns input_values and attention_mask of three waves of unequal lengths."""
    rng = np.random.default_rng(0)
    waves = [rng.normal(0.3, 2.0, n).astype(np.float32) for n in (601, 337, 148)]
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    made = extractor(waves, padding=True, sampling_rate=16_000, return_tensors="np")
    return SimpleNamespace(values=made["input_values"], mask=made["attention_mask"], lengths=(601, 337, 148))


def run(reference, values, mask=None):
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return reference(torch.tensor(values), attention_mask=mask, output_hidden_states=True)


def states(ours, theirs):
    """Yields (name, our array, the reference's) of every output."""
    encoded = getattr(ours, "encoder", ours)
    pairs = zip(encoded.hidden_states, theirs.hidden_states, strict=True)
    yield from ((f"hidden {i}", *pair) for i, pair in enumerate(pairs))
    for name in ("last_hidden_state", "logits"):
        if hasattr(theirs, name):
            yield name, getattr(ours, name), getattr(theirs, name)


@pytest.mark.parametrize("case", CASES)
def test_every_output_and_the_folder_written(case, load, speech, assert_close, tmp_path):
    reference, module, params = load(case)
    apply = jax.jit(module.apply, static_argnums=3)
    model = getattr(reference, "hubert", reference)
    config = getattr(module.config, "encoder", module.config)

    ours, theirs = apply({"params": params}, speech.values, None, True), run(reference, speech.values)
    assert len(theirs.hidden_states) == config.num_layers + 1 == len(getattr(ours, "encoder", ours).hidden_states)
    for name, mine, other in states(ours, theirs):
        assert_close(mine, other, 1e-5, name)
    assert getattr(ours, "encoder", ours).mask is None

    masked, theirs = (
        apply({"params": params}, speech.values, speech.mask, True),
        run(reference, speech.values, speech.mask),
    )
    valid = np.asarray(getattr(masked, "encoder", masked).mask)
    wanted = model._get_feature_vector_attention_mask(valid.shape[1], torch.tensor(speech.mask))
    assert np.array_equal(valid, wanted) and 0 < valid[2].sum() < valid[1].sum() < valid[0].sum() == valid.shape[1]
    for name, mine, other in states(masked, theirs):
        assert_close(np.asarray(mine)[valid], other.numpy()[valid], 1e-5, f"masked {name}")

    save_pretrained(module, params, tmp_path / "ours")
    opened, info = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    stored, again = reference.state_dict(), opened.state_dict()
    assert stored.keys() == again.keys() and all(torch.equal(tensor, stored[name]) for name, tensor in again.items())
    for name, mine, other in states(masked, run(opened, speech.values, speech.mask)):
        assert_close(np.asarray(mine)[valid], other.numpy()[valid], 1e-5, f"written {name}")
    family = family_of_config(module.config)
    assert family.from_hf(family.to_hf(module.config)) == module.config


@pytest.mark.parametrize("case,changes", [("large", False), ("odd large with a CTC head", False), ("base", True)])
def test_padding_changes_only_the_style_with_a_norm_over_time(case, changes, load, speech):
    _, module, params = load(case)
    out = jax.jit(module.apply)({"params": params}, speech.values, speech.mask)
    n = speech.lengths[1]
    alone = jax.jit(module.apply)({"params": params}, speech.values[1:2, :n])
    out, alone = (getattr(each, "encoder", each) for each in (out, alone))
    frames = alone.last_hidden_state.shape[1]
    config = getattr(module.config, "encoder", module.config)
    assert frames == config.frames(n) == out.mask[1].sum()
    error = np.abs(out.last_hidden_state[1, :frames] - alone.last_hidden_state[0]).max()
    assert error > 1e-2 if changes else error < 1e-5


@pytest.mark.parametrize("options", [BASE, ODD, {}], ids=["base", "odd", "full size"])
def test_the_number_of_frames(options):
    config = family_of(dict(architectures=["HubertModel"])).from_hf(dict(architectures=["HubertModel"], **options))
    with torch.device("meta"):
        reference = transformers.HubertModel(transformers.HubertConfig(**options | dict(num_hidden_layers=1)))
    n = np.arange(1, 1500, 7)
    wanted = reference._get_feat_extract_output_lengths(torch.tensor(n)).clamp(min=0).numpy()
    assert np.array_equal(config.frames(n), wanted) and np.array_equal(config.frames(jnp.asarray(n)), wanted)
    assert all(config.frames(int(one)) == frames for one, frames in zip(n, wanted, strict=True))
    assert config.frames(config.least_samples) == 1 and config.frames(config.least_samples - 1) == 0
    assert config.rate == 16_000 and config.inputs(1.5) == (24_000,) and config.feature_size == config.hidden_size


def test_a_row_that_is_all_padding_or_too_short_is_finite(load, speech):
    _, module, params = load("large")
    mask = np.array(speech.mask)
    mask[1] = 0
    mask[2, 5:] = 0
    out = module.apply({"params": params}, speech.values, mask)
    assert np.isfinite(out.last_hidden_state).all() and out.mask.sum(axis=1).tolist() == [out.mask.shape[1], 0, 0]


@pytest.mark.parametrize("case", ["base", "large"])
def test_a_mesh_that_splits_rows_over_time(case, load, assert_close, tmp_path):
    """Checks 44 vectors split over two devices; the last convolution's input has 89, which no two devices share."""
    _, module, params = load(case)
    values = np.random.default_rng(2).normal(size=(4, 900)).astype(np.float32)
    mask = (np.arange(900) < np.array([[900], [701], [300], [899]])).astype(int)
    alone = jax.jit(module.apply)({"params": params}, values, mask)
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    module, params = from_pretrained(tmp_path / "theirs", mesh=mesh)
    with use_mesh(mesh):
        split = jax.jit(module.apply)({"params": params}, values, mask)
    valid = np.asarray(alone.mask)
    assert valid.shape == (4, 44) and np.array_equal(split.mask, valid)
    assert_close(np.asarray(split.last_hidden_state)[valid], np.asarray(alone.last_hidden_state)[valid], 1e-5)


# ---- CTC


@pytest.fixture
def tokenizer(tmp_path):
    """Returns a function that saves and returns a tokenizer of transformers with these options."""

    def make(**options):
        (tmp_path / "vocab").mkdir(exist_ok=True)
        path = tmp_path / "vocab" / "vocab.json"
        path.write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
        made = transformers.Wav2Vec2CTCTokenizer(path, **options)
        made.save_pretrained(tmp_path / "tokenizer")
        return made

    return make


@pytest.mark.parametrize(
    "options", [{}, dict(do_lower_case=True, replace_word_delimiter_char="_"), dict(pad_token="|", unk_token="C")]
)
def test_greedy_decoding_is_the_processors(options, tokenizer, tmp_path):
    theirs = tokenizer(**options)
    ours = CTCTokenizer.load(tmp_path / "tokenizer")
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 30, len(TOKENS))).astype(np.float32)
    logits[:, 1::3] = logits[:, ::3]  # repeats
    logits[:10, ::2, ours.blank] += 9.0  # blanks between them
    logits[10, :, ours.blank] += 99.0  # nothing but blanks
    lengths = rng.integers(1, 31, 40)
    mask = np.arange(30) < lengths[:, None]
    ids = jax.jit(ctc_greedy, static_argnums=2)(logits, mask, ours.blank)
    assert ids.shape == (40, 30) and ids.dtype == jnp.int32
    best = logits.argmax(axis=-1)
    wanted = [theirs.decode(row[:n]) for row, n in zip(best, lengths, strict=True)]
    assert [ours.decode(row) for row in ids] == wanted
    assert wanted[10] == "" and (ids[10] == -1).all() and len(set(wanted)) > 30
    assert [ours.decode(row) for row in ctc_greedy(logits, blank=ours.blank)] == theirs.batch_decode(best)


def test_a_letter_twice_needs_a_blank_between():
    path = jnp.array([[5, 5, 0, 5, 6, 6, 4, 0, 0, 6]])
    ids = ctc_greedy(jax.nn.one_hot(path, 9))
    assert ids.tolist() == [[5, 5, 6, 4, 6, -1, -1, -1, -1, -1]]
    assert ctc_greedy(jax.nn.one_hot(path, 9), jnp.arange(10)[None] < 4).tolist() == [[5, 5] + [-1] * 8]
    assert ctc_greedy(jax.nn.one_hot(path, 9), blank=6)[0, :6].tolist() == [5, 0, 5, 4, 0, -1]


def test_speech_to_text_through_a_folder(load, speech, tokenizer, tmp_path):
    reference, module, params = load("odd large with a CTC head")
    processor = transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(), tokenizer())
    processor.save_pretrained(tmp_path / "theirs")
    save_pretrained(module, params, tmp_path / "ours", companions=tmp_path / "theirs")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    logits = run(reference, speech.values, speech.mask).logits.numpy()
    out = jax.jit(module.apply)({"params": params}, speech.values, speech.mask)
    rows = [row[: n.sum()] for row, n in zip(logits.argmax(axis=-1), np.asarray(out.encoder.mask), strict=True)]
    ids = ctc_greedy(out.logits, out.encoder.mask, module.config.blank)
    texts = [CTCTokenizer.load(tmp_path / "ours").decode(row) for row in ids]
    assert texts == [processor.decode(row) for row in rows] and all(texts)


def test_tokenizers_that_are_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no vocab.json"):
        CTCTokenizer.load(tmp_path)
    tokenizer()
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    text = settings.read_text()
    settings.write_text(text.replace("Wav2Vec2CTCTokenizer", "Wav2Vec2PhonemeCTCTokenizer"))
    with pytest.raises(DataError, match="Wav2Vec2PhonemeCTCTokenizer"):
        CTCTokenizer.load(tmp_path / "tokenizer")
    settings.unlink()
    assert CTCTokenizer.load(tmp_path / "tokenizer").blank == 0
    (tmp_path / "tokenizer" / "vocab.json").write_text("[1]")
    with pytest.raises(DataError, match="the tokenizer in"):
        CTCTokenizer.load(tmp_path / "tokenizer")


# ---- folders


@pytest.mark.parametrize("case", ["base", "large with a CTC head"])
def test_the_old_names_of_weight_norm(case, load, tmp_path):
    _, _, params = load(case)
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    for new, old in (
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    ):
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert sum(name.endswith(("weight_g", "weight_v")) for name in tensors) == 2
    if case == "base":
        tensors = {f"hubert.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    _, again = from_pretrained(tmp_path / "theirs")
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))


def test_the_mask_embedding_is_kept_as_it_is_stored(load, tmp_path):
    """Checks a folder whose config.json and tensors disagree, in both ways."""
    for case, stored in (("base", True), ("odd", False)):
        _, module, params = load(case)
        assert module.config.dialect.mask_embedding == stored == ("mask_embedding" in params)
    path = tmp_path / "theirs" / "model.safetensors"
    load("base")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | dict(mask_time_prob=0)))
    assert from_pretrained(tmp_path / "theirs")[0].config.dialect.mask_embedding
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    tensors = load_file(path)
    del tensors["masked_spec_embed"]
    save_file(tensors, path, {"format": "pt"})
    assert not from_pretrained(tmp_path / "theirs")[0].config.dialect.mask_embedding


NAMED = dict(architectures=["HubertModel"], model_type="hubert")
# As in config.json of hubert-large-ls960-ft of 2021.
OF_2021 = dict(
    _name_or_path="facebook/hubert-large-ls960-ft", apply_spec_augment=True, contrastive_logits_temperature=0.1,
    ctc_loss_reduction="sum", ctc_zero_infinity=False, diversity_loss_weight=0.1, feat_extract_dropout=0.0,
    feat_proj_dropout=0.1, feat_quantizer_dropout=0.0, final_dropout=0.1, gradient_checkpointing=False,
    hidden_dropout=0.1, hidden_dropout_prob=0.1, layerdrop=0.1, mask_channel_length=10, mask_channel_min_space=1,
    mask_channel_other=0.0, mask_channel_prob=0.0, mask_channel_selection="static", mask_feature_length=10,
    mask_feature_prob=0.0, mask_time_length=10, mask_time_min_space=1, mask_time_other=0.0, mask_time_prob=0.05,
    mask_time_selection="static", num_codevector_groups=2, num_codevectors_per_group=320, num_feat_extract_layers=7,
    num_negatives=100, proj_codevector_dim=768, codevector_dim=256, tokenizer_class="Wav2Vec2CTCTokenizer",
    vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.02, activation_dropout=0.1,
)  # fmt: skip


def test_options_without_effect_change_nothing():
    family = family_of(NAMED)
    assert family.from_hf(dict(model_type="hubert")) == HubertConfig()  # as a part of a larger model
    assert family.from_hf(NAMED | OF_2021) == family.from_hf(NAMED) == HubertConfig()
    named = dict(architectures=["HubertForCTC"])
    assert family.from_hf(named | OF_2021) == family.from_hf(named) == HubertCTCConfig()


@pytest.mark.parametrize(
    "values,named",
    [
        (dict(conv_pos_batch_norm=True), "conv_pos_batch_norm=True"),
        (dict(adapter_attn_dim=16), "adapter_attn_dim=16"),
        (dict(add_adapter=True), "add_adapter=True"),
        (dict(feat_extract_norm="instance"), "feat_extract_norm='instance'"),
        (dict(feat_extract_activation="selu"), "feat_extract_activation='selu'"),
        (dict(num_feat_extract_layers=6), "num_feat_extract_layers=6"),
        (dict(conv_stride=[5, 2]), "2 conv_strides"),
        (dict(num_conv_pos_embedding_groups=7), "7 position_groups"),
        (dict(num_attention_heads=7), "7 heads"),
        (dict(window=3), "window=3"),
        (dict(architectures=["HubertForSequenceClassification"]), "HubertForSequenceClassification"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused_by_name(values, named):
    with pytest.raises(ConfigError, match=named):
        family_of(NAMED).from_hf(NAMED | values)


@pytest.mark.parametrize(
    "features,mask,named",
    [
        ((2, 399), None, "at least 400 samples"),
        ((2, 1, 800), None, r"\[2, 1, 800\]"),
        ((2, 800), (2, 799), r"a mask of shape \[2, 799\]"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, mask, named):
    module = change_fields(HubertConfig(), num_layers=1).make()
    mask = None if mask is None else jnp.ones(mask, int)
    with pytest.raises(ConfigError, match=named):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(features), mask)


LARGER = dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True, num_attention_heads=16)
SIZES = {
    "base": ("HubertModel", {}, 94_371_712),
    "large": (
        "HubertModel",
        LARGER | dict(hidden_size=1024, num_hidden_layers=24, intermediate_size=4096),
        315_438_720,
    ),
    "large, fine-tuned": (
        "HubertForCTC",
        LARGER | dict(hidden_size=1024, num_hidden_layers=24, intermediate_size=4096),
        315_471_520,
    ),
    "xlarge": (
        "HubertModel",
        LARGER | dict(hidden_size=1280, num_hidden_layers=48, intermediate_size=5120),
        962_497_408,
    ),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_full_size_models(size):
    name, options, count = SIZES[size]
    family = family_of(dict(architectures=[name]))
    config = family.from_hf(dict(architectures=[name], **options))
    params = abstract_params(config, family)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count
    with torch.device("meta"):
        reference = getattr(transformers, name)(transformers.HubertConfig(**options))
    assert sum(parameter.numel() for parameter in reference.parameters()) == count
    # Each has a line in the table, and each of its dimensions a logical name or None.
    boxes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "names"))
    paths = {"/".join(key.key for key in path) for path, _ in boxes}
    assert paths == {weight.path for weight in family.table(config).weights}
    assert all(len(box.names) == box.value.ndim for _, box in boxes)
