"""The decoder against LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM, and its loss against torch autograd."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from einops import rearrange
from flax import linen as nn
from flax.traverse_util import flatten_dict

from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.training.objectives.next_token import NextToken

SIZES = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-2,  # large, so that a wrong epsilon shows
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
ODD_HEAD = dict(head_dim=10)  # 6 heads x 10 is not the hidden size
CASES = {
    "llama_tied": ("Llama", ODD_HEAD | {"tie_word_embeddings": True}, {}),
    "llama_untied": ("Llama", {"tie_word_embeddings": False}, {}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}, {"qkv_bias": True}),
    "qwen3": ("Qwen3", ODD_HEAD | {"tie_word_embeddings": True}, {"qk_norm": True}),
}


def our_params(weights: dict[str, np.ndarray], c: DecoderConfig) -> dict:
    """Hugging Face names (of weights, or of gradients) to the decoder's tree."""
    heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}

    def stack(name: str, pattern: str | None = None, **sizes) -> np.ndarray:
        layers = [weights[f"model.layers.{i}.{name}"] for i in range(c.num_layers)]
        return np.stack([rearrange(w, pattern, **sizes) if pattern else w for w in layers])

    attention = {"out": {"kernel": stack("self_attn.o_proj.weight", "e (n h) -> n h e", n=c.num_heads)}}
    for part, n in heads.items():
        attention[part] = {"kernel": stack(f"self_attn.{part}_proj.weight", "(n h) e -> e n h", n=n)}
        if c.qkv_bias:
            attention[part]["bias"] = stack(f"self_attn.{part}_proj.bias", "(n h) -> n h", n=n)
    if c.qk_norm:
        attention |= {f"{part}_norm": {"scale": stack(f"self_attn.{part}_norm.weight")} for part in "qk"}
    params = {
        "token_embedding": {"embedding": weights["model.embed_tokens.weight"]},
        "layers": {
            "attention": attention,
            "attention_norm": {"scale": stack("input_layernorm.weight")},
            "mlp_norm": {"scale": stack("post_attention_layernorm.weight")},
            "mlp": {
                part: {"kernel": stack(f"mlp.{part}_proj.weight", "o i -> i o")} for part in ("gate", "up", "down")
            },
        },
        "final_norm": {"scale": weights["model.norm.weight"]},
    }
    if not c.tie_word_embeddings:
        params["lm_head"] = {"kernel": weights["lm_head.weight"].T}
    return params


@pytest.fixture(params=CASES)
def pair(request, randomise, to_numpy, assert_same_tree):
    """(torch model, our config, our parameters)."""
    family, theirs, ours = CASES[request.param]
    config = getattr(transformers, f"{family}Config")(**SIZES, **theirs, attn_implementation="eager")
    reference = randomise(getattr(transformers, f"{family}ForCausalLM")(config))
    c = DecoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=theirs.get("head_dim"),
        mlp_size=config.intermediate_size,
        rope_theta=500.0,
        norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        **ours,
    )
    params = our_params(to_numpy(reference.state_dict()), c)
    abstract = jax.eval_shape(c.make().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert_same_tree(params, nn.meta.unbox(abstract))
    return reference, c, params


def test_logits_with_right_padding_and_packed(pair, assert_close):
    reference, c, params = pair
    rng = np.random.default_rng(0)
    lengths = (9, 5)
    examples = [rng.integers(0, c.vocab_size, n) for n in lengths]
    apply = jax.jit(lambda *args: c.make().apply({"params": params}, *args))

    padded, mask = np.full((2, 16), 3), np.zeros((2, 16), np.int64)
    for row, example in enumerate(examples):
        padded[row, : len(example)], mask[row, : len(example)] = example, 1
    with torch.no_grad():
        theirs = reference(torch.tensor(padded), attention_mask=torch.tensor(mask)).logits.numpy()
        alone = [reference(torch.tensor(e[None])).logits[0].numpy() for e in examples]
    positions = np.tile(np.arange(16), (2, 1))
    ours = np.asarray(apply(padded, positions, mask))
    for row, n in enumerate(lengths):
        assert_close(ours[row, :n], theirs[row, :n], 1e-4, f"right padding, row {row}")
    assert np.isfinite(ours).all()

    # One row holds both examples and padding, the other holds them the other way round.
    tokens, positions, segments = np.full((2, 16), 7), np.zeros((2, 16), int), np.zeros((2, 16), int)
    spans = {}
    for row, order in enumerate([(0, 1), (1, 0)]):
        place = 0
        for segment, e in enumerate(order, start=1):
            spans[row, e] = span = slice(place, place + lengths[e])
            tokens[row, span], positions[row, span], segments[row, span] = examples[e], np.arange(lengths[e]), segment
            place = span.stop
    ours = np.asarray(apply(tokens, positions, segments))
    for (row, e), span in spans.items():
        assert_close(ours[row, span], alone[e], 1e-4, f"packed, row {row} example {e}")


def test_next_token_loss_and_every_gradient(pair, to_numpy, assert_close):
    """Packed rows here, each example alone in torch."""
    reference, c, params = pair
    rng = np.random.default_rng(1)
    examples = [rng.integers(0, c.vocab_size, n) for n in (9, 5)]
    learnt = [np.arange(9) >= 4, np.arange(5) >= 2]
    batch = {name: np.zeros((1, 16), np.int32) for name in ("tokens", "positions", "segments")}
    batch["loss_weights"] = np.zeros((1, 16), np.float32)
    place = 0
    total, count = torch.zeros(()), 0
    for segment, (e, w) in enumerate(zip(examples, learnt, strict=True), start=1):
        span = slice(place, place + len(e))
        batch["tokens"][0, span], batch["positions"][0, span] = e, np.arange(len(e))
        batch["segments"][0, span], batch["loss_weights"][0, span] = segment, w
        place = span.stop
        logits = reference(torch.tensor(e[None])).logits[0, :-1]
        kept = torch.tensor(w[1:])
        total = total + torch.nn.functional.cross_entropy(logits[kept], torch.tensor(e[1:])[kept], reduction="sum")
        count += int(kept.sum())
    loss = total / count
    loss.backward()
    theirs = our_params(to_numpy({n: p.grad for n, p in reference.named_parameters()}), c)

    def apply(p, b):
        return c.make().apply({"params": p}, b["tokens"], b["positions"], b["segments"])

    def ours(p):
        return NextToken().loss(apply, p, batch, None)

    (value, metrics), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    assert_close(value, loss.item(), 1e-4, "loss")
    assert float(metrics["weight"]) == count
    flat = flatten_dict(theirs, sep="/")
    for path, gradient in flatten_dict(grads, sep="/").items():
        assert_close(gradient, flat[path], 1e-3, path)
