"""ChatGLM2 against stored outputs of its checkpoints' own code, and what is read, written as GlmForCausalLM."""

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
from safetensors.numpy import save_file

from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.llms.glm import chatglm_table
from mllm_jax.models.registry import from_pretrained, save_pretrained

GOLDEN = Path(__file__).parents[1] / "goldens" / "chatglm2_6b"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN.with_suffix(".npz"))


@pytest.fixture(scope="module")
def loaded(golden, tmp_path_factory):
    """(module, parameters) from a folder as the hub has it: fused tensors, and frequencies that are no weights."""
    folder = tmp_path_factory.mktemp("chatglm2")
    names = [name for name in golden.files if name.startswith("weights/")]
    save_file({name.removeprefix("weights/"): golden[name] for name in names}, folder / "model.safetensors")
    config = json.loads(GOLDEN.with_suffix(".json").read_text("utf-8"))["config"]
    config |= dict(architectures=["ChatGLMModel"], model_type="chatglm", auto_map={"AutoModel": "modeling_chatglm.X"})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return from_pretrained(folder)


def inputs(golden):
    """Rows with padding on the left: tokens, positions, segments."""
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
    assert_close(theirs, golden["outputs/nopad/logits"], 1e-4, "transformers with what we wrote")
