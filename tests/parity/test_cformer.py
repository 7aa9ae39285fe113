"""The C-Former against its authors' recorded code, a plain loop, and torch.

tests/goldens/cif.json and tests/goldens/xllm_speech_interface.json describe the recording.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from qformer_reference import golden
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertModel

from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.encoders.cformer import CFormerConfig, cif, quantity_loss
from mllm_jax.encoders.cformer_hub import FAMILIES, from_hf_config, table, to_hf_config
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.registry import abstract_params, from_pretrained, save_pretrained

UNREAD = ("embeddings.word_embeddings.weight", "pooler.dense.weight", "pooler.dense.bias")


def weights_of(arrays) -> dict[str, np.ndarray]:
    return {name.removeprefix("weights/"): arrays[name] for name in arrays.files if name.startswith("weights/")}


def bert_options(**options) -> dict:
    return BertConfig(**options).to_dict()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opens one folder with the weights of both goldens: (module, params, CIF's arrays, the interface's arrays)."""
    (ours, sizes), (theirs, bert) = golden("cif"), golden("xllm_speech_interface")
    folder = tmp_path_factory.mktemp("cformer")
    save_file(weights_of(ours) | weights_of(theirs), folder / "model.safetensors")
    options = bert_options(
        vocab_size=bert["vocab"],
        hidden_size=bert["bert_hidden"],
        num_hidden_layers=bert["layers"],
        num_attention_heads=bert["heads"],
        intermediate_size=bert["inter"],
        max_position_embeddings=bert["max_pos"],
    )
    config = sizes | dict(
        architectures=["CFormer"],
        llm_hidden_size=bert["llm_hidden"],
        speech_adaptor_type=bert["adaptor"],
        bert_config=options,
    )
    (folder / "config.json").write_text(json.dumps(config))
    return *from_pretrained(folder), ours, theirs


def inputs_of(arrays):
    """Returns features and the mask, 1 for valid vectors; the recorded mask has 1 for padding."""
    return jnp.asarray(arrays["inputs/encoder_out"]), jnp.asarray(~arrays["inputs/encoder_padding_mask"])


def apply(module, params, *arguments, **options):
    return jax.jit(lambda params, *arguments: module.apply({"params": params}, *arguments, **options))(
        params, *arguments
    )


# ---- CIF against its golden


def check_fired(fired, arrays, mode: str, check, compared=None) -> None:
    """Compares fired vectors, mask and quantity with those recorded; `compared` is bool[B, N], all by default."""
    vectors, mask = arrays[f"outputs/{mode}/cif_out"], arrays[f"outputs/{mode}/cif_out_padding_mask"]
    size = mask.shape[1]
    compared = np.ones_like(mask, bool) if compared is None else compared
    np.testing.assert_array_equal(fired.mask[:, :size][compared], mask[compared])
    check(np.asarray(fired.vectors)[:, :size][compared], vectors[compared], 1e-5, mode)
    assert not np.asarray(fired.vectors)[:, size:].any() and not np.asarray(fired.mask)[:, size:].any()
    np.testing.assert_array_equal(fired.fires, np.asarray(fired.mask).sum(1))
    check(fired.quantity, arrays[f"outputs/{mode}/quantity_out"], 1e-6, f"{mode}: quantity")


def test_weights_of_vectors(opened, assert_close):
    module, params, arrays, _ = opened
    features, mask = inputs_of(arrays)
    alphas = apply(module, params, features, method="weigh")
    assert_close(alphas * mask, arrays["outputs/alpha_unscaled_masked"], 1e-6, "weights")


@pytest.mark.parametrize("mode", ["eval", "eval_with_targets_ignored", "eval_no_tail", "train_no_scaling"])
def test_fires_of_unscaled_weights(mode, opened, assert_close):
    module, params, arrays, _ = opened
    features, mask = inputs_of(arrays)
    changes = {"eval_no_tail": dict(fire_tail=False), "train_no_scaling": dict(scale=False)}.get(mode, {})
    targets = jnp.asarray(arrays["inputs/target_lengths"]) if mode == "train_no_scaling" else None
    module = dataclasses.replace(module.config, **changes).make()
    fired = apply(module, params, features, mask, targets, method="fire")
    check_fired(fired, arrays, mode, assert_close)
    if mode == "eval":
        whole = np.asarray(mask).all(1)  # the tail of such a sample does not fire
        tails = np.asarray(fired.fires) - arrays["outputs/eval/fire_trace"].sum(1)
        assert not tails[whole].any() and tails[~whole].any()


