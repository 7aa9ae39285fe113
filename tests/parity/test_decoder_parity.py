"""The decoder against every architecture that it can read and write, through real folders both ways."""

from __future__ import annotations

import functools
from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny_language import answers, language

from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.generation.options import Options
from mllm_jax.models.registry import family_of_config, from_pretrained, save_pretrained
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
    pad_token_id=None,
)
OPT = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
OPT |= dict(ffn_dim=52, max_position_embeddings=40, pad_token_id=1)
GPT2 = dict(vocab_size=61, n_embd=24, n_inner=52, n_layer=3, n_head=6, n_positions=40, layer_norm_epsilon=1e-2)
GPT2 |= dict(bos_token_id=3, eos_token_id=4)
GLM = SIZES | dict(head_dim=12, pad_token_id=3, eos_token_id=[5, 6])
ODD_HEAD = dict(head_dim=10)  # 6 heads x 10 is not the hidden size
TIED = dict(tie_word_embeddings=True)


def rope(kind: str = "default", theta: float = 500.0, **options) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta) | options)


# Texts are longer than the trained length.
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=12)
DYNAMIC = rope("dynamic", factor=3.0) | dict(max_position_embeddings=12)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=12)
YARN_OPTIONS = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=12,
    beta_fast=4.0,
    beta_slow=0.5,
    truncate=False,
    mscale=0.8,
    mscale_all_dim=1.7,
)
MIXED = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
WINDOW = dict(use_sliding_window=True, sliding_window=5)
CASES = {
    "llama tied": ("Llama", SIZES | ODD_HEAD | TIED | rope()),
    "llama biases": ("Llama", SIZES | dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1) | rope()),
    "llama3": ("Llama", SIZES | LLAMA3 | dict(hidden_act="gelu", num_key_value_heads=6)),
    "llama linear": ("Llama", SIZES | rope("linear", factor=2.5) | dict(hidden_act="quick_gelu")),
    "llama dynamic": ("Llama", SIZES | DYNAMIC),
    "llama yarn": ("Llama", SIZES | ODD_HEAD | YARN | dict(hidden_act="relu2")),
    "mistral": ("Mistral", SIZES | dict(sliding_window=5) | rope()),
    "mistral full": ("Mistral", SIZES | ODD_HEAD | TIED | dict(sliding_window=None) | rope()),
    "mistral wide": ("Mistral", SIZES | dict(sliding_window=19, hidden_act="gelu_new") | LLAMA3),
    "mistral yarn": ("Mistral", SIZES | ODD_HEAD | dict(sliding_window=3, num_key_value_heads=6) | YARN_OPTIONS),
    "qwen2": ("Qwen2", SIZES | rope()),
    "qwen2 late windows": ("Qwen2", SIZES | WINDOW | dict(max_window_layers=1) | TIED | rope()),
    "qwen2 mixed": ("Qwen2", SIZES | WINDOW | MIXED | dict(hidden_act="gelu_pytorch_tanh") | YARN),
    "qwen2 unused window": ("Qwen2", SIZES | dict(sliding_window=3, num_key_value_heads=1) | DYNAMIC),
    "qwen3": ("Qwen3", SIZES | ODD_HEAD | TIED | rope()),
    "qwen3 biases": ("Qwen3", SIZES | dict(head_dim=4, attention_bias=True) | YARN_OPTIONS),
    "qwen3 windows": ("Qwen3", SIZES | ODD_HEAD | WINDOW | dict(max_window_layers=0, hidden_act="relu") | rope()),
    "qwen3 mixed": ("Qwen3", SIZES | ODD_HEAD | WINDOW | MIXED | DYNAMIC),
    "glm": ("Glm", GLM | rope()),
    "glm whole": ("Glm", GLM | dict(attention_bias=False) | TIED | rope(partial_rotary_factor=1.0)),
    "glm odd part": ("Glm", GLM | dict(hidden_act="gelu") | rope("linear", factor=2.0, partial_rotary_factor=0.25)),
    "glm yarn": ("Glm", GLM | dict(num_key_value_heads=1) | YARN),
    "opt": ("OPT", OPT),
    "opt 350m": ("OPT", OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
    "opt bare": ("OPT", OPT | dict(enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu")),
    "opt untied": (
        "OPT",
        OPT | dict(_remove_final_layer_norm=True, tie_word_embeddings=False, word_embed_proj_dim=40),
    ),
}
CASES |= {
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", GPT2 | dict(tie_word_embeddings=False, n_inner=None, reorder_and_upcast_attn=True)),
}
LENGTHS = (21, 9)


@pytest.fixture(scope="module")
def load(randomise, tmp_path_factory):
    """Returns `load(case) -> (torch model, our module, our parameters)`, the latter read from the folder of torch.

    `gain` scales all matrices except the embedding.
    """

    @functools.cache
    def make(case: str, dtype=None, gain: float = 1.0):
        name, options = CASES[case]
        folder = tmp_path_factory.mktemp("theirs")
        # A copy: transformers writes its own defaults into its argument.
        config = getattr(transformers, f"{name}Config")(**deepcopy(options), attn_implementation="eager")
        reference = randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                parameter.data.mul_(gain)
            if ".ln_" in name and name.endswith("weight"):
                parameter.data.add_(1)  # norms of GPT-2, near 1 as those of the others
        reference.save_pretrained(folder)
        return reference, *from_pretrained(folder, dtype=dtype)

    return make


def examples(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, SIZES["vocab_size"], n) for n in LENGTHS]


def padded(texts) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of unequal length, padded on the right: tokens, mask."""
    tokens, mask = np.full((len(texts), 32), 3), np.zeros((len(texts), 32), int)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, 1
    return tokens, mask


def packed(texts, orders) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """Returns a row for each order of the texts: tokens, positions, segments, and the slice of each (row, text)."""
    tokens, positions = np.full((len(orders), 32), 7), np.zeros((len(orders), 32), int)
    segments, spans = np.zeros_like(positions), {}
    for row, order in enumerate(orders):
        place = 0
        for segment, e in enumerate(order, start=1):
            spans[row, e] = span = slice(place, place + len(texts[e]))
            tokens[row, span], positions[row, span], segments[row, span] = texts[e], np.arange(len(texts[e])), segment
            place = span.stop
    return tokens, positions, segments, spans


@torch.no_grad()
def logits_of(reference, *args, **kwargs) -> np.ndarray:
    if hasattr(reference.base_model, "rotary_emb"):
        # "dynamic" rotary frequencies remember the longest text so far: forget it.
        reference.model.rotary_emb = type(reference.model.rotary_emb)(config=reference.config)
    return reference(*args, **kwargs).logits.float().numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_with_padding_and_packed_and_of_the_folder_written(case, load, assert_close, tmp_path):
    reference, module, params = load(case)
    texts = examples()
    alone = [logits_of(reference, torch.tensor(text[None]))[0] for text in texts]
    tokens, mask = padded(texts)
    packed_tokens, positions, segments, spans = packed(texts, [(0, 1), (1, 0)])
    counted = np.tile(np.arange(32), (2, 1))
    stacked = [np.concatenate(pair) for pair in ((tokens, packed_tokens), (counted, positions), (mask, segments))]
    ours = np.asarray(jax.jit(module.apply)({"params": params}, *stacked))
    assert np.isfinite(ours).all()
    for row, n in enumerate(LENGTHS):
        assert_close(ours[row, :n], alone[row], 1e-4, f"right padding, row {row}")
    for (row, e), span in spans.items():
        assert_close(ours[2 + row, span], alone[e], 1e-4, f"packed, row {row} text {e}")
    if "dynamic" not in str(CASES[case]):  # where the positions of padding count, theirs differ from a text alone
        theirs = logits_of(reference, torch.tensor(tokens), attention_mask=torch.tensor(mask))
        for row, n in enumerate(LENGTHS):
            assert_close(ours[row, :n], theirs[row, :n], 1e-4, f"padding on both sides, row {row}")

    save_pretrained(module, params, tmp_path / "ours")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(opened) is type(reference)
    for ids in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(opened.config, ids) == getattr(reference.config, ids), ids
    assert_close(logits_of(opened, torch.tensor(texts[0][None]))[0], alone[0], 1e-5, "the folder written here")
    theirs = reference.state_dict()
    assert opened.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in opened.state_dict().items())
    family = family_of_config(module.config)
    assert family.from_hf(family.to_hf(module.config)) == module.config


@pytest.mark.parametrize("case", CASES)
def test_greedy_32_tokens(case, load):
    """Checks prompts of unequal length in one batch here, each alone in torch."""
    reference, module, params = load(case)
    prompts = [text[:n] for text, n in zip(examples(2), (8, 3), strict=True)]
    assistant = language(module, params, max_length=40)
    said = answers(assistant, [prompt.tolist() for prompt in prompts], Options(32, ignore_eos=True))
    reference.generation_config.eos_token_id = None
    for prompt, answer in zip(prompts, said, strict=True):
        logits_of(reference, torch.tensor(prompt[None, :1]))  # forgets the longest text so far
        ids = torch.tensor(prompt[None])
        how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, pad_token_id=0)
        assert list(answer.tokens) == reference.generate(ids, **how)[0, len(prompt) :].tolist()
    assert len({token for answer in said for token in answer.tokens}) > 2


CACHED = ("llama dynamic", "mistral", "qwen2 late windows", "qwen3 mixed", "glm", "opt 350m", "gpt2")


@pytest.mark.parametrize("case", CACHED)
def test_token_by_token_equals_theirs_with_a_cache(case, load, assert_close):
    """Checks each text alone in torch, and all in one batch of unequal prompts here."""
    reference, module, params = load(case)
    texts, prompts, steps = examples(), (16, 4), 5
    step = jax.jit(
        lambda tokens, segments, cache: module.apply({"params": params}, tokens, None, segments, cache=cache)
    )
    tokens, _ = padded([text[:n] for text, n in zip(texts, prompts, strict=True)])
    mask = (np.arange(16)[None] < np.array(prompts)[:, None]).astype(np.int32)
    logits, cache = step(tokens[:, :16], mask, module.config.make_cache(2, 24))
    ours = [[row[:n]] for row, n in zip(np.asarray(logits), prompts, strict=True)]
    for i in range(steps):
        following = np.array([[text[n + i]] for text, n in zip(texts, prompts, strict=True)])
        logits, cache = step(following, np.ones((2, 1), np.int32), cache)
        for row in range(2):
            ours[row].append(np.asarray(logits[row]))
    for row, (text, n) in enumerate(zip(texts, prompts, strict=True)):
        logits_of(reference, torch.tensor(text[None, :1]))  # forgets the longest text so far
        past = transformers.DynamicCache(config=reference.config)
        with torch.no_grad():
            chunks = [text[:n], *(text[n + i : n + i + 1] for i in range(steps))]
            theirs = [reference(torch.tensor(c[None]), past_key_values=past, use_cache=True).logits[0] for c in chunks]
        for i, (mine, their) in enumerate(zip(ours[row], theirs, strict=True)):
            assert_close(mine, their.numpy(), 1e-4, f"row {row}, step {i}")


@pytest.mark.parametrize("case", CASES)
def test_bfloat16(case, load, assert_close):
    """Checks small weights: with the large ones of the other tests, torch's own bfloat16 is up to 8 % off."""
    reference, module, params = load(case, "bfloat16", gain=0.5)
    assert module.config.dtype == "bfloat16" and {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    text = examples()[0][None]
    ours = np.asarray(jax.jit(module.apply)({"params": params}, text))
    exact = logits_of(reference, torch.tensor(text))
    assert_close(ours, exact, 2e-2, "against float32")
    theirs = logits_of(reference.to(torch.bfloat16), torch.tensor(text))
    assert np.linalg.norm(ours - exact) <= 1.5 * np.linalg.norm(theirs - exact), "as exact as torch is in bfloat16"


@pytest.mark.parametrize("case", ("llama tied", "llama biases", "qwen3", "qwen3 biases", "gpt2"))
def test_next_token_loss_and_every_gradient(case, load, assert_close):
    """Checks packed rows here, each text alone in torch."""
    reference, module, params = load(case)
    texts = examples(1)
    has_loss = [np.arange(n) >= n // 2 for n in LENGTHS]
    tokens, positions, segments, spans = packed(texts, [(0, 1)])
    batch = dict(tokens=tokens, positions=positions, segments=segments, loss_weights=np.zeros((1, 32), np.float32))
    total, count = torch.zeros(()), 0
    for e, (text, weights) in enumerate(zip(texts, has_loss, strict=True)):
        batch["loss_weights"][0, spans[0, e]] = weights
        logits, kept = reference(torch.tensor(text[None])).logits[0, :-1], torch.tensor(weights[1:])
        total = total + torch.nn.functional.cross_entropy(logits[kept], torch.tensor(text[1:])[kept], reduction="sum")
        count += int(kept.sum())
    loss = total / count
    loss.backward()

    def apply(p, b, method):
        assert method == "head_inputs"
        texts = b["tokens"], b["positions"], b["segments"]
        return module.apply({"params": p}, *texts, project=False)

    def ours(p):
        return NextToken().loss(apply, p, batch, None)

    (value, metrics), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    assert_close(value, loss.item(), 1e-4, "loss")
    assert float(metrics["weight"]) == count
    mine = hub_tensors(family_of_config(module.config).table(module.config), grads)
    theirs = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    assert set(mine) == set(theirs)
    for name, gradient in theirs.items():
        assert_close(mine[name](), gradient, 1e-3, name)
