"""The P-Former against losses and gradients recorded from its authors' code: tests/goldens/pformer.json."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from qformer_reference import golden
from safetensors.numpy import save_file
from transformers import BertConfig, BertModel

from mllm_jax.checkpoints.hf import hub_tensors, read_weights
from mllm_jax.checkpoints.table import Table, Weight
from mllm_jax.layers.head import HeadInputs
from mllm_jax.llms import opt
from mllm_jax.models.pformer_pretraining import PFormerPretrainingConfig
from mllm_jax.projectors.pformer import PFormerConfig
from mllm_jax.training.objectives.pformer_losses import PFormerObjective, PromptGuided
from mllm_jax.training.step import make_apply

LOSSES = {"loss_c": "loss_contrast", "loss_vq": "loss_nearness", "loss_lm": "loss_language"}


@dataclasses.dataclass(frozen=True)
class Drawn(PFormerObjective):
    """Uses the masked tokens that the reference drew."""

    drawn: tuple = ()

    def mask(self, batch, key):
        return jnp.asarray(self.drawn)


def affine(name: str, path: str) -> tuple[Weight, Weight]:
    return Weight(f"{name}.weight", f"{path}/scale"), Weight(f"{name}.bias", f"{path}/bias")


def linear(name: str, path: str, kernel: str = "o i -> i o", bias: str = "", **sizes: int) -> tuple[Weight, Weight]:
    return (
        Weight(f"{name}.weight", f"{path}/kernel", kernel, sizes),
        Weight(f"{name}.bias", f"{path}/bias", bias, sizes if bias else {}),
    )


def bert_weights(c: PFormerConfig, hub: str, path: str) -> tuple[Weight, ...]:
    layer, ours, h = f"{hub}encoder.layer.{{layer}}", f"{path}layers", c.hidden_size // c.num_heads
    own = f"{layer}.attention"
    return (
        Weight(f"{hub}embeddings.word_embeddings.weight", f"{path}token_embedding/embedding"),
        Weight(f"{hub}embeddings.position_embeddings.weight", f"{path}position_embedding/embedding"),
        *affine(f"{hub}embeddings.LayerNorm", f"{path}embedding_norm"),
        *(
            weight
            for name in ("query", "key", "value")
            for weight in linear(
                f"{own}.self.{name}", f"{ours}/attention/{name[0]}", "(n h) e -> e n h", "(n h) -> n h", h=h
            )
        ),
        *linear(f"{own}.output.dense", f"{ours}/attention/out", "e (n h) -> n h e", h=h),
        *affine(f"{own}.output.LayerNorm", f"{ours}/attention/norm"),
        *linear(f"{layer}.intermediate.dense", f"{ours}/text_mlp/mlp/up"),
        *linear(f"{layer}.output.dense", f"{ours}/text_mlp/mlp/down"),
        *affine(f"{layer}.output.LayerNorm", f"{ours}/text_mlp/norm"),
    )


def table(config: PFormerPretrainingConfig) -> Table:
    c = config.prompter
    llm = [
        dataclasses.replace(w, name=f"opt_model.{w.name}", path=f"llm/{w.path}") for w in opt.table(config.llm).weights
    ]
    return Table(
        (
            *bert_weights(c, "Pformer.", "prompter/"),
            *linear(
                "Pformer.cls_proj", "prompter/prompt_projection", "(q o) i -> i q o", "(q o) -> q o", q=c.num_queries
            ),
            *linear("Pformer.pooler.0", "prompter/prompt_dense"),
            *linear("Pformer.opt_proj", "prompter/language_projection"),
            *linear("Pformer.text_proj", "text_projection"),
            Weight("Pformer.temp", "temperature"),
            *llm,
        )
    )


def with_first_type(tensors: dict, prefix: str = "") -> dict:
    """Adds BERT's vector of the first of two texts, which all tokens get, to the positions."""
    types = tensors.pop(f"{prefix}embeddings.token_type_embeddings.weight")
    name = f"{prefix}embeddings.position_embeddings.weight"
    return tensors | {name: tensors[name] + types[0]}