def test_fires_of_weights_scaled_to_target_lengths(opened, assert_close):
    module, params, arrays, _ = opened
    features, mask = inputs_of(arrays)
    run = jax.jit(lambda targets: module.apply({"params": params}, features, mask, targets, method="fire"))
    check_fired(run(arrays["inputs/target_lengths_fractional"]), arrays, "train_fractional_target", assert_close)
    # Rounding decides whether the last vector of a whole number of targets fires.
    targets = arrays["inputs/target_lengths"]
    fired = run(targets)
    assert ((targets - 1 <= fired.fires) & (fired.fires <= targets)).all()
    index = np.arange(arrays["outputs/train/cif_out"].shape[1])[None]
    lost = (np.asarray(fired.fires) < targets)[:, None] & (index == targets[:, None] - 1)
    check_fired(fired, arrays, "train", assert_close, ~lost)
    assert_close(quantity_loss(fired.quantity, targets), arrays["outputs/train/quantity_l1_mean"], 1e-6, "loss")


def test_gradients_of_training(opened, assert_close):
    """Compares gradients with those recorded; their loss reads no vector that rounding may lose."""
    module, params, arrays, _ = opened
    features, mask = inputs_of(arrays)
    targets, probe = jnp.asarray(arrays["inputs/target_lengths"]), jnp.asarray(arrays["inputs/probe"])

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        fired = module.apply({"params": params}, features, mask, targets, method="fire")
        return (fired.vectors * probe).sum() + quantity_loss(fired.quantity, targets)

    value, grads = loss(params)
    assert_close(value, arrays["outputs/train/probe_loss"], 1e-5, "loss")
    stored = hub_tensors(table(module.config), grads)
    names = [name for name in arrays.files if name.startswith("grads/")]
    assert len(names) == 5
    for name in names:
        assert_close(stored[name.removeprefix("grads/")](), arrays[name], 1e-5, name)


# ---- CIF against a plain loop


def loop(features, alphas, mask, target=None, threshold=1.0, tail=0.5):
    """Fires the vectors of one sample as `CifMiddleware` does, in float32: (vectors, sums of weights, fires)."""
    valid, one = int(mask.sum()), np.float32(1)
    alphas = alphas * mask
    if target is not None:
        alphas = (alphas * np.float32(target / alphas.sum())).astype(np.float32)
    weight, state, vectors, sums, fires = np.float32(0), np.zeros_like(features[0]), [], [], []
    for i, (x, alpha) in enumerate(zip(features, alphas, strict=True)):
        fires.append(bool(weight + alpha >= np.float32(threshold)))
        rest, before = one - weight, state
        weight = alpha - rest if fires[-1] else alpha + weight
        state = weight * x if fires[-1] else before + alpha * x
        sums.append(weight)
        if target is None and tail is not None and i == valid:
            if weight > np.float32(tail):
                vectors.append(state / (weight + np.float32(1e-10)))
        elif fires[-1] and i <= valid:
            vectors.append(before + rest * x)
    return vectors, np.array(sums), np.array(fires)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_plain_loop_is_the_recorded_one(mode):
    """Checks the loop of this file, with which the next test compares, on the recorded sums and fires."""
    arrays, sizes = golden("cif")
    features, mask = (np.asarray(each) for each in inputs_of(arrays))
    for b in range(len(mask)):
        target = arrays["inputs/target_lengths"][b] if mode == "train" else None
        alphas = arrays["outputs/alpha_unscaled_masked"][b]
        vectors, sums, fires = loop(features[b], alphas, mask[b], target, tail=sizes["tail_handling_firing_threshold"])
        safe = slice(None) if target is None else slice(int(np.flatnonzero(fires)[-1]))
        np.testing.assert_allclose(sums[safe], arrays[f"outputs/{mode}/acc_trace"][b][safe], atol=2e-6)
        np.testing.assert_array_equal(fires[safe], arrays[f"outputs/{mode}/fire_trace"][b][safe])
        sized = len(vectors) - (target is not None)
        projected = np.stack(vectors)[:sized] @ arrays["weights/cif_output_proj.weight"].T
        np.testing.assert_allclose(projected, arrays[f"outputs/{mode}/cif_out"][b][:sized], atol=1e-5)


