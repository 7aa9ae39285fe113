"""The transformer of Stable Diffusion 3 against diffusers' SD3Transformer2DModel, through real folders both ways."""

from __future__ import annotations

import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from flax import linen as nn
from unet_checks import check_call, check_full_size, theirs

from mllm_jax.errors import ConfigError
from mllm_jax.generators import schedulers
from mllm_jax.generators.sd3 import SD3TransformerConfig
from mllm_jax.generators.sd3_hub import from_hf_config
from mllm_jax.layers.compute import with_compute
from mllm_jax.models.registry import abstract_params, family_of_config, from_pretrained
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh, param_shardings

TINY = dict(
    sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=4, num_attention_heads=3,
    joint_attention_dim=10, caption_projection_dim=12, pooled_projection_dim=7, out_channels=4, pos_embed_max_size=6,
    dual_attention_layers=(), qk_norm=None,
)  # fmt: skip
# Options of diffusers' class, height and width of the latents.
CASES = {
    "SD 3 medium, another size than it was trained on": (TINY, (10, 6)),
    "SD 3.5 large": (TINY | dict(qk_norm="rms_norm", num_layers=2), (8, 8)),
    "SD 3.5 medium": (TINY | dict(qk_norm="rms_norm", dual_attention_layers=(0, 1, 7)), (12, 8)),
    "every block of another kind, patches of 3, no channels out": (
        TINY | dict(
            dual_attention_layers=(1, 2), num_layers=3, patch_size=3, sample_size=7, out_channels=None, in_channels=5,
            attention_head_dim=5, num_attention_heads=4, caption_projection_dim=20, pos_embed_max_size=5,
        ),
        (3, 15),
    ),
    "one block": (TINY | dict(num_layers=1, sample_size=2, patch_size=1), (5, 2)),
}  # fmt: skip


def inputs(config: SD3TransformerConfig, size: tuple[int, int], rows: int = 2) -> dict[str, np.ndarray]:
    """Returns the arguments of a call, with another time for each row; the first is no whole number."""
    rng = np.random.default_rng(sum(size))

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return dict(
        latents=normal(rows, *size, config.in_channels),
        timesteps=rng.permutation(1000)[:rows].astype(np.float32) + np.arange(rows, dtype=np.float32)[::-1] / 4,
        text=normal(rows, 5, config.text_size),
        pooled=normal(rows, config.pooled_size),
    )


def without_effect(options: dict) -> frozenset[str]:
    """Returns names of weights that no output depends on.

    They are the queries of the last block's text, and a constant that is added to all keys of a softmax.
    """
    last = f"transformer_blocks.{options['num_layers'] - 1}.attn"
    names = {f"{last}.add_q_proj.weight", f"{last}.add_q_proj.bias"}
    if options["qk_norm"] is not None:
        return frozenset(names | {f"{last}.norm_added_q.weight"})
    dual = [i for i in options["dual_attention_layers"] if i < options["num_layers"]]
    return frozenset(names | {f"transformer_blocks.{i}.attn2.to_k.bias" for i in dual})


@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_folders_both_ways(case, randomise, assert_close, tmp_path):
    options, size = CASES[case]
    reference = randomise(SD3Transformer2DModel(**options))
    check_call(reference, lambda config: inputs(config, size), tmp_path, assert_close, without_effect(options))


def test_a_stored_table_of_positions_and_whole_timesteps(randomise, assert_close, tmp_path):
    """Checks that no table is computed anew: a folder's may be rounded, or another."""
    reference = randomise(SD3Transformer2DModel(**TINY | dict(num_layers=1)))
    reference.pos_embed.pos_embed.copy_(torch.randn(reference.pos_embed.pos_embed.shape))
    reference.save_pretrained(tmp_path)
    module, params = from_pretrained(tmp_path)
    call = inputs(module.config, (6, 10)) | dict(timesteps=np.array([500, 500]))
    with torch.no_grad():
        wanted = theirs(reference, **call)
    assert_close(jax.jit(module.apply)({"params": params}, **call | dict(timesteps=500)), wanted, 1e-4)


def test_a_fresh_model(assert_close):
    """Checks its positions against diffusers' and that its blocks change nothing yet, so that no text is read."""
    reference = SD3Transformer2DModel(**TINY | dict(num_layers=1, sample_size=7, patch_size=3, pos_embed_max_size=9))
    config = from_hf_config(json.loads(reference.to_json_string()))
    call = inputs(config, (6, 3), rows=1)
    made, params = jax.jit(config.make().init_with_output)(jax.random.key(0), **call)
    params = nn.meta.unbox(params)["params"]
    wanted = reference.pos_embed.pos_embed[0]
    np.testing.assert_allclose(params["positions"].reshape(wanted.shape), wanted.numpy(), atol=2e-6)
    other = jax.jit(config.make().apply)({"params": params}, **call | dict(text=call["text"] + 1))
    assert_close(other, made, 1e-5)


# ---- full sizes

MEDIUM = dict(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192, sample_size=128
)
LARGE = MEDIUM | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm")
NEW_MEDIUM = MEDIUM | dict(pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))


@pytest.mark.parametrize(
    "options,count",
    [(MEDIUM, 2_028_328_000), (LARGE, 8_056_627_520), (NEW_MEDIUM, 2_243_171_520)],
    ids=["3 medium", "3.5 large", "3.5 medium"],
)
def test_full_size_parameters(options, count):
    """Checks names and shapes against diffusers' class, and the sum without the table of positions."""
    with torch.device("meta"):
        reference = SD3Transformer2DModel(**options)
    positions = reference.pos_embed.pos_embed.numel()
    assert sum(parameter.numel() for parameter in reference.parameters()) == count
    config = check_full_size(reference, from_hf_config, count + positions)
    assert (config == SD3TransformerConfig()) == (options is MEDIUM)


