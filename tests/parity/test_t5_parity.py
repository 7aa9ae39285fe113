"""T5 against T5ForConditionalGeneration: logits, gradients, greedy generation, configs both ways."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers.models.t5.modeling_t5 import T5Attention

import mllm_jax
from mllm_jax.checkpoints.layout import parameter_view
from mllm_jax.layers.compute import Compute
from mllm_jax.layers.relative_bias import bucket_of_distance
from mllm_jax.llms.t5 import T5Config, from_hf_config, sample, table, to_hf_config

SIZES = dict(
    vocab_size=53,
    d_model=20,
    d_kv=6,  # 3 heads x 6 is not the hidden size
    d_ff=28,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    layer_norm_epsilon=1e-2,  # large, so that a wrong epsilon shows
    decoder_start_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
)
CASES = {
    "t5_1.0": dict(feed_forward_proj="relu"),
    "flan": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "blip2": dict(feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False, num_layers=3),
    "silu": dict(feed_forward_proj="gated-silu", num_decoder_layers=1, relative_attention_num_buckets=12),
}
SOURCES, TARGETS = (9, 5), (6, 11)  # lengths of two examples; the second target passes max_distance


def our_params(weights: dict[str, np.ndarray], c: T5Config) -> dict:
    """Maps the reference's names (of weights or gradients) to our tree by the family's table."""
    tree = {}
    for line in table(c).weights:
        names = [line.name]
        if "{layer}" in line.name:
            numbered = (line.name.replace("{layer}", str(i)) for i in itertools.count())
            names = list(itertools.takewhile(weights.__contains__, numbered))
        views = [parameter_view(line, weights[name]) for name in names]
        tree[line.path] = np.stack(views) if "{layer}" in line.name else views[0]
    return unflatten_dict(tree, sep="/")


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return SIZES | CASES[request.param]


@pytest.fixture
def pair(case, randomise, to_numpy, assert_same_tree):
    """Returns (torch model, our config, our parameters)."""
    config = transformers.T5Config(**case, attn_implementation="eager")
    reference = transformers.T5ForConditionalGeneration(config)
    if not case.get("tie_word_embeddings", True):  # transformers 5 always ties, checkpoints do not
        reference.lm_head.weight = torch.nn.Parameter(torch.zeros(config.vocab_size, config.d_model))
    reference = randomise(reference, seed=8)  # with these numbers, greedy texts do not repeat one token
    c = from_hf_config(config.to_dict())
    params = our_params(to_numpy(reference.state_dict()), c)
    abstract = jax.eval_shape(c.make().init, jax.random.key(0), *sample(c))["params"]
    assert_same_tree(params, nn.meta.unbox(abstract))
    return reference, c, params


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    return [(rng.integers(3, 53, s), rng.integers(3, 53, t)) for s, t in zip(SOURCES, TARGETS, strict=True)]


@pytest.fixture
def packed(examples):
    """Returns two rows: the first has both examples and padding, the second the targets in the opposite order."""
    rows = {}
    for name, part in (("", 0), ("decoder_", 1)):
        tokens, positions, segments = np.full((2, 20), 7), np.zeros((2, 20), int), np.zeros((2, 20), int)
        for row, order in enumerate([(0, 1), (1, 0) if part else (0, 1)]):
            place = 1 + row  # padding on the left too
            for e in order:
                span = slice(place, place + len(examples[e][part]))
                tokens[row, span], segments[row, span] = examples[e][part], e + 1
                positions[row, span] = np.arange(span.stop - span.start)
                place = span.stop
        rows |= {f"{name}tokens": tokens, f"{name}positions": positions, f"{name}segments": segments}
    return rows


def padded(rows: list[np.ndarray], length: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of one length, and a mask of real tokens."""
    tokens, mask = np.full((len(rows), length), 4), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        span = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[i, span], mask[i, span] = row, 1
    return tokens, mask


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_logits_with_padding(left, pair, examples, assert_close):
    reference, c, params = pair
    source, source_mask = padded([s for s, _ in examples], 12, left)
    target, target_mask = padded([t for _, t in examples], 13, left)
    tensors = [torch.tensor(x) for x in (source, source_mask, target, target_mask)]
    with torch.no_grad():
        theirs = reference(*tensors).logits.numpy()
    apply = jax.jit(c.make().apply)
    kwargs = dict(decoder_tokens=target, decoder_segments=target_mask)
    ours = np.asarray(apply({"params": params}, source, None, source_mask, **kwargs))
    assert_close(ours[target_mask > 0], theirs[target_mask > 0], 1e-4)
    assert np.isfinite(ours).all()


