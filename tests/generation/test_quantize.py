"""Int8 storage: its distance from the exact weights, its scales, and generation with it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_language import CONFIG, answers, language, random_params, started

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.errors import ConfigError
from mllm_jax.generation.options import Options
from mllm_jax.generation.quantize import int8_linear, quantize, summary
from mllm_jax.generation.sampling import Sampling
from mllm_jax.layers.linear import linear_hook

C = change_fields(CONFIG, qkv_bias=True)
TOKENS = np.random.default_rng(0).integers(0, 260, (2, 20))


def logits(params):
    with linear_hook(int8_linear):
        return C.make().apply({"params": params}, TOKENS)


@pytest.fixture(scope="module")
def params():
    return random_params(C, scale=0.3)


@pytest.fixture(scope="module")
def quantized(params):
    return quantize(logits, params)


def test_every_linear_kernel_and_nothing_else(params, quantized):
    before, (after, errors) = flatten_dict(params, sep="/"), (flatten_dict(quantized[0], sep="/"), quantized[1])
    kernels = {path for path in before if path.endswith("/kernel")}
    assert {f"{error.path}/kernel" for error in errors} == kernels and len(kernels) == 8
    for path, leaf in before.items():
        if path in kernels:
            assert after[path].dtype == jnp.int8 and after[path].shape == leaf.shape
            assert int(jnp.abs(after[path].astype(jnp.int32)).max()) == 127
        else:
            assert after[path] is leaf
    assert set(after) == set(before) | {f"{path}_scale" for path in kernels}


def test_a_scale_for_each_output_channel_of_each_layer(params, quantized):
    attention, sizes = quantized[0]["layers"]["attention"], (2, 4, 4)
    assert attention["q"]["kernel_scale"].shape == sizes  # layers, heads, head_dim; the embedding is summed over
    assert attention["out"]["kernel_scale"].shape == (2, 16)  # heads and head_dim are summed over
    assert quantized[0]["lm_head"]["kernel_scale"].shape == (260,)
    kernel = np.asarray(params["layers"]["attention"]["out"]["kernel"])
    np.testing.assert_allclose(attention["out"]["kernel_scale"], np.abs(kernel).max((1, 2)) / 127, rtol=1e-6)


def test_rounding_is_half_a_step_at_most_and_reported(params, quantized):
    after = flatten_dict(quantized[0], sep="/")
    for error in quantized[1]:
        kernel = np.asarray(flatten_dict(params, sep="/")[f"{error.path}/kernel"])
        scale = np.asarray(after[f"{error.path}/kernel_scale"])
        first = int("layers/" in error.path)
        axes = tuple(range(first, first + kernel.ndim - scale.ndim))
        scale = np.expand_dims(scale, axes)
        back = np.asarray(after[f"{error.path}/kernel"]) * scale
        assert (np.abs(back - kernel) <= 0.5001 * scale).all()
        np.testing.assert_allclose(error.relative, np.linalg.norm(back - kernel) / np.linalg.norm(kernel), rtol=1e-3)
        assert 1e-4 < error.relative < 0.02
        assert error.bytes_before == 4 * kernel.size and error.bytes_after == kernel.size + scale.nbytes
    worst = max(quantized[1], key=lambda error: error.relative)
    assert "8 kernels" in summary(quantized[1]) and worst.path in summary(quantized[1])


def test_the_matmul_equals_one_with_the_kernels_written_out(params, quantized):
    flat = flatten_dict(quantized[0], sep="/")
    for error in quantized[1]:
        kernel, scale = flat[f"{error.path}/kernel"], flat.pop(f"{error.path}/kernel_scale")
        first = int("layers/" in error.path)
        flat[f"{error.path}/kernel"] = kernel * jnp.expand_dims(
            scale, tuple(range(first, first + kernel.ndim - scale.ndim))
        )
    plain = C.make().apply({"params": unflatten_dict(flat, sep="/")}, TOKENS)
    np.testing.assert_allclose(logits(quantized[0]), plain, atol=2e-4)
    exact, rounded = (jax.nn.log_softmax(x) for x in (logits(params), logits(quantized[0])))
    assert jnp.abs(exact - rounded).max() > 1e-4
    assert 0 < (jnp.exp(exact) * (exact - rounded)).sum(axis=-1).mean() < 0.05, "nats of divergence"
    assert (exact.argmax(axis=-1) == rounded.argmax(axis=-1)).mean() > 0.8


def test_generation_reads_what_is_stored(params, quantized):
    options = Options(12, ignore_eos=True)
    prompts = [TOKENS[0].tolist(), TOKENS[1, :3].tolist()]
    assistant = language(C.make(), params, int8=True)
    stored = jax.tree.leaves(assistant.program.params)
    assert sum(leaf.dtype == jnp.int8 for leaf in stored) == 7 * 2 + 1
    assert [e.relative for e in assistant.quantization_errors] == [e.relative for e in quantized[1]]
    found = [a.tokens for a in answers(assistant, prompts, options)]
    for prompt, ids in zip(prompts, found, strict=True):
        row = jnp.array([[*prompt, *ids[:-1]]])
        with linear_hook(int8_linear):
            best = C.make().apply({"params": quantized[0]}, row)[0, len(prompt) - 1 :].argmax(-1)
        assert best.tolist() == list(ids)


def test_a_hook_around_it_adds_to_the_scaled_product(quantized):
    def plus(linear, x, kernel, product):
        return product(x) + (linear.path == ("lm_head",))

    with linear_hook(plus):
        found = logits(quantized[0])
    np.testing.assert_allclose(found, logits(quantized[0]) + 1, atol=1e-5)


def test_twice_is_refused(quantized):
    with pytest.raises(ConfigError, match="int8"):
        quantize(logits, quantized[0])


def test_the_loop_over_tokens_keeps_no_floats_of_the_kernels():
    """Guards against XLA, which would convert all kernels once before the loop."""
    config = dataclasses.replace(CONFIG, hidden_size=64, mlp_size=512, vocab_size=64)
    scratch, kept = {}, {}
    for int8 in (False, True):
        assistant = language(config.make(), random_params(config), int8=int8)
        program = assistant.program
        args = program.params, *started(assistant, [[1]]), np.int32(4), np.int32(0)
        compiled = program.advance.lower(*args, sampling=Sampling()).compile()
        scratch[int8] = compiled.memory_analysis().temp_size_in_bytes
        kept[int8] = sum(leaf.nbytes for leaf in jax.tree.leaves(program.params))
    assert kept[True] < 0.4 * kept[False]
    assert scratch[True] < scratch[False] + 0.4 * kept[False], "room for one float kernel or two, not for all"
