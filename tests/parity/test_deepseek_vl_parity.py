"""DeepSeek-VL, with and without SAM, against transformers' classes."""

from __future__ import annotations

import dataclasses
from importlib import import_module

import numpy as np
import pytest
import torch
import transformers
from composed_checks import WORDS, check_composed, make_image, tiles_of, tokenizer

from mllm_jax.errors import ConfigError
from mllm_jax.layers.pixels import normalise_pixels
from mllm_jax.models import deepseek_vl
from mllm_jax.models.deepseek_vl import HYBRID, SINGLE, DeepseekVLLayout, layout

PLACEHOLDER, IMAGE = "<image_placeholder>", len(WORDS)
SIGLIP = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=30,
    image_size=16,
    patch_size=4,
    hidden_act="gelu",
    vision_use_head=False,
)
# 6 patches a side: windows of 4 have margins, and 6 are resized to 16 and halved twice to SigLIP's 4.
SAM = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=24,
    patch_size=4,
    window_size=4,
    global_attn_indexes=[1, 2],
    output_channels=6,
)
TEXT = dict(
    vocab_size=len(WORDS) + 1,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=256,
)
CASES = {
    "SigLIP": (SINGLE, dict(vision_config=SIGLIP, tie_word_embeddings=False), {}),
    "SigLIP with its head, tied": (
        SINGLE,
        dict(
            vision_config=SIGLIP | dict(vision_use_head=True, hidden_act="gelu_pytorch_tanh"), tie_word_embeddings=True
        ),
        dict(image_mean=[0.5] * 3, image_std=[0.5] * 3),
    ),
    "SigLIP and SAM": (
        HYBRID,
        dict(vision_config=SIGLIP, high_res_vision_config=SAM, tie_word_embeddings=False),
        dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2),
    ),
    "and SAM without biases, other colours, tied": (
        HYBRID,
        dict(
            vision_config=SIGLIP,
            high_res_vision_config=SAM | dict(qkv_bias=False, global_attn_indexes=[0]),
            tie_word_embeddings=True,
        ),
        dict(high_res_image_mean=[0.1, 0.2, 0.3]),
    ),
}


def build(case: str, folder, randomise):
    """Builds the reference and its processor, and saves them."""
    family, options, pixels = CASES[case]
    kind = "DeepseekVLHybrid" if family == HYBRID else "DeepseekVL"
    config = getattr(transformers, f"{kind}Config")(**options, text_config=TEXT, image_token_id=IMAGE)
    reference = randomise(getattr(transformers, family)(config))
    with torch.no_grad():
        for name, value in reference.named_parameters():
            if "rel_pos" in name or "alpha" in name:
                value.copy_(0.5 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    reference.tie_weights()
    module = f"{'deepseek_vl_hybrid' if family == HYBRID else 'deepseek_vl'}"
    pil = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    sides = dict(size=dict(height=16, width=16), min_size=4)
    sides |= dict(high_res_size=dict(height=24, width=24)) if family == HYBRID else {}
    images = getattr(pil, f"{kind}ImageProcessorPil")(**sides | pixels)
    processor = getattr(transformers, f"{kind}Processor")(
        images, tokenizer(image_token=PLACEHOLDER), num_image_tokens=16
    )
    reference.save_pretrained(folder)
    processor.save_pretrained(folder)
    return reference, processor


@pytest.mark.parametrize("case", CASES)
def test_against_transformers(case, randomise, assert_close, tmp_path):
    reference, processor = build(case, tmp_path, randomise)
    module, _, batch, shown = check_composed(reference, processor, tmp_path, PLACEHOLDER, assert_close)
    config = module.config
    assert deepseek_vl.from_hf_config(deepseek_vl.to_hf_config(config)) == config
    encoder = config.image.encoder
    shown, row = shown[1], batch["images"][1]
    bytes_stay = case in ("SigLIP with its head, tied", "SigLIP and SAM")
    assert (row.dtype == np.uint8) == bytes_stay
    if CASES[case][0] == HYBRID:
        row = row / np.float32(255) if bytes_stay else row
        for tower, name, pixels in (
            (encoder.high, "high_res_pixel_values", row[:, :24]),
            (encoder.low, "pixel_values", row[:, 24:, :16]),
        ):
            found = (pixels - np.float32(tower.image_mean)) / np.float32(tower.image_std)
            np.testing.assert_allclose(found, tiles_of(shown, name), rtol=0, atol=2e-6)
    else:
        found = np.asarray(normalise_pixels(row, module.config.image.encoder)) if bytes_stay else row
        np.testing.assert_allclose(found, tiles_of(shown), rtol=0, atol=1e-6)


def test_the_authors_preprocessing(randomise, tmp_path):
    build("SigLIP and SAM", tmp_path, randomise)
    config = deepseek_vl.from_hf_config(
        transformers.AutoConfig.from_pretrained(tmp_path).to_dict() | dict(architectures=[HYBRID])
    )
    theirs = layout(dataclasses.replace(config, preprocessing="original"), tmp_path)
    image = make_image(38, 61)  # 61 pixels become 24, and 38 become 14.95
    large = theirs.image(image).arrays["images"]
    assert large.shape == (1, 24, 24, 3) and large.dtype == np.uint8
    hub = layout(config, tmp_path).image(image).arrays["images"]
    assert hub.shape == (1, 40, 24, 3)
    margin = [int((each[0, :24] == each[0, 0, 0]).all(axis=(1, 2)).sum()) for each in (large, hub)]
    assert margin == [10, 9], "14 rows by the authors' code, 15 by transformers'"
    assert "preprocessing" not in deepseek_vl.to_hf_config(theirs.config)


def test_what_does_not_fit_is_refused(randomise, tmp_path):
    _, processor = build("SigLIP and SAM", tmp_path, randomise)
    config = deepseek_vl.from_hf_config(
        transformers.AutoConfig.from_pretrained(tmp_path).to_dict() | dict(architectures=[HYBRID])
    )
    images = layout(config, tmp_path).image_processor
    for wrong in (dataclasses.replace(images, low=None), dataclasses.replace(images, longest_edge=(20, 4))):
        with pytest.raises(ConfigError, match="squares of 24 and 16 pixels"):
            DeepseekVLLayout(config, wrong)
    for change, message in (
        (dict(family=SINGLE), "with encoder SiglipSamConfig"),
        (dict(preprocessing="mine"), "preprocessing 'mine'"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, **change)
    with pytest.raises(ConfigError, match=r"widths \(3, 4\)"):
        config.with_branch("image", projector=dataclasses.replace(config.image.projector, widths=(3, 4)))
    other = dataclasses.replace(config.image.encoder, downsample=(5, 7))
    narrow = dataclasses.replace(config.image.projector, widths=other.widths)
    with pytest.raises(ConfigError, match="encoder="):
        deepseek_vl.to_hf_config(config.with_branch("image", encoder=other, projector=narrow))
    written = deepseek_vl.to_hf_config(config)
    for part, value, message in (
        ("vision_config", dict(model_type="clip_vision_model"), "an encoder 'clip_vision_model'"),
        ("high_res_vision_config", dict(use_rope=True), "use_rope=True"),
        ("text_config", dict(model_type="gemma", architectures=None), "model_type='gemma'"),
    ):
        with pytest.raises(ConfigError, match=message):
            deepseek_vl.from_hf_config(written | {part: written[part] | value})
    with pytest.raises(ConfigError, match="use_cls=True"):
        deepseek_vl.from_hf_config(written | dict(use_cls=True))
