"""Output projectors and their losses against recordings of GILL and NExT-GPT, and against torch.

tests/goldens/{gill_textfc,nextgpt_textfc_transformer,nextgpt_current_projector}.json describe the recordings.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import linen as nn
from qformer_reference import golden
from safetensors.numpy import save_file
from torch.nn import functional as F

from mllm_jax.checkpoints.hf import read_weights
from mllm_jax.checkpoints.table import HEAD_BIAS, INTO_HEADS, OUT_OF_HEADS, Table, Weight, linear, norm
from mllm_jax.models.registry import abstract_init
from mllm_jax.output_projectors.linear import LinearOutputProjectorConfig
from mllm_jax.output_projectors.query_connector import QueryConnectorConfig
from mllm_jax.output_projectors.states import PromptStatesConfig
from mllm_jax.output_projectors.transformer import TransformerMapperConfig
from mllm_jax.training.objectives.alignment_losses import condition_loss
from mllm_jax.training.objectives.diffusion_losses import diffusion_loss, min_snr_weights, signal_to_noise

OUTPUT, GRADIENT = 1e-5, 1e-4


def loaded(folder, config, weights, tensors: dict[str, np.ndarray]) -> dict:
    """Reads a reference's tensors through a table and the engine that reads folders."""
    save_file(tensors, folder / "model.safetensors")
    states = jnp.zeros((1, config.tokens, config.input_size))
    return read_weights(folder, Table(tuple(weights)), abstract_init(config.make(), states, states))


# ---- the mapper of GILL and NExT-GPT


def torch_attention(name: str, path: str, width: int, heads: int) -> list[Weight]:
    """Returns the weights of torch's `nn.MultiheadAttention`, which stores queries, keys and values in one tensor."""
    found, sizes = [], {"n": heads}
    for i, letter in enumerate("qkv"):
        rows = (i * width, (i + 1) * width)
        found.append(Weight(f"{name}.in_proj_weight", f"{path}/{letter}/kernel", INTO_HEADS, sizes, rows))
        found.append(Weight(f"{name}.in_proj_bias", f"{path}/{letter}/bias", HEAD_BIAS, sizes, rows))
    return found + linear(f"{name}.out_proj", f"{path}/out", OUT_OF_HEADS, sizes)


def mapper_table(config: TransformerMapperConfig, name: str, first: str, last: str) -> list[Weight]:
    """Returns the weights of a mapper; `first` and `last` are the reference's names of the linear maps around it."""
    size = (config.hidden_size, config.num_heads)
    found = [Weight(f"{name}.query_embs", "query", "1 q e -> q e")]
    found += linear(f"{name}.{first}", "input") + linear(f"{name}.{last}", "out")
    for side, norms in (("encoder", ("attention", "mlp")), ("decoder", ("attention", "cross_attention", "mlp"))):
        layer = f"{name}.tfm.{side}.layers.{{layer}}"
        found += torch_attention(f"{layer}.self_attn", f"{side}/attention", *size)
        found += linear(f"{layer}.linear1", f"{side}/mlp/up") + linear(f"{layer}.linear2", f"{side}/mlp/down")
        for i, part in enumerate(norms, 1):
            found += norm(f"{layer}.norm{i}", f"{side}/{part}_norm")
        found += norm(f"{name}.tfm.{side}.norm", f"{side}_norm")
    cross = f"{name}.tfm.decoder.layers.{{layer}}.multihead_attn"
    return found + torch_attention(cross, "decoder/cross_attention", *size)


def tensors_of(arrays, name: str) -> dict[str, np.ndarray]:
    prefix = f"weights/{name}."
    return {key.removeprefix("weights/"): arrays[key] for key in arrays.files if key.startswith(prefix)}


