"""InstructBLIP's training loss and gradients against LAVIS' own, see tests/goldens/instructblip_qformer.json."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from qformer_reference import LAVIS, golden, golden_config
from safetensors.numpy import save_file

from mllm_jax.checkpoints.hf import hub_tensors, read_weights
from mllm_jax.checkpoints.table import Table, nested
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.llms import llama
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch, Connection
from mllm_jax.models.instructblip import InstructBlipConfig
from mllm_jax.projectors.qformer_hub import qformer_weights
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.step import make_apply


def test_loss_and_gradients(tmp_path, assert_close):
    arrays, sizes = golden("instructblip_qformer")
    s = sizes["llm"]
    # Not run: the reference was recorded from its features on.
    tower = ViTConfig(8, 4, sizes["vision_width"], num_layers=1, num_heads=2, mlp_size=8, class_token=True)
    config = InstructBlipConfig(
        {"image": Branch(tower, golden_config(sizes, output_size=s["hidden"]), Connection(class_token=True))},
        llm=DecoderConfig(
            s["vocab"], s["hidden"], s["layers"], s["heads"], s["heads"], mlp_size=s["inter"],
            tie_word_embeddings=False, dialect=DecoderDialect(family="LlamaForCausalLM"),
        ),
    )  # fmt: skip
    table = Table(
        qformer_weights(config.image.projector, **LAVIS) + nested(llama.table(config.llm), "llm_model.", "llm/")
    )
    batch = laid_out(arrays, sizes["num_query_token"])
    x = arrays["inputs/image_embeds"]
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)

    def features(norm):
        return (x * norm["scale"] + norm["bias"])[:, None]

    norm = {ours: arrays[f"weights/ln_vision.{name}"] for ours, name in (("scale", "weight"), ("bias", "bias"))}
    module = config.make()
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), batch | {"features": features(norm)}))["params"]
    left = ("ln_vision", "Qformer.bert.embeddings.position_ids")
    kept = {n.removeprefix("weights/"): arrays[n] for n in arrays.files if n.startswith("weights/")}
    kept = {n: t.copy(order="C") for n, t in kept.items() if not n.startswith(left) and "inv_freq" not in n}
    save_file(kept, tmp_path / "model.safetensors")
    params = read_weights(tmp_path, table, nn.meta.unbox(abstract))

    def loss(params, norm):
        read = batch | {"features": features(norm)}
        value, _ = NextToken().loss(make_apply(module), params, read, None)
        return value, module.apply({"params": params}, read).logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, norm)
    real = arrays["outputs/llm_attention_mask"] > 0
    assert 0 < real.sum() < real.size
    assert_close(np.asarray(logits)[real], arrays["outputs/llm_logits"][real], 1e-4, "logits")
    assert_close(value, arrays["outputs/loss"], 1e-4, "loss")
    mine = hub_tensors(table, grads[0])
    names = [name.removeprefix("grads/") for name in arrays.files if name.startswith("grads/")]
    assert len(names) == 6
    for name in names:
        ours = grads[1]["bias"] if name == "ln_vision.bias" else mine[name]()
        assert_close(ours, arrays[f"grads/{name}"], 1e-4, name)


def laid_out(arrays, queries: int) -> dict:
    """Returns queries, the instruction, the answer without its first token; padding is moved to the end."""
    rows, length = arrays["outputs/llm_labels"].shape
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "segments", "positions")}
    batch["media_index"] = np.full((rows, length), -1, np.int32)
    for row in range(rows):
        asked, said = (arrays[f"inputs/llm_{kind}_ids"][row] for kind in ("input", "output"))
        asked = asked[arrays["inputs/llm_input_mask"][row] > 0]
        said = said[arrays["inputs/llm_output_mask"][row] > 0][1:]
        text = np.concatenate([asked, said])
        stop = queries + len(text)
        batch["tokens"][row, queries:stop], batch["segments"][row, :stop] = text, 1
        batch["positions"][row, :stop] = np.arange(stop)
        batch["media_index"][row, :queries] = np.arange(queries)
    batch["loss_weights"] = (arrays["outputs/llm_labels"] != -100).astype(np.float32)
    for ours, theirs in (("tokens", "input_ids"), ("segments", "attention_mask")):
        batch[f"query_{ours}"] = arrays[f"inputs/qformer_{theirs}"][:, None].astype(np.int32)
    # The same tokens carry loss as in the reference.
    has_loss = batch["loss_weights"] > 0
    assert (batch["tokens"][has_loss] == arrays["outputs/llm_labels"][has_loss]).all()
    return {name: jnp.asarray(array) for name, array in batch.items()}