def loaded(folder, table: Table, tensors: dict, abstract) -> dict:
    save_file({name: np.array(t, order="C") for name, t in tensors.items()}, folder / "model.safetensors")
    return read_weights(folder, table, nn.meta.unbox(abstract))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Returns (arrays, config, parameters, batch)."""
    arrays, sizes = golden("pformer")
    theirs = sizes["opt"]
    llm = opt.from_hf_config(
        dict(
            architectures=["OPTForCausalLM"],
            model_type="opt",
            vocab_size=theirs["vocab"],
            hidden_size=theirs["hidden"],
            num_hidden_layers=theirs["layers"],
            num_attention_heads=theirs["heads"],
            ffn_dim=theirs["ffn"],
            max_position_embeddings=theirs["max_pos"],
        )
    )
    prompter = PFormerConfig(
        theirs["hidden"],
        sizes["vocab"],
        sizes["hidden"],
        sizes["layers"],
        sizes["heads"],
        sizes["inter"],
        sizes["num_query_token"],
        max_length=sizes["max_pos"],
        mask_token_id=sizes["mask_token_id"],
    )
    config = PFormerPretrainingConfig(prompter, llm, sizes["embed_dim"])
    names = dict(tokens="bert_input_ids", segments="bert_attention_mask")
    names |= dict(llm_tokens="opt_input_ids", llm_segments="opt_attention_mask")
    batch = {ours: jnp.asarray(arrays[f"inputs/{name}"], jnp.int32) for ours, name in names.items()}
    abstract = jax.eval_shape(lambda: config.make().init(jax.random.key(0), batch, method="touch"))["params"]
    tensors = {n.removeprefix("weights/"): arrays[n] for n in arrays.files if n.startswith("weights/")}
    # An index of each position, the tied output table, and a copy of it.
    embedded = tensors["opt_model.model.decoder.embed_tokens.weight"]
    del tensors["Pformer.embeddings.position_ids"]
    np.testing.assert_array_equal(tensors.pop("opt_vocab_embeddings"), embedded)
    np.testing.assert_array_equal(tensors.pop("opt_model.lm_head.weight", embedded), embedded)
    tensors = with_first_type(tensors, "Pformer.")
    return arrays, config, loaded(tmp_path_factory.mktemp("pformer"), table(config), tensors, abstract), batch


def test_losses_and_gradients(recorded, assert_close):
    arrays, config, params, batch = recorded
    objective, apply = Drawn(drawn=tuple(map(tuple, arrays["inputs/bernoulli_mask"]))), make_apply(config.make())

    @jax.jit
    def gradient(params, shares):
        def total(params):
            loss, metrics = objective.loss(apply, params, batch, None)
            return sum(shares[i] * metrics[name] for i, name in enumerate(LOSSES.values())), (loss, metrics)

        return jax.value_and_grad(total, has_aux=True)(params)

    counted = {"loss": 0, "loss_c": 0, "loss_vq": 0, "loss_lm": 0}
    for kind in ("loss", "loss_vq", "loss_lm"):
        (value, (loss, metrics)), grads = gradient(params, jnp.float32([kind in ("loss", name) for name in LOSSES]))
        assert_close(value, arrays[f"outputs/{kind}"], 1e-5, kind)
        ours = hub_tensors(table(config), grads)
        for name in (n for n in arrays.files if n.startswith(f"grads/{kind}/")):
            assert_close(ours[name.removeprefix(f"grads/{kind}/")](), arrays[name], 1e-4, name)
            counted[kind] += 1
    assert counted == {"loss": 7, "loss_c": 0, "loss_vq": 2, "loss_lm": 1}
    assert_close(loss, arrays["outputs/loss"], 1e-5, "sum")
    for theirs, name in LOSSES.items():
        assert_close(metrics[name], arrays[f"outputs/{theirs}"], 1e-5, name)
    assert metrics["weight"] == 3 and metrics["temperature"] == np.float32(0.07)


def test_what_it_makes_of_captions(recorded, assert_close):
    arrays, config, params, batch = recorded
    module = config.make()

    @jax.jit
    def run(params, masked):
        made = module.apply({"params": params}, batch | {"masked": masked}, method="encode_texts")
        return made, module.apply({"params": params}, made.row).logits

    masked = jnp.asarray(arrays["inputs/bernoulli_mask"])
    made, logits = run(params, masked)
    assert_close(made.prompts, arrays["outputs/inputs_opt"], 1e-5, "prompts")
    assert_close(made.text, arrays["outputs/text_feat"], 1e-5, "captions")
    assert_close(made.text @ made.text.T / made.temperature, arrays["outputs/sim_over_temp"], 1e-5, "similarity")
    embedded = arrays["weights/opt_model.model.decoder.embed_tokens.weight"]
    chosen = embedded[arrays["outputs/vq_indices"]].reshape(made.nearest.shape)
    np.testing.assert_array_equal(made.nearest, chosen)
    # In the padding of a row, the reference has positions of its own.
    real = arrays["outputs/opt_attention_mask"].astype(bool)
    assert_close(logits[real], arrays["outputs/opt_logits"][real], 1e-5, "logits")
    has_loss = arrays["outputs/opt_labels"] != -100
    np.testing.assert_array_equal(made.row["loss_weights"], has_loss)
    np.testing.assert_array_equal(made.row["tokens"][has_loss], arrays["outputs/opt_labels"][has_loss])
    np.testing.assert_array_equal(made.row["segments"], real)
    whole = run(params, jnp.zeros_like(masked))[0].prompts
    assert_close(whole, arrays["outputs/unmasked/inputs_opt_ref"], 1e-5, "prompts of whole captions")


def test_alignment_with_media(recorded, assert_close):
    """Checks the recorded distance of a projector's output to the prompts; its gradient does not reach the prompts."""
    arrays, _, _, batch = recorded
    probe, prompts = (jnp.asarray(arrays[n]) for n in ("inputs/align_probe", "outputs/unmasked/inputs_opt_ref"))

    def apply(params, batch, method=None):
        if method == "head_inputs":
            return HeadInputs(jnp.zeros((*batch["tokens"].shape, 40)), jnp.eye(40))
        assert method == "guide"
        row = batch | dict(loss_weights=jnp.ones(batch["tokens"].shape))
        return dataclasses.make_dataclass("Guided", ("media", "prompts", "row"))(*params, row)

    both = jax.value_and_grad(lambda pair: PromptGuided().loss(apply, pair, batch, None), has_aux=True)
    (loss, metrics), (on_media, on_prompts) = both((probe, prompts))
    assert_close(metrics["loss_alignment"], arrays["outputs/align/mse_times_10"], 1e-5, "alignment")
    assert_close(metrics["loss_language"], np.log(40), 1e-5, "language")
    assert_close(loss, arrays["outputs/align/mse_times_10"] + np.log(40), 1e-5, "sum")
    assert_close(on_media, 20 * (probe - prompts) / probe.size, 1e-5, "gradient")
    assert not on_prompts.any()