def mapper(folder, arrays, sizes, name: str, first: str, last: str, tokens: int):
    """Returns the mapper of a recording: (config, its table, its parameters)."""
    layers = {key.split(".layers.")[1].split(".")[0] for key in arrays.files if f"{name}.tfm.encoder.layers." in key}
    config = TransformerMapperConfig(
        tokens=tokens,
        input_size=sizes["llm_dim"],
        output_tokens=sizes["n_out"],
        output_size=sizes["out_dim"],
        hidden_size=sizes["hidden_dim"],
        num_layers=len(layers),
    )
    weights = mapper_table(config, name, first, last)
    return config, weights, loaded(folder, config, weights, tensors_of(arrays, name))


def check_gradients(grads: dict, weights: list[Weight], arrays, check) -> int:
    """Compares the gradient with each recorded one, in the reference's layout; returns their number."""
    found = 0
    for key in [key for key in arrays.files if key.startswith("grads/") and "emb.weight" not in key]:
        wanted, name = arrays[key], key.removeprefix("grads/")
        for weight in weights:
            layer = None
            if "{layer}" in weight.name:
                before, after = weight.name.split("{layer}")
                if not (name.startswith(before) and name.endswith(after)):
                    continue
                layer = int(name[len(before) : len(name) - len(after)])
            elif name != weight.name:
                continue
            leaf = grads
            for part in weight.path.split("/"):
                leaf = leaf[part]
            leaf = np.asarray(leaf if layer is None else leaf[layer])
            left, _, right = weight.pattern.partition(" -> ")
            sizes = {k: v for k, v in weight.sizes.items() if k in right.split()} if right else {}
            leaf = rearrange(leaf, f"{right} -> {left}", **sizes) if right else leaf
            part = wanted if weight.rows is None else wanted[slice(*weight.rows)]
            if np.abs(part).max() > 1e-6:  # the keys' bias cancels in the softmax
                check(leaf, part, GRADIENT, f"gradient of {weight.path}")
            found += 1
    return found


def test_the_mapper_equals_nextgpt(assert_close, tmp_path):
    """Checks the condition, the alignment loss, and gradients of weights and of the signals' embeddings."""
    arrays, sizes = golden("nextgpt_textfc_transformer")
    config, weights, params = mapper(tmp_path, arrays, sizes, "fcs.0", "fc", "model", sizes["n_sig"])
    signals = sizes["first_sig"] + np.arange(sizes["n_sig"])
    targets = arrays["inputs/targets"]
    start = (targets == signals[0]).argmax(axis=1)
    layer = sizes["layers"][0]
    names = sorted(key for key in arrays.files if key.startswith("inputs/llm_hidden_"))
    states = np.stack([h[s : s + len(signals)] for h, s in zip(arrays[names[layer]], start, strict=True)])
    np.testing.assert_array_equal(states, arrays["outputs/fc0/hidden_in"])

    def loss(params, table):
        embeddings = jnp.broadcast_to(table[signals], states.shape)
        made = config.make().apply({"params": params}, states, embeddings)
        return condition_loss(made, arrays["inputs/caption_embeddings"]), made

    (value, made), (grads, of_table) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        params, arrays["weights/emb.weight"]
    )
    assert_close(made, arrays["outputs/embeddings"], OUTPUT, "condition")
    assert_close(value, arrays["outputs/mse_loss"], OUTPUT, "loss")
    assert check_gradients(grads, weights, arrays, assert_close) >= 3
    assert_close(of_table, arrays["grads/emb.weight"], GRADIENT, "gradient of the embedding")


def test_gill(assert_close, tmp_path):
    """Checks both modes: the mapper, and the linear map, which ignores embeddings and keeps the first vectors."""
    arrays, sizes = golden("gill_textfc")
    states, embeddings = arrays["inputs/x"], arrays["inputs/input_embs"]
    config, _, params = mapper(tmp_path, arrays, sizes, "mapper", "fc", "model", sizes["n_sig"])
    made = jax.jit(config.make().apply)({"params": params}, states, embeddings)
    assert_close(made, arrays["outputs/gill_mapper"], OUTPUT, "mapper")

    config = LinearOutputProjectorConfig(
        tokens=sizes["n_sig"],
        input_size=sizes["llm_dim"],
        output_tokens=sizes["n_out_linear"],
        output_size=sizes["out_dim"],
    )
    folder = tmp_path / "linear"
    folder.mkdir()
    weights = [
        Weight("linear.model.weight", "out/kernel", "(r o) i -> i r o", {"r": 1}),
        Weight("linear.model.bias", "out/bias", "(r o) -> r o", {"r": 1}),
    ]
    params = loaded(folder, config, weights, tensors_of(arrays, "linear"))
    assert_close(config.make().apply({"params": params}, states), arrays["outputs/linear"], OUTPUT, "linear")


