"""ChatGLM2 against stored outputs of its checkpoints' own code, and against GlmForCausalLM.

That class, with renamed weights, is the reference for configs that the stored outputs lack; it reproduces them first.
We write its folders, because no class of transformers opens ChatGLM's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from test_decoder_parity import LENGTHS, examples, logits_of, packed, padded
from tiny_language import answers, language

from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.generation.options import Options
from mllm_jax.llms.glm import chatglm_table
from mllm_jax.models.registry import from_pretrained, save_pretrained

GOLDEN = Path(__file__).parents[1] / "goldens" / "chatglm2_6b"
SIZES = dict(
    padded_vocab_size=61,
    hidden_size=24,
    ffn_hidden_size=36,
    num_layers=2,
    num_attention_heads=6,
    kv_channels=4,
    layernorm_epsilon=1e-2,  # large, so that a wrong epsilon shows
    seq_length=64,
    multi_query_attention=True,
    multi_query_group_num=2,
    add_qkv_bias=True,
    original_rope=True,
    eos_token_id=2,
    pad_token_id=0,
)
CASES = {
    "as published": SIZES,
    "one group, no bias": SIZES | dict(multi_query_group_num=1, add_qkv_bias=False, num_layers=3),
    "every head its keys": SIZES | dict(multi_query_attention=False, layernorm_epsilon=1e-5, ffn_hidden_size=52),
    "wide heads": SIZES | dict(kv_channels=12, multi_query_group_num=3, hidden_size=32),
}
# ChatGLM's name -> Glm's.
LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
WHOLE = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}


def glm_of(config: dict) -> transformers.GlmForCausalLM:
    """Returns the reference with the sizes of a ChatGLM config."""
    heads, grouped = config["num_attention_heads"], config["multi_query_attention"]
    theirs = transformers.GlmConfig(
        vocab_size=config["padded_vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["ffn_hidden_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config["multi_query_group_num"] if grouped else heads,
        head_dim=config["kv_channels"],
        rms_norm_eps=config["layernorm_epsilon"],
        max_position_embeddings=config["seq_length"],
        attention_bias=config["add_qkv_bias"],
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
        pad_token_id=config.get("pad_token_id", 0),
        eos_token_id=config.get("eos_token_id", 2),
        attn_implementation="eager",
    )
    return transformers.GlmForCausalLM(theirs).eval()


def names_of(reference: transformers.GlmForCausalLM) -> dict[str, tuple[str, ...]]:
    """Returns {ChatGLM's name: Glm's names, whose tensors it concatenates}."""
    names = {theirs: (ours,) for theirs, ours in WHOLE.items()}
    for i in range(reference.config.num_hidden_layers):
        theirs, ours = f"transformer.encoder.layers.{i}", f"model.layers.{i}"
        names |= {f"{theirs}.{name}": (f"{ours}.{other}",) for name, other in LAYER.items()}
        for kind in ("weight", "bias") if reference.config.attention_bias else ("weight",):
            parts = tuple(f"{ours}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            names[f"{theirs}.self_attention.query_key_value.{kind}"] = parts
    return names


def test_the_reference_gives_the_stored_outputs(golden, assert_close):
    config = json.loads(GOLDEN.with_suffix(".json").read_text("utf-8"))["config"]
    reference = glm_of(config)
    state = reference.state_dict()
    for name, parts in names_of(reference).items():
        sizes = [state[part].shape[0] for part in parts]
        pieces = torch.tensor(golden[f"weights/{name}"]).split(sizes)
        state |= dict(zip(parts, pieces, strict=True))
    reference.load_state_dict(state)
    found = logits_of(reference, torch.tensor(golden["inputs/input_ids_nopad"]))
    assert_close(found, golden["outputs/nopad/logits"], 1e-5)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory, randomise):
    """Returns (reference, a folder with its weights in the hub's format of ChatGLM)."""
    config = CASES[request.param]
    reference = randomise(glm_of(config))
    for name, parameter in reference.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data.mul_(0.5)  # small, because of bfloat16; see `test_decoder_parity.test_bfloat16`
    folder, state = tmp_path_factory.mktemp("chatglm2"), reference.state_dict()
    tensors = {name: torch.cat([state[p] for p in parts]).numpy() for name, parts in names_of(reference).items()}
    tensors["transformer.rotary_pos_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, folder / "model.safetensors")
    hub = dict(architectures=["ChatGLMModel"], model_type="chatglm", rmsnorm=True, post_layer_norm=True)
    (folder / "config.json").write_text(json.dumps(config | hub), "utf-8")
    return reference, folder


def test_more_configs_padded_packed_and_written(pair, assert_close, tmp_path):
    reference, folder = pair
    module, params = from_pretrained(folder)
    texts = examples()
    alone = [logits_of(reference, torch.tensor(text[None]))[0] for text in texts]
    tokens, mask = padded(texts)
    packed_tokens, positions, segments, spans = packed(texts, [(0, 1), (1, 0)])
    counted = np.tile(np.arange(32), (2, 1))
    stacked = [np.concatenate(two) for two in ((tokens, packed_tokens), (counted, positions), (mask, segments))]
    ours = np.asarray(jax.jit(module.apply)({"params": params}, *stacked))
    for row, n in enumerate(LENGTHS):
        assert_close(ours[row, :n], alone[row], 1e-4, f"right padding, row {row}")
    for (row, e), span in spans.items():
        assert_close(ours[2 + row, span], alone[e], 1e-4, f"packed, row {row} text {e}")

    prompts = [text[:n] for text, n in zip(texts, (12, 5), strict=True)]
    found = answers(language(module, params), [prompt.tolist() for prompt in prompts], Options(32, ignore_eos=True))
    for prompt, answer in zip(prompts, found, strict=True):
        greedy = dict(do_sample=False, max_new_tokens=32, min_new_tokens=32, eos_token_id=None)
        said = reference.generate(torch.tensor(prompt[None]), **greedy)[0, len(prompt) :]
        assert list(answer.tokens) == said.tolist()

    save_pretrained(module, params, tmp_path / "glm")
    written, state = load_file(tmp_path / "glm" / "model.safetensors"), reference.state_dict()
    assert written.keys() == state.keys()
    assert all((written[name] == tensor.numpy()).all() for name, tensor in state.items())
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "glm", attn_implementation="eager").eval()
    assert_close(logits_of(opened, torch.tensor(texts[0][None]))[0], alone[0], 1e-5, "the folder written here")


def test_more_configs_in_bfloat16(pair, assert_close):
    reference, folder = pair
    module, params = from_pretrained(folder, dtype="bfloat16")
    text = examples()[0][None]
    exact = logits_of(reference, torch.tensor(text))
    ours = np.asarray(jax.jit(module.apply)({"params": params}, text))
    assert_close(ours, exact, 2e-2, "against float32")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN.with_suffix(".npz"))