def test_packed_rows_equal_each_example_alone(pair, examples, packed, assert_close):
    reference, c, params = pair
    with torch.no_grad():
        alone = [reference(torch.tensor(s[None]), decoder_input_ids=torch.tensor(t[None])).logits for s, t in examples]
    ours = np.asarray(jax.jit(c.make().apply)({"params": params}, **packed))
    for row, e in itertools.product(range(2), range(2)):
        mine = packed["decoder_segments"][row] == e + 1
        assert_close(ours[row, mine], alone[e][0].numpy(), 1e-4, f"row {row} example {e}")


def test_every_gradient(pair, examples, packed, to_numpy, assert_close):
    """Checks the mean next-token loss: packed here, each example alone in torch."""
    reference, c, params = pair
    total, count = torch.zeros(()), 0
    for s, t in examples:
        logits = reference(torch.tensor(s[None]), decoder_input_ids=torch.tensor(t[None])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(t[1:]), reduction="sum")
        count += len(t) - 1
    (total / count).backward()
    theirs = our_params(to_numpy({n: p.grad for n, p in reference.named_parameters()}), c)

    first = {name: array[:1] for name, array in packed.items()}
    segments = first["decoder_segments"]
    has_loss = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)

    def loss(p):
        logs = jax.nn.log_softmax(c.make().apply({"params": p}, **first)[:, :-1])
        each = jnp.take_along_axis(logs, first["decoder_tokens"][:, 1:, None], axis=-1)[..., 0]
        return -(each * has_loss).sum() / has_loss.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert_close(value, total.item() / count, 1e-5, "loss")
    theirs, grads = flatten_dict(theirs, sep="/"), flatten_dict(grads, sep="/")
    assert theirs.keys() == grads.keys()
    for name, gradient in grads.items():
        assert_close(gradient, theirs[name], 1e-3, name)


def test_bfloat16(pair, examples, to_numpy):
    """Compares with the same bfloat16 weights in a float32 computation."""
    reference, c, _ = pair
    s, t = (x[None] for x in examples[1])
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            # Trained queries carry the 1/sqrt(head_dim) that T5 leaves out; random ones make every softmax a switch.
            parameter.mul_(c.head_dim**-0.5 if name.endswith(".q.weight") else 1).copy_(parameter.bfloat16())
        theirs = reference(torch.tensor(s), decoder_input_ids=torch.tensor(t)).logits.numpy()
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), our_params(to_numpy(reference.state_dict()), c))
    ours = jax.jit(replace(c, compute=Compute(dtype="bfloat16")).make().apply)({"params": params}, s, decoder_tokens=t)
    assert ours.dtype == jnp.float32
    # By root mean square: the reference in bfloat16 has single logits as far off as ours.
    assert np.linalg.norm(ours - theirs) <= 2e-2 * np.linalg.norm(theirs)