def test_the_present_nextgpt_and_its_diffusion_loss(assert_close, tmp_path):
    """Checks the mapper over all positions from the first signal to the last, and min-SNR as it should be."""
    arrays, sizes = golden("nextgpt_current_projector")
    signals, labels = sizes["n_sig"], arrays["inputs/labels"]
    tokens = 2 * signals - 1
    start = (labels == sizes["first_sig"]).argmax(axis=1)
    cut = [slice(s, s + tokens) for s in start]
    states = np.stack([row[c] for row, c in zip(arrays["inputs/llm_hidden_last"], cut, strict=True)])
    embeddings = np.stack([arrays["weights/emb.weight"][row[c]] for row, c in zip(labels, cut, strict=True)])
    config, weights, params = mapper(tmp_path, arrays, sizes, "proj", "in_fc", "out_fc", tokens)

    def loss(params):
        made = config.make().apply({"params": params}, states, embeddings)
        return condition_loss(made, arrays["inputs/caption_embeddings"]), made

    (value, made), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close(made, arrays["outputs/projected"], OUTPUT, "condition")
    assert_close(value, arrays["outputs/cap_loss"], OUTPUT, "loss")
    assert check_gradients(grads, weights, arrays, assert_close) >= 3

    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2  # the json's: scaled linear
    snr = signal_to_noise(jnp.asarray(np.cumprod(1 - betas)), arrays["inputs/timesteps"])
    assert_close(snr, arrays["outputs/snr"], 1e-4, "signal-to-noise ratio")
    pair = arrays["inputs/unet_pred"], arrays["inputs/noise"]
    assert_close(diffusion_loss(*pair), arrays["outputs/gen_loss_plain"], OUTPUT, "diffusion loss")
    corrected = diffusion_loss(*pair, min_snr_weights(snr, 5.0, "epsilon"))
    assert_close(corrected, arrays["outputs/gen_loss_snr_correct_minsnr5"], OUTPUT, "min-SNR")
    assert abs(corrected - arrays["outputs/gen_loss_snr_as_written"]) > 0.01


# ---- MetaQuery's connector, written out in torch from its description and code


class ReferenceNorm(torch.nn.Module):
    """Unit vectors of each head, times factors of each head and the root of the width."""

    def __init__(self, heads: int, size: int):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.ones(heads, 1, size))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.gamma * x.shape[-1] ** 0.5