@pytest.mark.parametrize("largest", [0.95, 2.5])
@pytest.mark.parametrize("tail,trained", [(0.5, False), (0.2, False), (None, False), (0.5, True)])
def test_random_weights_thresholds_and_masks(tail, trained, largest):
    """Compares random samples with the loop; a weight above 1 fires once, and the rest of it fires the next vectors."""
    rng, rows, size = np.random.default_rng(7), 24, 17
    run = jax.jit(
        lambda features, alphas, mask, targets, threshold: cif(
            features, alphas, mask, targets if trained else None, threshold, tail_threshold=tail
        )
    )
    above = most = 0
    for threshold in (1.0, 0.99, 0.6, 1.4):
        features = rng.normal(size=(rows, size, 3)).astype(np.float32)
        alphas = rng.uniform(0, largest, (rows, size)).astype(np.float32)
        lengths = rng.integers(1, size + 1, rows)
        lengths[0] = size
        mask = np.arange(size) < lengths[:, None]
        targets = (rng.integers(0, lengths + 3) + 0.37).astype(
            np.float32
        )  # no rounding decides; some exceed the length
        fired = run(features, alphas, mask.astype(np.int32), targets, threshold)
        assert fired.vectors.shape == (rows, size, 3) and fired.mask.shape == (rows, size)
        for b in range(rows):
            target = targets[b] if trained else None
            expected = loop(features[b], alphas[b], mask[b], target, threshold, tail)[0]
            assert fired.fires[b] == len(expected) == fired.mask[b].sum() <= min(size, lengths[b] + 1)
            assert fired.mask[b, : len(expected)].all() and not np.asarray(fired.vectors)[b, len(expected) :].any()
            if expected:
                np.testing.assert_allclose(fired.vectors[b, : len(expected)], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(fired.quantity, (alphas * mask).sum(1), rtol=1e-5)
        above += int((alphas * mask > 1).sum())
        most = max(most, int((np.asarray(fired.fires) - lengths).max()))
    assert (above > 0) == (largest > 1)
    assert most <= 1  # one fire at the first padded vector at most


def test_a_weight_above_one_by_hand():
    """Checks weights 2.5, 0, 0, 0: the first vector fires, then the next two, each with a weight of 1 in all."""
    features = jnp.asarray([[[1.0], [10.0], [100.0], [1000.0]]])
    fired = cif(features, jnp.asarray([[2.5, 0.0, 0.0, 0.0]]), None, tail_threshold=None)
    # 1 x 1; then the rest, 1.5 x 1, completed by (1 - 1.5) x 10; then 0.5 x 10, which the third vector only completes.
    np.testing.assert_allclose(fired.vectors[0, :, 0], [1.0, 1.5 - 5.0, 0.0, 0.0])
    np.testing.assert_array_equal(fired.mask[0], [True, True, False, False])


def test_a_bound_of_fires():
    rng = np.random.default_rng(3)
    features, alphas = rng.normal(size=(2, 12, 4)).astype(np.float32), np.float32([[0.9] * 12, [0.2] * 12])
    whole, few = (cif(features, alphas, None, max_fires=most) for most in (None, 5))
    assert few.vectors.shape == (2, 5, 4) and whole.vectors.shape == (2, 12, 4)
    np.testing.assert_array_equal(few.fires, whole.fires)
    assert list(few.fires) == [10, 2] and list(few.mask.sum(1)) == [5, 2]
    np.testing.assert_array_equal(few.vectors, whole.vectors[:, :5])
    assert cif(features, alphas, None, max_fires=50).mask.shape == (2, 12)


def test_a_sample_without_valid_vectors():
    """Checks that such a sample fires nothing and leaves all gradients finite, in training and evaluation."""
    mask, given = jnp.asarray([[1] * 6, [0] * 6]), (jnp.ones((2, 6, 3)), jnp.full((2, 6), 0.45))

    @partial(jax.jit, static_argnums=1)
    def gradient(given, trained):
        def total(given):
            fired = cif(*given, mask, jnp.asarray([3, 0]) if trained else None)
            return fired.vectors.sum() + fired.quantity.sum(), fired

        return jax.grad(total, has_aux=True)(given)

    for trained in (False, True):
        grads, fired = gradient(given, trained)
        assert all(np.isfinite(each).all() for each in (*grads, fired.vectors))
        assert fired.fires[0] >= 2 and fired.fires[1] == 0


def test_a_tail_above_its_threshold():
    """Checks a tail of 0.5: it is fired above a threshold, not at it."""
    features, alphas, mask = jnp.full((1, 4, 1), 6.0), jnp.full((1, 4), 0.5), jnp.asarray([[1, 1, 1, 0]])
    for threshold, expected in ((0.5, [6.0, 0.0]), (0.49, [6.0, 6.0])):
        fired = cif(features, alphas, mask, tail_threshold=threshold)
        np.testing.assert_allclose(fired.vectors[0, :2, 0], expected)
        assert fired.fires == np.count_nonzero(expected)


@pytest.mark.parametrize("alphas,mask", [((2, 4, 1), (2, 4)), ((2, 5), (2, 4)), ((2, 4), (2, 5)), ((2, 4), (4,))])
def test_shapes_that_do_not_fit(alphas, mask):
    with pytest.raises(ConfigError, match=r"cif: features \(2, 4, 3\)"):
        cif(jnp.ones((2, 4, 3)), jnp.ones(alphas), jnp.ones(mask))


# ---- the transformer, and the whole


def test_speech_interface_of_x_llm(opened, assert_close):
    """Calls the transformer alone, and compares padded vectors too."""
    module, params, _, arrays = opened
    vectors, mask = arrays["inputs/speech_input"], arrays["outputs/attention_mask"]
    np.testing.assert_array_equal(vectors.sum(-1) != 0, mask)
    out = apply(module, params, vectors, mask, method="transform", output_hidden_states=True)
    assert_close(out.last_hidden_state, arrays["outputs/speech_embeds"], 1e-5, "tokens")
    np.testing.assert_array_equal(out.mask, mask)
    names = ["bert_embeddings"] + [f"bert_layer{i}" for i in range(module.config.num_layers)]
    for ours, name in zip(out.hidden_states, names, strict=True):
        assert_close(ours, arrays[f"outputs/{name}"], 1e-5, name)
    assert out.cif is None


def test_as_many_tokens_as_fires(opened, assert_close):
    """Checks the whole on the recorded features: its tokens are those of the recorded vectors."""
    module, params, arrays, _ = opened
    features, mask = inputs_of(arrays)
    out = apply(module, params, features, mask)
    recorded = arrays["outputs/eval/cif_out"]
    valid = arrays["outputs/eval/cif_out_padding_mask"] != 0
    np.testing.assert_array_equal(np.asarray(out.mask).sum(1), valid.sum(1))
    np.testing.assert_array_equal(out.cif.fires, valid.sum(1))
    assert out.last_hidden_state.shape == (len(valid), features.shape[1], module.config.feature_size)
    alone = apply(module, params, recorded, valid, method="transform")
    tokens = np.asarray(out.last_hidden_state)[:, : valid.shape[1]][valid]
    assert_close(tokens, np.asarray(alone.last_hidden_state)[valid], 1e-5, "tokens")


TINY = dict(
    architectures=["CFormer"],
    cif_threshold=0.99,
    cif_embedding_dim=12,
    encoder_embed_dim=16,
    produce_weight_type="conv",
    conv_cif_width=3,
    conv_cif_dropout=0.1,
    apply_scaling=True,
    apply_tail_handling=True,
    tail_handling_firing_threshold=0.3,
    llm_hidden_size=20,
)
BERT = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=7)
FOLDERS = {
    "a wide convolution": (dict(conv_cif_width=5), dict(max_position_embeddings=19)),
    "a linear map and ReLU": (
        dict(produce_weight_type="dense", cif_embedding_dim=16, max_fires=4, apply_tail_handling=False),
        dict(max_position_embeddings=6, hidden_act="relu", num_hidden_layers=3),
    ),
    "one linear map": (
        dict(produce_weight_type="linear", cif_threshold=1.0, apply_scaling=False),
        dict(max_position_embeddings=40, layer_norm_eps=1e-3, hidden_act="gelu_pytorch_tanh", num_attention_heads=2),
    ),
}