@pytest.fixture(scope="module")
def loaded(golden, tmp_path_factory):
    """Returns (module, parameters) from a folder in the hub's format: fused tensors, and frequencies as buffers."""
    folder = tmp_path_factory.mktemp("chatglm2")
    names = [name for name in golden.files if name.startswith("weights/")]
    save_file({name.removeprefix("weights/"): golden[name] for name in names}, folder / "model.safetensors")
    config = json.loads(GOLDEN.with_suffix(".json").read_text("utf-8"))["config"]
    config |= dict(architectures=["ChatGLMModel"], model_type="chatglm", auto_map={"AutoModel": "modeling_chatglm.X"})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return from_pretrained(folder)


def inputs(golden):
    """Returns rows padded on the left: tokens, positions, segments."""
    return tuple(golden[f"inputs/{name}"].astype(np.int32) for name in ("input_ids", "position_ids", "attention_mask"))


def test_logits(golden, loaded, assert_close):
    module, params = loaded
    tokens, positions, real = inputs(golden)
    ours = np.asarray(jax.jit(module.apply)({"params": params}, tokens, positions, real))
    assert real.sum() < real.size
    assert_close(ours[real > 0], golden["outputs/left_pad/logits"][real > 0], 1e-4, "padding on the left")
    whole = golden["inputs/input_ids_nopad"]
    cache = module.config.make_cache(2, 12)
    logits, cache = module.apply({"params": params}, whole, cache=cache)
    assert_close(logits, golden["outputs/nopad/logits"], 1e-4, "no padding")
    logits, _ = module.apply({"params": params}, golden["inputs/next_token"], cache=cache)
    assert_close(logits, golden["outputs/nopad/step_logits"], 1e-4, "a step with the cache")


def test_loss_and_gradients(golden, loaded, assert_close):
    module, params = loaded
    tokens, positions, real = inputs(golden)
    labels = golden["inputs/labels"][:, 1:]

    def loss(p):
        logits = module.apply({"params": p}, tokens, positions, real)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.where(labels != -100, losses, 0).sum() / (labels != -100).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert_close(value, golden["outputs/left_pad/loss"], 1e-4, "loss")
    mine = hub_tensors(chatglm_table(module.config), grads)
    stored = [name.removeprefix("grads/") for name in golden.files if name.startswith("grads/")]
    assert len(stored) == 4
    for name in stored:
        assert_close(mine[name](), golden[f"grads/{name}"], 1e-3, name)


def test_written_as_glm(golden, loaded, tmp_path, assert_close):
    module, params = loaded
    save_pretrained(module, params, tmp_path / "glm")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "glm").eval()
    assert isinstance(opened, transformers.GlmForCausalLM)
    with torch.no_grad():
        theirs = opened(torch.tensor(golden["inputs/input_ids_nopad"])).logits
    assert_close(theirs, golden["outputs/nopad/logits"], 1e-4, "transformers with the written folder")
