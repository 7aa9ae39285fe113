"""NFNet alone: the rules and refusals of its config, gradients at initialisation, sharding and remat."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.encoders.nfnet import NFNetConfig, NFNetDialect, nfnet
from mllm_jax.encoders.nfnet_timm import FAMILIES, from_hf_config, table, to_hf_config
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import Compute
from mllm_jax.models.registry import abstract_params
from mllm_jax.sharding.mesh import MeshConfig, make_mesh, param_shardings

TINY = NFNetConfig(
    depths=(1, 2), widths=(16, 24), group_sizes=(8, 4), stem_sizes=(2, 4, 8, 16), final_size=20, num_classes=5,
    dialect=NFNetDialect(channel_divisor=4),
)  # fmt: skip
PIXELS = np.random.default_rng(0).normal(size=(2, 40, 24, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    return nn.meta.unbox(jax.jit(TINY.make().init)(jax.random.key(0), PIXELS))


def test_shapes_of_everything_that_comes_out(variables):
    module = TINY.make()
    out = jax.eval_shape(lambda v, x: module.apply(v, x, output_hidden_states=True), variables, PIXELS)
    assert out.last_hidden_state.shape == (2, 5 * 3 * 1, 20) and out.pooler_output.shape == (2, 20)
    # 40 x 24 in quarters, then in eighths.
    assert [x.shape for x in out.hidden_states] == [(2, 60, 16), (2, 60, 16), (2, 15, 24)]
    assert jax.eval_shape(module.apply, variables, PIXELS).hidden_states is None


def test_blocks_begin_as_their_shortcuts(variables):
    """Checks that the learned gain of each branch is 0 at initialisation, so that branches have no effect."""
    module, run = TINY.make(), jax.jit(TINY.make().apply)
    loud = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 1.0 if "conv_3" in jax.tree_util.keystr(path) else x, variables
    )
    np.testing.assert_array_equal(run(variables, PIXELS).pooler_output, run(loud, PIXELS).pooler_output)
    grads = jax.jit(jax.grad(lambda v: jnp.square(module.apply(v, PIXELS).pooler_output).sum()))(variables)["params"]
    assert np.abs(grads["stages_1_1"]["skip_gain"]).max() > 0 and np.abs(grads["stem_0"]["kernel"]).max() > 0
    assert np.abs(grads["stages_1_1"]["conv_1"]["kernel"]).max() == 0


def test_variance_stays_as_expected():
    """Checks the design's variance for white noise: 1 after the shortcut of a stage, alpha^2 more a block."""
    config = change_fields(TINY, depths=(4,), widths=(64,), group_sizes=(32,), stem_sizes=(8, 16, 32, 48), alpha=0.5)
    module = config.make()
    pixels = jax.random.normal(jax.random.key(1), (4, 64, 64, 3))
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), pixels))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 1.0 if "skip_gain" in jax.tree_util.keystr(path) else x, params
    )
    maps = jax.jit(lambda v, x: module.apply(v, x, output_hidden_states=True))(params, pixels).hidden_states
    variances = [float(x.var(axis=(0, 1)).mean()) for x in maps]
    assert 0.8 < variances[0] < 1.2 and 1.6 < variances[1] < 2.4, variances


def test_weights_keep_their_scale_whatever_is_stored(variables):
    """Checks that standardising removes the kernels' mean and size."""
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: 3.0 * x + 0.7 if "kernel" in jax.tree_util.keystr(path) and x.ndim == 4 else x, variables
    )
    config = change_fields(TINY, std_eps=1e-12, skip_init=False)
    without = jax.tree.map(lambda x: x, variables)
    for tree in (without["params"], moved["params"]):
        for name in tree:
            tree[name].pop("skip_gain", None)
    run = jax.jit(config.make().apply)
    np.testing.assert_allclose(run(moved, PIXELS).pooler_output, run(without, PIXELS).pooler_output, atol=1e-4)


def test_remat_changes_no_gradient(variables):
    def grads(config):
        return jax.jit(jax.grad(lambda v: jnp.square(config.make().apply(v, PIXELS).pooler_output).sum()))(variables)

    plain, again = grads(TINY), grads(replace(TINY, compute=Compute(remat="full")))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(np.abs(a).max())))


def test_bfloat16(variables):
    exact = np.asarray(jax.jit(TINY.make().apply)(variables, PIXELS).pooler_output)
    half = jax.jit(replace(TINY, compute=Compute(dtype="bfloat16")).make().apply)(variables, PIXELS)
    assert half.last_hidden_state.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(half.pooler_output, np.float32) - exact) <= 3e-2 * np.linalg.norm(exact)


def test_every_parameter_has_a_name_for_each_axis_and_f6_is_spread(devices):
    config = nfnet("F6")
    abstract = abstract_params(config, FAMILIES[0])
    boxes = jax.tree.leaves(abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim for box in boxes)
    shardings = param_shardings(abstract, make_mesh(MeshConfig(fsdp=8)))
    leaves = zip(jax.tree.leaves(nn.meta.unbox(abstract)), jax.tree.leaves(shardings), strict=True)
    held = sum(np.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in leaves)
    total = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nn.meta.unbox(abstract)))
    assert held < total / 7


# ---- configs

F0 = dict(architecture="dm_nfnet_f0", num_classes=1000, pretrained_cfg={})


def test_options_are_refused_by_name():
    for options, message in (
        (dict(stem_type="7x7"), "stem_type='7x7'"),
        (dict(attn_layer="eca"), "attn_layer='eca'"),
        (dict(attn_kwargs=dict(rd_ratio=0.5, add_maxpool=True)), "add_maxpool=True"),
        (dict(width_factor=0.5), "width_factor=0.5"),
        (dict(reg=True), "reg=True"),
        (dict(output_stride=16), "output_stride=16"),
        (dict(brand_new=1), "brand_new=1"),
        (dict(num_features=0), "num_features=0"),
        (dict(act_layer="hard_swish"), "hard_swish"),
        (dict(group_size=100), "groups of 100 in"),
        (dict(depths=[1, 2]), "of different lengths"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_hf_config(F0 | dict(model_args=options))
    with pytest.raises(ConfigError, match="architecture='resnet50'"):
        from_hf_config(F0 | dict(architecture="resnet50"))
    with pytest.raises(ConfigError, match="surprise=3"):
        from_hf_config(F0 | dict(surprise=3))
    with pytest.raises(ConfigError, match="global_pool='max'"):
        from_hf_config(F0 | dict(global_pool="max"))
    with pytest.raises(ConfigError, match="F9"):
        nfnet("F9")


def test_training_options_change_nothing():
    plain = from_hf_config(F0)
    assert plain == from_hf_config(F0 | dict(model_args=dict(drop_rate=0.4, drop_path_rate=0.25, zero_init_fc=True)))
    assert from_hf_config(F0 | dict(model_args=dict(num_classes=3))).num_classes == 3


def test_what_timm_cannot_hold_is_not_written():
    for change in (
        dict(activation="gelu_tanh"),
        dict(std_floor=True),
        dict(stem_sizes=(8, 32, 64, 128)),
        dict(group_sizes=(128, 128, 64, 128)),
    ):
        with pytest.raises(ConfigError, match=f"{next(iter(change))}=.*dm_nfnet_f0"):
            to_hf_config(change_fields(nfnet("F0"), **change))


def test_a_head_is_optional():
    config = replace(TINY, num_classes=0)
    assert "head" not in abstract_params(config, FAMILIES[0])
    assert not [line for line in table(config).weights if line.name.startswith("head")]