def test_greedy_tokens_equal_generate(pair, examples):
    """Checks rows of unequal length together, 32 tokens, from a cache."""
    reference, c, params = pair
    tokens, mask = padded([s for s, _ in examples], 12, left=False)
    reference.generation_config.eos_token_id = None  # continue to the end
    # Its cache (5.23) has the encoder's number of layers and fails if the decoder has more.
    search = dict(max_new_tokens=32, do_sample=False, use_cache=False)
    theirs = reference.generate(torch.tensor(tokens), attention_mask=torch.tensor(mask), **search).numpy()
    assert theirs.shape == (2, 33) and len(np.unique(theirs)) > 8

    module, variables = c.make(), {"params": params}

    @jax.jit
    def generate():
        cache = module.apply(variables, tokens, None, mask, size=32, method="start")

        def step(carry, _):
            token, cache = carry
            logits, cache = module.apply(variables, token[:, None], cache=cache)
            token = logits[:, 0].argmax(-1)
            return (token, cache), token

        first = jnp.full(2, c.decoder_start_token_id)
        return jax.lax.scan(step, (first, cache), None, length=32)[1].T

    np.testing.assert_array_equal(generate(), theirs[:, 1:])


def test_folders_both_ways(pair, examples, tmp_path, assert_close):
    """Checks folders written by transformers and read here, and written here and opened there: the same logits."""
    reference, c, params = pair
    reference.save_pretrained(tmp_path / "theirs")
    module, read = mllm_jax.from_pretrained(tmp_path / "theirs")
    assert module.config == c
    jax.tree.map(np.testing.assert_array_equal, read, params)

    mllm_jax.save_pretrained(module, read, tmp_path / "ours")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    s, t = (torch.tensor(x[None]) for x in examples[0])
    with torch.no_grad():
        theirs, ours = (model(s, decoder_input_ids=t).logits.numpy() for model in (reference, again))
    np.testing.assert_array_equal(ours, theirs)


def test_a_fresh_model_that_asked_for_an_untied_head(examples, randomise, tmp_path, assert_close):
    """Checks that transformers 5 ties the head, stores none and does not scale the transposed embedding's input."""
    fresh = transformers.T5Config(**SIZES | CASES["flan"], attn_implementation="eager")
    reference = randomise(transformers.T5ForConditionalGeneration(fresh), seed=8)
    reference.save_pretrained(tmp_path / "theirs")
    module, params = mllm_jax.from_pretrained(tmp_path / "theirs")
    assert module.config == mllm_jax.pretrained_config(tmp_path / "theirs")
    assert (module.config.tie_word_embeddings, module.config.dialect.scale_outputs) == (True, False)
    s, t = (x[None] for x in examples[0])
    ours = jax.jit(lambda p: module.apply({"params": p}, s, decoder_tokens=t))(params)
    mllm_jax.save_pretrained(module, params, tmp_path / "ours")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        given = dict(input_ids=torch.tensor(s), decoder_input_ids=torch.tensor(t))
        theirs, written = (model(**given).logits.numpy() for model in (reference, again))
    assert_close(ours, theirs, 1e-5, "logits")
    np.testing.assert_array_equal(written, theirs)
    assert mllm_jax.pretrained_config(tmp_path / "ours") == module.config


def test_a_config_both_ways(case):
    config = transformers.T5Config(**case)
    c = from_hf_config(config.to_dict())
    assert from_hf_config(to_hf_config(c)) == c
    again = transformers.T5Config(**to_hf_config(c))
    names = [*SIZES, "dense_act_fn", "is_gated_act", "scale_decoder_outputs"]
    assert {n: getattr(again, n) for n in names} == {n: getattr(config, n) for n in names}


@pytest.mark.parametrize("num_buckets,max_distance", [(16, 128), (32, 128), (2, 3), (5, 9), (7, 128), (64, 2048)])
def test_buckets_equal_the_references(num_buckets, max_distance):
    distance = torch.arange(max_distance + 30)
    theirs = T5Attention._relative_position_bucket(-distance, False, num_buckets, max_distance)
    ours = bucket_of_distance(num_buckets, max_distance)
    np.testing.assert_array_equal(ours[np.minimum(distance.numpy(), max_distance)], theirs.numpy())
