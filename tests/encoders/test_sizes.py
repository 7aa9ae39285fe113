"""Full-size configs have exactly the published number of parameters; nothing is allocated."""

from __future__ import annotations

import importlib
import math

import jax
import pytest

from mllm_jax.models.registry import abstract_params

EVA02_L = "eva02_large_patch14_clip_336"
INTERN_6B = dict(num_hidden_layers=45, hidden_size=3200, num_attention_heads=25, intermediate_size=12800)
# Model -> (home, architecture, its options, parameters of the reference class, parameters that are dropped).
SIZES = {
    "ViT-B/16": ("vit_hf", "ViTModel", {}, 86_389_248, 0),
    "CLIP L/14-336": (
        "clip_vision",
        "CLIPVisionModel",
        dict(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            image_size=336,
            patch_size=14,
        ),
        303_507_456,
        0,
    ),
    "SigLIP so400m/14-384": (
        "siglip_vision",
        "SiglipVisionModel",
        dict(
            hidden_size=1152,
            num_hidden_layers=27,
            num_attention_heads=16,
            intermediate_size=4304,
            image_size=384,
            patch_size=14,
        ),
        428_225_600,
        0,
    ),
    # The mask token is dropped.
    "DINOv2-S/14": (
        "dinov2",
        "Dinov2Model",
        dict(hidden_size=384, num_attention_heads=6, image_size=518),
        22_056_576,
        384,
    ),
    "DINOv2-g/14": (
        "dinov2",
        "Dinov2Model",
        dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, image_size=518, use_swiglu_ffn=True),
        1_136_480_768,
        1536,
    ),
    "EVA-01-g in BLIP-2": ("eva", "Blip2VisionModel", {}, 985_952_256, 0),
    "EVA-01-g": ("eva", "eva_giant_patch14_clip_224", dict(num_classes=1024), 1_012_588_928, 0),
    "EVA-02-CLIP B/16": ("eva", "eva02_base_patch16_clip_224", dict(num_classes=512), 86_263_040, 0),
    "EVA-02-CLIP L/14-336": ("eva", EVA02_L, dict(num_classes=768), 304_432_832, 0),
    "EVA-02-CLIP E/14": ("eva", "eva02_enormous_patch14_clip_224", dict(num_classes=1024), 4_350_556_928, 0),
    "SAM-B": ("sam", "SamVisionModel", {}, 89_670_912, 0),
    "InternViT-300M": ("internvit", "InternVLVisionModel", dict(attention_bias=True), 304_012_288, 0),
    "InternViT-6B": (
        "internvit",
        "InternVLVisionModel",
        INTERN_6B | dict(norm_type="rms_norm", use_qk_norm=True),
        5_536_496_000,
        0,
    ),
}


@pytest.mark.parametrize("model", SIZES)
def test_parameters_of_full_size_models(model):
    home, architecture, options, published, left_out = SIZES[model]
    families = importlib.import_module(f"mllm_jax.encoders.{home}").FAMILIES
    family = next(family for family in families if architecture in family.architectures)
    timm = "_" in architecture
    named = dict(architecture=architecture) | options if timm else dict(architectures=[architecture]) | options
    config = family.from_hf(named)
    params = abstract_params(config, family)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == published - left_out
    # Each has a line in the table, and each of its dimensions a logical name or None.
    boxes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "names"))
    paths = {"/".join(key.key for key in path) for path, _ in boxes}
    assert paths == {weight.path for weight in family.table(config).weights}
    assert all(len(box.names) == box.value.ndim for _, box in boxes)


def test_the_numbers_are_those_of_the_reference_classes():
    torch = pytest.importorskip("torch")
    from timm_reference import timm_or_skip

    timm, transformers = timm_or_skip(), importlib.import_module("transformers")
    for model, (_, architecture, options, published, _) in SIZES.items():
        with torch.device("meta"):
            if "_" in architecture:
                reference = timm.create_model(architecture, **options)
            else:
                reference = getattr(transformers, architecture)
                reference = reference(reference.config_class(**options))
        assert sum(parameter.numel() for parameter in reference.parameters()) == published, model