class ReferenceLayer(torch.nn.Module):
    """Qwen2's layer without the causal mask, and with norms of queries and keys after the rotation."""

    def __init__(self, width: int, head_dim: int, mlp_size: int):
        super().__init__()
        self.heads, self.head_dim = width // head_dim, head_dim
        for letter in "qkv":
            setattr(self, f"{letter}_proj", torch.nn.Linear(width, width))
        self.o_proj = torch.nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = (ReferenceNorm(self.heads, head_dim) for _ in range(2))
        self.gate_proj, self.up_proj = (torch.nn.Linear(width, mlp_size, bias=False) for _ in range(2))
        self.down_proj = torch.nn.Linear(mlp_size, width, bias=False)
        self.input_norm, self.mlp_norm = (torch.nn.RMSNorm(width, eps=1e-6) for _ in range(2))

    def forward(self, x, mask):
        batch, tokens, width = x.shape
        h = self.input_norm(x)

        def into_heads(y):
            return y.view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)

        half = self.head_dim // 2
        angles = torch.arange(tokens)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))

        def rotate(y):
            return y * cos + torch.cat([-y[..., half:], y[..., :half]], dim=-1) * sin

        q = self.q_norm(rotate(into_heads(self.q_proj(h))))
        k = self.k_norm(rotate(into_heads(self.k_proj(h))))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        y = scores.softmax(dim=-1) @ into_heads(self.v_proj(h))
        x = x + self.o_proj(y.transpose(1, 2).reshape(batch, tokens, width))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class ReferenceConnector(torch.nn.Module):
    """MetaQuery's connector; `states` of another width than the transformer's first go through a linear map."""

    def __init__(self, states: int, width: int, layers: int, head_dim: int, mlp_size: int, out: int):
        super().__init__()
        self.input = torch.nn.Linear(states, width) if states != width else torch.nn.Identity()
        self.layers = torch.nn.ModuleList(ReferenceLayer(width, head_dim, mlp_size) for _ in range(layers))
        self.linear_1, self.linear_2 = torch.nn.Linear(width, out), torch.nn.Linear(out, out)
        self.output_norm = torch.nn.RMSNorm(out, eps=1e-5)

    def forward(self, x, mask=None):
        x = self.input(x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.output_norm(self.linear_2(F.gelu(self.linear_1(x), approximate="tanh")))


def connector_table(config: QueryConnectorConfig) -> list[Weight]:
    sizes, layer, found = {"n": config.num_heads}, "layers.{layer}", []
    if config.width != config.input_size:
        found += linear("input", "input")
    for letter in "qkv":
        found.append(Weight(f"{layer}.{letter}_proj.weight", f"layers/{letter}/kernel", INTO_HEADS, sizes))
        found.append(Weight(f"{layer}.{letter}_proj.bias", f"layers/{letter}/bias", HEAD_BIAS, sizes))
    found.append(Weight(f"{layer}.o_proj.weight", "layers/out/kernel", OUT_OF_HEADS, sizes))
    found += [Weight(f"{layer}.{x}_norm.gamma", f"layers/{x}_norm/scale", "n 1 h -> n h") for x in "qk"]
    for name in ("gate", "up", "down"):
        found += linear(f"{layer}.{name}_proj", f"layers/mlp/{name}", bias=False)
    found += norm(f"{layer}.input_norm", "layers/attention_norm", bias=False)
    found += norm(f"{layer}.mlp_norm", "layers/mlp_norm", bias=False)
    found += linear("linear_1", "linear_1") + linear("linear_2", "linear_2")
    return found + norm("output_norm", "output_norm", bias=False)


@pytest.mark.parametrize("width,masked", [(None, False), (24, False), (24, True)])
def test_the_connector_equals_metaquery(width, masked, randomise, assert_close, to_numpy, tmp_path):
    """Checks the condition and the gradient of every parameter, with states of the transformer's width or another."""
    config = QueryConnectorConfig(
        tokens=5, input_size=16, hidden_size=width, num_layers=3, head_dim=8, mlp_size=20, output_size=12
    )
    reference = randomise(ReferenceConnector(16, config.width, 3, 8, 20, 12))
    with torch.no_grad():
        for layer in reference.layers:  # so that their place after the rotation matters
            for each in (layer.q_norm, layer.k_norm):
                each.gamma.copy_(1 + 0.5 * torch.randn(each.gamma.shape, generator=torch.Generator().manual_seed(3)))
    params = loaded(tmp_path, config, connector_table(config), to_numpy(reference.state_dict()))
    rng = np.random.default_rng(0)
    states, mask = rng.normal(size=(2, 5, 16)).astype(np.float32), None
    factors = rng.normal(size=(2, 5, 12)).astype(np.float32)
    if masked:
        mask = np.array([[True] * 5, [True, True, False, True, False]])
        factors[~mask] = 0
    theirs = reference(torch.tensor(states), None if mask is None else torch.tensor(mask))
    (theirs * torch.tensor(factors)).sum().backward()

    def loss(params):
        made = config.make().apply({"params": params}, states, None, mask)
        return (made * factors).sum(), made

    grads, made = jax.jit(jax.grad(loss, has_aux=True))(params)
    counted = np.ones((2, 5), bool) if mask is None else mask
    assert_close(np.asarray(made)[counted], theirs.detach().numpy()[counted], OUTPUT, "condition")
    assert not np.asarray(made)[~counted].any()
    folder = tmp_path / "gradients"
    folder.mkdir()
    tensors = {name: parameter.grad.numpy().copy() for name, parameter in reference.named_parameters()}
    wanted = loaded(folder, config, connector_table(config), tensors)
    jax.tree_util.tree_map_with_path(
        lambda path, ours, theirs: assert_close(ours, theirs, GRADIENT, jax.tree_util.keystr(path)), grads, wanted
    )


def test_the_connector_of_the_published_size():
    """Counts MetaQuery's connector between LLaVA-OneVision 0.5B and SANA, and checks how it begins."""
    config = QueryConnectorConfig(
        tokens=64, input_size=896, num_layers=24, output_size=2304, output_scale=math.sqrt(5.5)
    )
    states = jnp.zeros((1, 64, 896))
    abstract = nn.meta.unbox(abstract_init(config.make(), states))
    with torch.device("meta"):
        reference = ReferenceConnector(896, 896, 24, 64, 4 * 896, 2304)
    wanted = sum(parameter.numel() for parameter in reference.parameters())
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == wanted == 315_811_584
    small = QueryConnectorConfig(tokens=3, input_size=256, num_layers=2, output_size=48, output_scale=math.sqrt(5.5))
    begun = nn.meta.unbox(jax.jit(small.make().init)(jax.random.key(0), jnp.zeros((1, 3, 256))))["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(begun["layers"]):
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            assert abs(float(leaf.std()) - 0.014) < 0.001, name
        else:
            assert set(np.unique(leaf)) == {1.0 if "scale" in name else 0.0}, name
    np.testing.assert_allclose(begun["output_norm"]["scale"], math.sqrt(5.5), rtol=1e-6)


# ---- the prompt's own states


def test_prompt_states_equal_qwen_image(randomise, assert_close, to_numpy, tmp_path):
    """Checks against the pipeline's way: each prompt's tokens after the template, padded on the right."""
    config = PromptStatesConfig(tokens=9, input_size=10, output_size=6, dropped=3)
    reference = torch.nn.ModuleDict({"norm": torch.nn.RMSNorm(10, eps=1e-6), "out": torch.nn.Linear(10, 6)})
    randomise(reference)
    weights = norm("norm", "norm", bias=False) + linear("out", "out")
    params = loaded(tmp_path, config, weights, to_numpy(reference.state_dict()))
    states = np.random.default_rng(0).normal(size=(3, 9, 10)).astype(np.float32)
    lengths = [9, 5, 3]
    left, right = (np.zeros((3, 9), bool) for _ in range(2))
    wanted = np.zeros((3, 6, 6), np.float32)
    for row, length in enumerate(lengths):
        right[row, :length], left[row, 9 - length :] = True, True
        kept = torch.tensor(states[row, :length][3:])
        wanted[row, : length - 3] = reference["out"](reference["norm"](kept)).detach().numpy()
    shifted = np.stack([np.roll(row, 9 - length, axis=0) for row, length in zip(states, lengths, strict=True)])
    apply = jax.jit(lambda states, mask: config.make().apply({"params": params}, states, None, mask))
    for given, mask in ((states, right), (shifted, left)):
        assert_close(apply(given, mask), wanted, OUTPUT, "condition")
        np.testing.assert_array_equal(config.output_mask(jnp.asarray(mask)).sum(axis=1), [6, 2, 0])
    assert_close(apply(states, None)[0], wanted[0], OUTPUT, "without a mask")