class Reference(torch.nn.Module):
    """The weights of `CifMiddleware` and of X-LLM's speech interface, in one module of their names."""

    def __init__(self, options: dict, bert: dict):
        super().__init__()
        width, kind = options["encoder_embed_dim"], options["produce_weight_type"]
        if kind == "conv":
            size = options["conv_cif_width"]
            self.conv = torch.nn.Conv1d(width, width, size, padding=size // 2)
        if kind == "dense":
            self.dense_proj = torch.nn.Linear(width, width)
        self.weight_proj = torch.nn.Linear(width, 1)
        if options["cif_embedding_dim"] != width:
            self.cif_output_proj = torch.nn.Linear(width, options["cif_embedding_dim"], bias=False)
        self.pre_bert_proj = torch.nn.Linear(options["cif_embedding_dim"], bert["hidden_size"])
        self.speech_bert_adaptor = BertModel(BertConfig(**bert))
        self.post_bert_proj = torch.nn.Linear(bert["hidden_size"], options["llm_hidden_size"])

    def weigh(self, x):
        if hasattr(self, "conv"):
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        if hasattr(self, "dense_proj"):
            x = torch.relu(self.dense_proj(x))
        return torch.sigmoid(self.weight_proj(x))[..., 0]

    def forward(self, fired: list[np.ndarray]):
        """Returns the tokens of one sample's fired vectors, from a batch without padding."""
        x = torch.tensor(np.stack(fired))[None]
        x = self.cif_output_proj(x) if hasattr(self, "cif_output_proj") else x
        x = self.speech_bert_adaptor(inputs_embeds=torch.relu(self.pre_bert_proj(x))).last_hidden_state
        return torch.relu(self.post_bert_proj(x))[0].numpy()


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_both_ways(name, randomise, to_numpy, assert_close, tmp_path):
    """Compares random folders with torch, one sample at a time, and reads back what was written."""
    changes, more = FOLDERS[name]
    options, bert = TINY | changes, BERT | more
    reference = randomise(Reference(options, bert))
    theirs = to_numpy(reference.state_dict())
    for folder in ("theirs", "ours"):
        (tmp_path / folder).mkdir()
    save_file(theirs, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(options | dict(bert_config=bert_options(**bert))))
    module, params = from_pretrained(tmp_path / "theirs")

    rng, lengths = np.random.default_rng(0), np.array([17, 11, 6])
    features = rng.normal(0, 1.5, (3, 17, 16)).astype(np.float32)
    mask = np.arange(17) < lengths[:, None]
    for targets in (None, np.float32([4.3, 5.3, 2.3])):
        out = apply(module, params, features, mask, targets)
        assert out.mask.shape[1] == module.config.frames(17)
        tail = options["tail_handling_firing_threshold"] if options["apply_tail_handling"] else None
        target = None if targets is None or not options["apply_scaling"] else targets
        with torch.no_grad():
            alphas = reference.weigh(torch.tensor(features)).numpy()
            for b in range(3):
                how = dict(target=None if target is None else target[b], tail=tail if targets is None else None)
                expected = loop(features[b], alphas[b], mask[b], threshold=options["cif_threshold"], **how)[0]
                assert out.cif.fires[b] == len(expected) > 1
                expected = expected[: options.get("max_fires")]
                assert out.mask[b].sum() == len(expected)
                assert_close(out.last_hidden_state[b, : len(expected)], reference(expected), 1e-5, f"sample {b}")
    assert (out.cif.fires > out.mask.sum(1)).any() == ("max_fires" in options)

    save_pretrained(module, params, tmp_path / "ours")
    again, same = from_pretrained(tmp_path / "ours")
    assert again.config == module.config and jax.tree.all(jax.tree.map(np.array_equal, same, params))
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(theirs) - set(written) == {f"speech_bert_adaptor.{name}" for name in UNREAD}
    assert all(np.array_equal(written[key], theirs[key]) for key in written)
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {key: stored[key] for key in options if key != "conv_cif_dropout"} == {
        key: value for key, value in options.items() if key != "conv_cif_dropout"
    }
    found = BertConfig(**stored["bert_config"]).to_dict()
    assert {key: found[key] for key in bert if key != "vocab_size"} == {
        k: v for k, v in bert.items() if k != "vocab_size"
    }


def test_padding_and_batch_do_not_matter(opened):
    """Checks that a sample alone, with one padded vector for its tail, has the tokens that it has in a batch."""
    module, params, arrays, _ = opened
    features, mask = inputs_of(arrays)
    zeroed = features * mask[..., None]  # the convolution reads the first padded vector
    together = apply(module, params, zeroed, mask)
    for b in (1, 2):
        length = int(mask[b].sum()) + 1
        alone = apply(module, params, zeroed[b : b + 1, :length], mask[b : b + 1, :length])
        count = int(alone.mask.sum())
        assert count == together.mask[b].sum()
        np.testing.assert_allclose(
            alone.last_hidden_state[0, :count], together.last_hidden_state[b, :count], rtol=1e-4, atol=1e-5
        )


def test_silence_has_no_token(opened):
    """Checks that a sample without valid vectors has no token and finite numbers."""
    module, params, arrays, _ = opened
    features, mask = inputs_of(arrays)
    out = apply(module, params, features, mask.at[1].set(False))
    assert out.mask[1].sum() == 0 and out.mask[0].sum() > 0
    assert np.isfinite(out.last_hidden_state).all()


def test_full_size_has_the_parameters_of_its_references():
    """Checks the published size: BERT-base without its words and pooler, and the maps around it."""
    config = dataclasses.replace(CFormerConfig(output_size=4096), input_size=256)
    found = sum(x.size for x in jax.tree.leaves(nn.meta.unbox(abstract_params(config, FAMILIES[0]))))
    with torch.device("meta"):
        reference = Reference(to_hf_config(config), to_hf_config(config)["bert_config"])
    unread = [f"speech_bert_adaptor.{name}" for name in UNREAD]
    assert found == sum(p.numel() for name, p in reference.named_parameters() if name not in unread) == 89_322_753


# ---- refusals


def options(**changes) -> dict:
    return TINY | dict(bert_config=BERT | dict(max_position_embeddings=30)) | changes


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(produce_weight_type="gru"), "produce_weight_type='gru'"),
        (dict(speech_adaptor_type="fc"), "speech_adaptor_type='fc'"),
        (dict(conv_cif_width=4), "conv_width 4"),
        (dict(cif_threshold=0), "threshold 0"),
        (dict(add_cif_ctxt_layers=True), "add_cif_ctxt_layers=True"),
        (dict(conv_cif_layer_num=2), "conv_cif_layer_num=2"),
        (dict(dense_cif_units_num=8), "dense_cif_units_num=8"),
        (dict(max_fires=31), "max_fires 31 with 30 positions"),
        (dict(cif_gate="sigmoid"), "cif_gate='sigmoid'"),
        (dict(bert_config=BERT | dict(position_embedding_type="relative_key")), "position_embedding_type"),
        (dict(bert_config=None), "without 'bert_config'"),
        (dict(llm_hidden_size=None), "without 'llm_hidden_size'"),
        (dict(bert_config=BERT | dict(num_attention_heads=5, max_position_embeddings=30)), "24 for 5 heads"),
        (dict(architectures=["BertModel"]), "BertModel"),
    ],
)
def test_options_are_refused_by_name(changes, message):
    assert from_hf_config(options()).max_length == 30
    with pytest.raises(ConfigError, match=message):
        from_hf_config(options(**changes))


def test_inputs_are_refused():
    config = dataclasses.replace(from_hf_config(options()), num_layers=1)
    key = jax.random.key(0)
    with pytest.raises(DataError, match="features of width 15"):
        config.make().init(key, jnp.ones((1, 4, 15)))
    with pytest.raises(ConfigError, match="31 vectors for a transformer of 30 positions"):
        config.make().init(key, jnp.ones((1, 31, 16)))
    bounded = dataclasses.replace(config, max_fires=30)
    assert jax.eval_shape(bounded.make().init, key, jnp.ones((1, 31, 16)))
    assert bounded.frames(31) == 30 == config.frames(30) and bounded.frames(4) == 4
    np.testing.assert_array_equal(bounded.frames(np.array([31, 4])), [30, 4])
    with pytest.raises(ConfigError, match="output_size None"):
        CFormerConfig().make()