def test_blocks_of_one_kind_are_scanned():
    runs = from_hf_config(json.loads(json.dumps(NEW_MEDIUM))).runs
    assert [(run.start, run.count, run.dual, run.last) for run in runs] == [
        (0, 13, True, False),
        (13, 10, False, False),
        (23, 1, False, True),
    ]


# ---- sampling


def test_ten_guided_steps_of_flow_matching(randomise, assert_close, tmp_path):
    """Samples with both rows of guidance, the empty text's and the prompt's, as one batch."""
    reference = randomise(SD3Transformer2DModel(**TINY | dict(qk_norm="rms_norm", num_layers=2)))
    reference.save_pretrained(tmp_path / "transformer")
    there = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    there.save_pretrained(tmp_path / "scheduler")
    module, params = from_pretrained(tmp_path / "transformer")
    scheduler, scale, steps = schedulers.from_folder(tmp_path / "scheduler"), 5.0, 10
    call = inputs(module.config, (8, 10), rows=4)
    noise, texts = call["latents"][:2], dict(text=call["text"], pooled=call["pooled"])

    there.set_timesteps(steps)
    wanted = torch.tensor(noise)
    for timestep in there.timesteps:
        with torch.no_grad():
            doubled = np.concatenate([wanted.numpy()] * 2)
            empty, prompt = theirs(reference, doubled, np.full(4, timestep, np.float32), **texts).chunk(2)
        output = empty + scale * (prompt - empty)
        wanted = there.step(output, timestep, wanted).prev_sample

    @jax.jit
    def sampled(params, noise):
        def step(carry, timestep):
            state, x = carry
            doubled = scheduler.scale(state, jnp.concatenate([x, x]))
            empty, prompt = jnp.split(module.apply({"params": params}, doubled, timestep, **texts), 2)
            return scheduler.step(state, empty + scale * (prompt - empty), x), None

        state = scheduler.init(steps, noise.shape)
        first = noise * scheduler.initial_scale_of(state)
        return jax.lax.scan(step, (state, first), state.timesteps)[0][1]

    found = sampled(params, noise)
    assert_close(found, wanted, 1e-3)
    assert np.abs(np.asarray(found) - noise).max() > 1


# ---- sharding


def test_a_mesh_computes_the_same(devices):
    """Checks it with layers that are recomputed in the backward pass, against one device."""
    options = HUB | dict(
        qk_norm="rms_norm", dual_attention_layers=[0], num_layers=2, num_attention_heads=4, caption_projection_dim=16
    )
    config = from_hf_config(options)
    module = config.make()
    boxed = abstract_params(config, family_of_config(config))
    assert not [leaf for leaf in jax.tree.leaves(boxed, is_leaf=_is_boxed) if not _is_boxed(leaf)]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), nn.meta.unbox(boxed))
    call = inputs(config, (8, 6), rows=4)
    wanted = jax.jit(module.apply)({"params": params}, **call)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2), devices)
    placed = jax.device_put(params, param_shardings(boxed, mesh))
    split = [path for path, leaf in jax.tree.leaves_with_path(placed) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 40 and "modulation" in str(split) and "attention_2" in str(split)
    with use_mesh(mesh):
        found = jax.jit(with_compute(config, remat="full").make().apply)({"params": placed}, **call)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def _is_boxed(leaf) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


# ---- refusals

HUB = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}


@pytest.mark.parametrize(
    "name,value",
    [
        ("qk_norm", "layer_norm"),
        ("qk_norm", "rms_norm_across_heads"),
        ("pos_embed_max_size", None),
        ("pos_embed_max_size", 0),
        ("caption_projection_dim", 16),
        ("attention_head_dim", 3),
        ("num_attention_heads", None),
        ("sample_size", [8, 8]),
        ("sample_size", 1),
        ("dual_attention_layers", [-1]),
        ("dual_attention_layers", None),
        ("num_layers", 0),
        ("joint_attention_dim", "wide"),
        ("pooled_projection_dim", True),
        ("patch_size", 2.0),
        ("in_channels", -4),
        ("out_channels", "4"),
        ("pos_embed_type", "sincos"),
    ],
)
def test_unsupported_options_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        from_hf_config(HUB | {name: value})


@pytest.mark.parametrize(
    "name,shape",
    [
        ("latents", (2, 8, 12)),
        ("latents", (2, 4, 8, 12)),
        ("timesteps", (3,)),
        ("text", (2, 5, 11)),
        ("text", (4, 5, 10)),
        ("text", (2, 0, 10)),
        ("pooled", (2, 8)),
        ("pooled", (7,)),
    ],
)
def test_wrong_shapes_are_named(name, shape):
    config = from_hf_config(HUB)
    call = inputs(config, (8, 12)) | {name: np.ones(shape, np.float32)}
    with pytest.raises(ConfigError, match=f"Stable Diffusion 3.*{name}"):
        jax.eval_shape(config.make().init, jax.random.key(0), **call)


@pytest.mark.parametrize("size,nearest", [((7, 12), (8, 12)), ((14, 8), (12, 8)), ((1, 99), (2, 12))])
def test_sizes_that_do_not_fit_name_the_nearest_that_do(size, nearest):
    config = from_hf_config(HUB)
    message = f"height {size[0]} and width {size[1]}.*height {nearest[0]} and width {nearest[1]}"
    with pytest.raises(ConfigError, match=re.compile(message, re.S)):
        jax.eval_shape(config.make().init, jax.random.key(0), **inputs(config, size))
    jax.eval_shape(config.make().init, jax.random.key(0), **inputs(config, nearest))
