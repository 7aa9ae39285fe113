"""Qwen's vision encoders alone: layouts, windows, packing, refusals and sizes."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.checkpoints.fields import change_fields, make_config
from mllm_jax.encoders import qwen_vit
from mllm_jax.encoders.qwen_patches import lay_out_patches, window_numbers
from mllm_jax.encoders.qwen_vit import QwenViTConfig, QwenViTDialect, from_hf_config, to_hf_config
from mllm_jax.encoders.qwen_vit_v1 import QwenViTV1Config
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.compute import Compute
from mllm_jax.layers.interpolation import bilinear_packed
from mllm_jax.models.registry import abstract_init, abstract_params
from mllm_jax.sharding.logical import RULES

SIZES = dict(patch_size=2, hidden_size=16, num_layers=3, num_heads=2, mlp_size=24, output_size=12)
WINDOWED = QwenViTConfig(
    **SIZES,
    activation="silu",
    window_size=8,
    full_layers=(1,),
    dialect=QwenViTDialect(
        norm="rms", gated=True, tokens_per_second=4, family="Qwen2_5_VisionTransformerPretrainedModel"
    ),
)
DEEP = QwenViTConfig(
    **SIZES,
    activation="gelu_tanh",
    dialect=QwenViTDialect(patch_bias=True, num_positions=25, deepstack_layers=(0, 2), family="Qwen3VLVisionModel"),
)
V1 = QwenViTV1Config(
    image_size=12,
    patch_size=4,
    hidden_size=12,
    num_layers=2,
    num_heads=2,
    mlp_ratio=2.0,
)


def family(config):
    return next(f for f in qwen_vit.FAMILIES if config.family in f.architectures)


def abstract_of(config):
    if config is V1:
        return abstract_init(config.make(), np.zeros((1, 12, 12, 3), np.float32))
    return abstract_params(config, family(config))


def random_params(config):
    """Returns random parameters, without compiling `init`."""
    rng = np.random.default_rng(0)
    abstract = nn.meta.unbox(abstract_of(config))
    return jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), abstract)


def patches_for(layout, config, seed=0):
    """Returns random numbers at every position, padding included."""
    return np.random.default_rng(seed).normal(size=(*layout.source.shape, config.patch_values)).astype(np.float32)


# ---- positions of patches


def test_a_layout_by_hand():
    """Checks an image of 2 x 4 patches and a video of two frames of 2 x 2 in a row of 20, in squares of 2 x 2."""
    layout = lay_out_patches([[(1, 2, 4), (2, 2, 2)], []], 20, merge_size=2, window_side=2)
    assert layout.source[0].tolist() == [*range(16), -1, -1, -1, -1] and (layout.source[1] == -1).all()
    assert layout.segments[0].tolist() == [1] * 8 + [2] * 4 + [3] * 4 + [0] * 4
    square = [[0, 0], [0, 1], [1, 0], [1, 1]]
    beside = [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert layout.coordinates[0].tolist() == square + beside + square + square + [[0, 0]] * 4
    assert layout.grids[0].tolist() == [[2, 4]] * 8 + [[2, 2]] * 8 + [[0, 0]] * 4
    windows = layout.windows[0]
    assert [len(set(windows[i : i + 4])) for i in range(0, 20, 4)] == [1] * 5
    assert len(set(windows[::4])) == 5 and windows[16] == 0 and (layout.windows[1] == 0).all()
    flat = np.arange(16, dtype=np.float32)[:, None]
    assert layout.gather(flat)[0, :, 0].tolist() == [*range(16), 0, 0, 0, 0]


def test_patches_of_later_rows_follow_those_of_earlier_ones():
    layout = lay_out_patches([[(1, 2, 2)], [(1, 2, 4)]], 8)
    assert layout.windows is None
    assert layout.source.tolist() == [[0, 1, 2, 3, -1, -1, -1, -1], [*range(4, 12)]]


def test_windows_tile_each_frame_from_its_corner():
    """Checks 5 x 7 patches with windows of 3: two rows of three, the last ones smaller; the same in another frame."""
    layout = lay_out_patches([[(2, 5, 7)]], 70, merge_size=1, window_side=3)
    row, column = np.divmod(np.arange(35), 7)
    tiles = np.concatenate([(row // 3) * 3 + column // 3, 100 + (row // 3) * 3 + column // 3])
    same = layout.windows[0][:, None] == layout.windows[0][None]
    np.testing.assert_array_equal(same, tiles[:, None] == tiles[None])
    on_device = jax.jit(window_numbers, static_argnums=3)(*layout[1:4], 3)
    np.testing.assert_array_equal(on_device, layout.windows)


@pytest.mark.parametrize(
    "rows,size,message",
    [
        ([[(1, 2, 2)], [(1, 4, 4), (1, 2, 2)]], 16, "row 1 with 20 patches\n  expected: at most 16"),
        ([[(1, 2, 3)]], 16, "1 x 2 x 3 patches in row 0"),
        ([[(0, 2, 2)]], 16, "0 x 2 x 2 patches in row 0"),
        ([[(1, 2, 2)]], 14, "rows of 14 patches"),
    ],
)
def test_refused_layouts(rows, size, message):
    with pytest.raises(DataError, match=message):
        lay_out_patches(rows, size)


def test_patches_of_other_images_are_refused():
    layout = lay_out_patches([[(1, 2, 2)]], 8)
    with pytest.raises(DataError, match="5 patches\n  expected: 4"):
        layout.gather(np.zeros((5, 3), np.float32))


# ---- outputs of the encoders


@pytest.mark.parametrize("config", [WINDOWED, DEEP], ids=["windows", "deepstack"])
def test_packed_images_equal_each_alone(config):
    """Checks that neighbours in the row and padding change nothing."""
    params, apply = random_params(config), jax.jit(config.make().apply)
    together = config.lay_out([[(1, 4, 6), (2, 2, 6)]], 60)
    patches = patches_for(together, config)
    ours = apply({"params": params}, patches, *together[1:])
    outputs = {"last": ours.last_hidden_state, "tokens": ours.pooler_output}
    outputs |= {f"deepstack {i}": x for i, x in enumerate(ours.deepstack_features)}
    assert all(np.isfinite(x).all() for x in outputs.values())
    start = 0
    for grid in ((1, 4, 6), (1, 2, 6), (1, 2, 6)):
        alone = config.lay_out([[grid]], 60)
        stop = start + int((alone.source >= 0).sum())
        other = patches_for(alone, config, seed=1)
        other[0, : stop - start] = patches[0, start:stop]
        single = apply({"params": params}, other, *alone[1:])
        for name, x in outputs.items():
            unit = 1 if name == "last" else config.merge_unit
            field = {"last": "last_hidden_state", "tokens": "pooler_output"}.get(name)
            found = getattr(single, field) if field else single.deepstack_features[int(name[-1])]
            wanted = x[0, start // unit : stop // unit]
            np.testing.assert_allclose(found[0, : len(wanted)], wanted, atol=2e-5, err_msg=f"{name} {grid}")
        start = stop


def test_the_range_of_attention():
    """Checks that windowed layers attend within a window, full layers within a frame."""
    layout = WINDOWED.lay_out([[(2, 4, 8)]], 64)
    windows, segments = layout.windows[0], layout.segments[0]
    assert len(set(windows)) == 4 and len(set(segments)) == 2
    patches = patches_for(layout, WINDOWED)
    changed = patches.copy()
    changed[0, 5] += 1.0
    for full_layers, seen in (((), windows == windows[5]), ((1,), segments == segments[5])):
        config = replace(WINDOWED, full_layers=full_layers)
        params, apply = random_params(config), jax.jit(config.make().apply)
        before, after = (apply({"params": params}, x, *layout[1:]).last_hidden_state[0] for x in (patches, changed))
        moved = np.abs(np.asarray(before) - np.asarray(after)).max(axis=-1) > 1e-6
        np.testing.assert_array_equal(moved, seen)


def test_windows_are_worked_out_where_none_are_given():
    layout = WINDOWED.lay_out([[(1, 4, 6)], [(1, 8, 4)]], 32)
    params, patches = random_params(WINDOWED), patches_for(layout, WINDOWED)
    apply = jax.jit(WINDOWED.make().apply)
    given, own = (apply({"params": params}, patches, *layout[1:4], w) for w in (layout.windows, None))
    np.testing.assert_array_equal(given.pooler_output, own.pooler_output)


def test_positions_stretch_from_corner_to_corner():
    table = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    layout = lay_out_patches([[(1, 3, 3)], [(1, 5, 3)], [(1, 1, 2)]], 15, merge_size=1)
    found = np.asarray(bilinear_packed(jnp.asarray(table), layout.coordinates, layout.grids))
    np.testing.assert_array_equal(found[0, :9], table)
    tall = found[1].reshape(5, 3, 4)
    np.testing.assert_allclose(tall[::2], table.reshape(3, 3, 4), atol=1e-6)
    np.testing.assert_allclose(tall[1], (table[:3] + table[3:6]) / 2, atol=1e-6)
    np.testing.assert_allclose(found[2, :2], table[[0, 2]], atol=1e-6)


@pytest.mark.parametrize("config", [WINDOWED, DEEP, V1], ids=["windows", "deepstack", "first"])
def test_remat_changes_no_gradient(config):
    params = random_params(config)
    if config is V1:
        inputs = (np.random.default_rng(0).normal(size=(1, 12, 8, 3)).astype(np.float32),)
    else:
        layout = config.lay_out([[(1, 4, 4)]], 16)
        inputs = (patches_for(layout, config), *layout[1:])

    def gradient(config):
        def loss(params):
            out = config.make().apply({"params": params}, *inputs)
            tokens = out.last_hidden_state if out.pooler_output is None else out.pooler_output
            return sum(jnp.sin(x).sum() for x in (tokens, *getattr(out, "deepstack_features", ())))

        return jax.jit(jax.grad(loss))(params)

    plain, remat = gradient(config), gradient(replace(config, compute=Compute(remat="full")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, remat)


@pytest.mark.parametrize("config", [WINDOWED, DEEP, V1], ids=["windows", "deepstack", "first"])
def test_every_parameter_has_logical_names_and_bfloat16_computes_in_it(config):
    abstract = abstract_of(config)
    boxes = jax.tree.leaves(abstract, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim
        assert set(box.names) - {None} <= set(RULES) and box.value.dtype == jnp.float32
    stacked = [abstract["layers"]] + ([abstract["deepstack_mergers"]] if config is DEEP else [])
    for box in jax.tree.leaves(stacked, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)):
        assert box.names[0] == "layers"
    arguments = (np.zeros((1, 12, 12, 3), np.float32),) if config is V1 else family(config).sample(config)
    half = replace(config, compute=Compute(dtype="bfloat16")).make()
    out = jax.eval_shape(half.apply, {"params": nn.meta.unbox(abstract)}, *arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("shape", [(1, 16, 23), (1, 18, 24)])
def test_patches_that_do_not_fit_are_refused(shape):
    integers = np.ones(shape[:2], np.int32)
    pairs = np.ones((*shape[:2], 2), np.int32)
    with pytest.raises(DataError, match=r"\[B, N, 24\] with N a multiple of 4"):
        DEEP.make().apply({"params": {}}, np.zeros(shape, np.float32), integers, pairs, pairs)


@pytest.mark.parametrize("shape", [(1, 12, 10, 3), (1, 12, 12, 1)])
def test_images_that_do_not_fit_the_first_encoder_are_refused(shape):
    with pytest.raises(ConfigError, match="3 channels, and a whole number of patches of 4"):
        V1.make().apply({"params": {}}, np.zeros(shape, np.float32))


def test_the_first_encoder_takes_images_of_any_size():
    """Checks that positions are interpolated, and each patch stays one vector."""
    params = random_params(V1)
    pixels = np.random.default_rng(0).normal(size=(2, 8, 20, 3)).astype(np.float32)

    def total(params):
        out = V1.make().apply({"params": params}, pixels)
        return jnp.sin(out.last_hidden_state).sum(), out

    grads, out = jax.jit(jax.grad(total, has_aux=True))(params)
    assert out.last_hidden_state.shape == (2, 10, 12) and out.class_tokens == 0 and V1.grid == 3
    assert grads["position_embedding"].any()


# ---- configs


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(num_heads=8), "a multiple of 4"),
        (dict(norm="batch"), "norm 'batch'"),
        (dict(activation="sine"), "activation 'sine'"),
        (dict(window_size=3), "at least one media token, 4 pixels"),
        (dict(deepstack_layers=(2, 0)), "in ascending order"),
        (dict(deepstack_layers=(3,)), "different layers of the encoder"),
    ],
    ids=lambda x: "",
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        make_config(QwenViTConfig, **SIZES | change)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(num_positions=8), "a square number"),
        (dict(image_size=13), "whole number of patches"),
        (dict(num_heads=5), "heads that divide"),
    ],
    ids=lambda x: "",
)
def test_impossible_first_encoders_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(V1, **change)


# The hub's vision_config of Qwen2.5-VL-3B and Qwen2-VL-7B, with the first spellings of two options.
HUB = {
    "qwen2_5_vl": dict(
        depth=32,
        hidden_act="silu",
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        in_chans=3,
        out_hidden_size=2048,
        patch_size=14,
        spatial_merge_size=2,
        spatial_patch_size=14,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
        tokens_per_second=2,
        temporal_patch_size=2,
    ),
    "qwen2_vl": dict(
        depth=32,
        embed_dim=1280,
        mlp_ratio=4,
        num_heads=16,
        in_chans=3,
        hidden_size=3584,
        patch_size=14,
        spatial_merge_size=2,
        spatial_patch_size=14,
        temporal_patch_size=2,
    ),
}


def test_the_vision_part_of_a_whole_models_config():
    new = from_hf_config(dict(model_type="qwen2_5_vl", vision_config=HUB["qwen2_5_vl"], vocab_size=7, rope_scaling={}))
    assert new.family == "Qwen2_5_VisionTransformerPretrainedModel" and new.window_side == 8
    assert (new.full_layers, new.output_size, new.dialect.tokens_per_second) == ((7, 15, 23, 31), 2048, 2)
    old = from_hf_config(dict(model_type="qwen2_vl", vision_config=HUB["qwen2_vl"]))
    assert (old.hidden_size, old.mlp_size, old.output_size, old.activation) == (1280, 5120, 3584, "quick_gelu")
    for config in (new, old, WINDOWED, DEEP):
        assert from_hf_config(to_hf_config(config)) == config


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(in_chans=1), "in_chans=1"),
        (dict(spatial_patch_size=16), "spatial_patch_size=16"),
        (dict(hidden_act="swish7"), "hidden_act='swish7'"),
        (dict(patch_size=[14, 7]), r"patch_size=\[14, 7\]"),
        (dict(rope_parameters=dict(rope_type="yarn")), "rope_type='yarn'"),
        (dict(rope_parameters=dict(factor=2.0)), "factor=2.0"),
        (dict(deep_thought=42), "deep_thought=42"),
    ],
    ids=lambda x: "",
)
def test_options_that_are_not_supported_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        from_hf_config(dict(model_type="qwen2_5_vl", vision_config=HUB["qwen2_5_vl"] | change))


def test_another_models_config_is_refused():
    with pytest.raises(ConfigError, match="model_type='llama'"):
        from_hf_config(dict(model_type="llama"))


@pytest.mark.parametrize(
    "change", [dict(patch_bias=True), dict(mlp_size=25), dict(num_positions=9), dict(window_size=8), dict(norm="rms")]
)
def test_what_the_family_has_no_option_for_is_not_written(change):
    plain = QwenViTConfig(**SIZES | dict(mlp_size=32))
    assert from_hf_config(to_hf_config(plain)) == plain
    with pytest.raises(ConfigError, match=next(iter(change))):
        to_hf_config(change_fields(plain, **change))
    with pytest.raises(ConfigError, match="family 'Nobody'"):
        to_hf_config(change_fields(plain, family="Nobody"))


# tests/parity counts transformers' classes.
@pytest.mark.parametrize(
    "config,count",
    [
        (from_hf_config(dict(model_type="qwen2_5_vl", vision_config=HUB["qwen2_5_vl"])), 668_684_288),
        (from_hf_config(dict(model_type="qwen2_vl", vision_config=HUB["qwen2_vl"])), 675_759_104),
    ],
    ids=["2.5-3B", "2-7B"],
)
def test_full_size_parameter_counts(config, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, family(config)))) == count