def test_prompts_of_any_number(randomise, to_numpy, tmp_path, assert_close):
    """Checks five prompts of captions of seven positions with transformers' BERT; the recorded code has seven."""
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
    theirs = BertConfig(vocab_size=30, max_position_embeddings=12, **sizes)
    bert = randomise(BertModel(theirs, add_pooling_layer=False))
    heads = randomise(
        torch.nn.ModuleList([torch.nn.Linear(24, 5 * 24), torch.nn.Linear(24, 24), torch.nn.Linear(24, 20)]), 1
    )
    config = PFormerConfig(20, 29, 24, 2, 3, 40, 5, max_length=12)  # its mask follows the vocabulary, at 29
    rng = np.random.default_rng(0)
    tokens, segments = rng.integers(0, 29, (3, 7)), np.arange(7)[None] < np.array([[7], [4], [1]])
    masked = np.zeros((3, 7), bool)
    masked[0, 2] = masked[1, 3] = True
    with torch.no_grad():
        ids, seen = torch.from_numpy(np.where(masked, 29, tokens)), torch.from_numpy(segments.astype(int))
        first = bert(ids, attention_mask=seen).last_hidden_state[:, 0]
        prompts = heads[2](torch.tanh(heads[1](heads[0](first).reshape(3, 5, 24))))
    names = ("prompt_projection", "prompt_dense", "language_projection")
    kernels = (dict(kernel="(q o) i -> i q o", bias="(q o) -> q o", q=5), {}, {})
    weights = [w for i, name in enumerate(names) for w in linear(f"heads.{i}", name, **kernels[i])]
    tensors = with_first_type(to_numpy(bert.state_dict()))
    tensors = {f"bert.{n}": t for n, t in tensors.items()} | to_numpy(
        {f"heads.{n}": t for n, t in heads.state_dict().items()}
    )
    module = config.make()
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(tokens))["params"]
    params = loaded(tmp_path, Table((*bert_weights(config, "bert.", ""), *weights)), tensors, abstract)

    @jax.jit
    def run(params, tokens, segments, masked):
        cls = module.apply({"params": params}, tokens, segments, masked, method="read")
        return (
            cls,
            module.apply({"params": params}, cls, method="prompt"),
            module.apply({"params": params}, tokens, segments),
        )

    cls, made, whole = run(params, jnp.asarray(tokens), jnp.asarray(segments, jnp.int32), jnp.asarray(masked))
    assert_close(cls, first, 1e-5, "first token")
    assert_close(made, prompts, 1e-5, "prompts")
    assert np.abs(whole - made).max(axis=(1, 2))[:2].min() > 1e-2
    np.testing.assert_allclose(whole[2], made[2], atol=1e-6)
