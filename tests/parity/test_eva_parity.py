"""EVA-01 against Blip2VisionModel and LAVIS, EVA-02-CLIP against timm and its own repository's code."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from einops import rearrange
from safetensors.numpy import load_file, save_file
from timm_reference import timm_or_skip
from vision_checks import GOLDENS, check_transformers, family_of, make_image, pack, read, to_torch, write

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.checkpoints.hf import read_weights
from mllm_jax.encoders import eva
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.models.registry import abstract_params

timm = timm_or_skip()
from timm.models._hub import save_for_hf  # noqa: E402

BLIP2 = family_of(eva, "Blip2VisionModel")
TIMM = family_of(eva, "eva02_large_patch14_clip_336")

# ---- Blip2VisionModel

SIZES = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=44, image_size=20, patch_size=4
)
CASES = {
    "giant": {},
    "loud epsilon": dict(layer_norm_eps=0.1, num_attention_heads=2, hidden_act="quick_gelu"),
    "no biases": dict(qkv_bias=False, image_size=22),
}


@pytest.mark.parametrize("case", CASES)
def test_blip2_outputs_and_folders(case, randomise, assert_close, tmp_path):
    config = transformers.Blip2VisionConfig(**SIZES | CASES[case], attn_implementation="eager")
    reference = randomise(transformers.Blip2VisionModel(config))
    sizes = [(20, 20), (16, 30), (8, 12)]
    _, params = check_transformers(reference, BLIP2, tmp_path, assert_close, sizes, interpolate_pos_encoding=True)
    # The softmax cancels the keys' bias, so check its position in the fused tensor.
    if case != "no biases":
        stored = reference.state_dict()["encoder.layers.1.self_attn.qkv.bias"].numpy()
        mine = [np.asarray(params["layers"]["attention"][part]["bias"][1]).ravel() for part in "qkv"]
        np.testing.assert_array_equal(np.concatenate(mine), stored)


# ---- timm

SMALL = dict(embed_dim=48, depth=3, num_heads=3, patch_size=7)
# Architecture, its arguments.
VARIANTS = {
    "EVA-02 L": ("eva02_large_patch14_clip_336", dict(img_size=35, num_classes=20)),
    "EVA-02 B without a head": ("eva02_base_patch16_clip_224", dict(img_size=28, num_classes=0)),
    "EVA-02 mean": (
        "eva02_large_patch14_clip_224",
        dict(img_size=28, num_classes=9, global_pool="avg", init_values=0.3),
    ),
    "EVA-02 E": ("eva02_enormous_patch14_clip_224", dict(img_size=28, num_classes=12, mlp_ratio=20 / 7)),
    "EVA-01": ("eva_giant_patch14_clip_224", dict(img_size=35, num_classes=16, mlp_ratio=4.3637)),
    "packed SwiGLU": ("eva_giant_patch14_clip_224", dict(img_size=21, num_classes=5, swiglu_mlp=True, num_heads=6)),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_timm_outputs_and_folders(case, randomise, assert_close, tmp_path):
    name, arguments = VARIANTS[case]
    arguments = SMALL | arguments
    reference = randomise(timm.create_model(name, **arguments))
    save_for_hf(reference, tmp_path / "theirs", safe_serialization=True)
    module, params = read(TIMM, tmp_path / "theirs")
    assert TIMM.from_hf(TIMM.to_hf(module.config)) == module.config
    side = arguments["img_size"]
    # The same weights in a model that takes images of any size.
    dynamic = timm.create_model(name, **arguments, dynamic_img_size=True).eval()
    dynamic.load_state_dict(reference.state_dict())
    apply = jax.jit(module.apply, static_argnums=2)
    sizes, wanted = [(side, side), (21, 42), (14, 7)], []
    for i, (height, width) in enumerate(sizes):
        pixels = make_image(height, width)
        with torch.no_grad():
            model = reference if i == 0 else dynamic
            last, states = model.forward_intermediates(to_torch(pixels), return_prefix_tokens=True, output_fmt="NLC")
            pooled = model(to_torch(pixels))
        wanted.append((last, [torch.cat([prefix, patches], dim=1) for patches, prefix in states]))
        if i == 2:
            break
        ours = apply({"params": params}, pixels, True)
        for layer, state in enumerate(wanted[i][1], start=1):
            assert_close(ours.hidden_states[layer], state, 1e-4, f"{height} x {width}: layer {layer}")
        assert_close(ours.last_hidden_state, last, 1e-4, f"{height} x {width}: last")
        assert_close(ours.pooler_output, pooled, 1e-4, f"{height} x {width}: pooled")
    pixels, segments, coordinates, grids, spans = pack([make_image(*size) for size in sizes], 7, True)
    places = dict(segments=segments, coordinates=coordinates, grids=grids)
    packed = jax.jit(module.apply)({"params": params}, pixels, **places)
    for (last, _), span in zip(wanted, spans, strict=True):
        assert_close(packed.last_hidden_state[:, span], last, 1e-4, "packed")

    write(TIMM, module, params, tmp_path / "ours")
    stored = {key: tensor.numpy() for key, tensor in reference.state_dict().items()}
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == stored.keys() and all((written[key] == stored[key]).all() for key in stored)
    opened = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    with torch.no_grad():
        theirs, ours = opened(to_torch(make_image(side, side))), reference(to_torch(make_image(side, side)))
    assert torch.equal(theirs, ours)
    assert tuple(opened.pretrained_cfg["mean"]) == reference.pretrained_cfg["mean"]


# ---- stored outputs of the original repositories

GOLDEN = {
    "eva02_clip_rope_swiglu_subln": ("eva02_large_patch14_clip_336", dict(ref_feat_shape=[4, 4])),
    "eva02_clip_E_postnorm": ("eva02_enormous_patch14_clip_224", {}),
    "eva02_subln_gelu_mlp": ("eva02_base_patch16_clip_224", dict(swiglu_mlp=False, use_rot_pos_emb=False)),
    "eva01_lavis": ("eva_giant_patch14_clip_224", {}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_original_code(name, assert_close, tmp_path):
    golden = np.load(GOLDENS / f"{name}.npz")
    options = json.loads((GOLDENS / f"{name}.json").read_text("utf-8"))["config"]
    architecture, arguments = GOLDEN[name]
    renamed = dict(img_size="img_size", patch_size="patch_size", width="embed_dim", layers="depth", heads="num_heads")
    renamed |= dict(mlp_ratio="mlp_ratio", embed_dim="num_classes")
    arguments = arguments | {timm_name: options[ours] for ours, timm_name in renamed.items() if ours in options}
    config = TIMM.from_hf(dict(architecture=architecture, num_classes=0, model_args=arguments))
    if name == "eva01_lavis":  # returns all tokens as the last layer leaves them
        config = change_fields(config, norm_output=False, pooler="none")
    if name == "eva02_subln_gelu_mlp":  # its plain MLP's norm is PyTorch's own
        config = change_fields(config, mlp_sub_norm_eps=1e-5)
    save_file(
        {f.removeprefix("weights/"): golden[f] for f in golden.files if f.startswith("weights/")},
        tmp_path / "model.safetensors",
    )
    params = read_weights(tmp_path, TIMM.table(config), abstract_params(config, TIMM))
    pixels = rearrange(golden["inputs/pixel_values"], "b c h w -> b h w c")
    ours = jax.jit(config.make().apply, static_argnums=2)({"params": params}, pixels, True)
    assert_close(ours.hidden_states[0], golden["outputs/embeddings"], 1e-4, "embeddings")
    for i, state in enumerate(ours.hidden_states[1:]):
        assert_close(state, golden[f"outputs/block{i}"], 1e-4, f"layer {i}")
    if name == "eva01_lavis":
        assert_close(ours.last_hidden_state, golden["outputs/output"], 1e-4, "output")
        assert ours.pooler_output is None
    else:
        assert_close(ours.last_hidden_state[:, 0], golden["outputs/pooled_before_head"], 1e-4, "class token")
        assert_close(ours.pooler_output, golden["outputs/output"], 1e-4, "output")


# ---- bad input


@pytest.mark.parametrize(
    "arguments,named",
    [
        (dict(qkv_fused=True), "qkv_fused"),
        (dict(num_reg_tokens=4), "num_reg_tokens"),
        (dict(rope_type="mixed"), "rope_type"),
        (dict(rope_grid_indexing="xy"), "rope_grid_indexing"),
        (dict(global_pool="map"), "global_pool"),
        (dict(use_fc_norm=True, use_post_transformer_norm=True), "use_post_transformer_norm"),
        (dict(ref_feat_shape=[16, 8]), "ref_feat_shape"),
        (dict(some_new_argument=1), "some_new_argument"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused_by_name(arguments, named):
    with pytest.raises(ConfigError, match=named):
        TIMM.from_hf(dict(architecture="eva02_large_patch14_clip_336", model_args=arguments))


def test_a_bare_architecture_is_the_published_model():
    """Checks the hub's older folders, which have no model_args."""
    c = TIMM.from_hf(
        dict(
            architecture="eva02_large_patch14_clip_336",
            num_classes=768,
            pretrained_cfg=dict(std=[1, 1, 1], mean=[0, 0, 0]),
        )
    )
    assert (c.side, c.hidden_size, c.mlp_size, c.dialect.rope_grid, c.dialect.head_size, c.image_mean) == (
        24,
        1024,
        2730,
        16,
        768,
        (0, 0, 0),
    )
    with pytest.raises(ConfigError, match="eva02_tiny"):
        TIMM.from_hf(dict(architecture="eva02_tiny_patch14_224"))


def test_weights_of_a_model_without_sub_norms_are_refused(randomise, tmp_path):
    reference = randomise(
        timm.create_model("eva02_large_patch14_clip_336", **SMALL, img_size=28, scale_attn_inner=False)
    )
    save_for_hf(reference, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    del config["model_args"]["scale_attn_inner"]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match="attn.norm.weight: missing"):
        read(TIMM, tmp_path)
