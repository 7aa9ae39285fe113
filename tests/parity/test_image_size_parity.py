"""Models for images of another size: position tables as transformers' `interpolate_pos_encoding` makes them."""

from __future__ import annotations

import json
from functools import partial

import jax
import numpy as np
import pytest
import torch
import transformers
from llava_reference import TEXTS, build, make_images, reference_inputs
from vision_checks import make_image, to_torch

from mllm_jax import Processor, from_pretrained, save_pretrained

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, patch_size=5)
TOWERS = {
    "ViT": (transformers.ViTConfig, transformers.ViTModel, dict(image_size=20)),
    "CLIP": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel, dict(image_size=15)),
    "SigLIP": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel, dict(image_size=20)),
    "DINOv2": (transformers.Dinov2Config, transformers.Dinov2Model, dict(image_size=20, mlp_ratio=2)),
}


@pytest.mark.parametrize("tower,size", [("ViT", 10), ("CLIP", 35), ("SigLIP", 35), ("DINOv2", 30)])
def test_a_tower(tower, size, randomise, assert_close, tmp_path, caplog):
    config, kind, side = TOWERS[tower]
    sizes = SIZES | side
    if tower == "DINOv2":
        del sizes["intermediate_size"]
    reference = randomise(kind(config(**sizes)))
    reference.save_pretrained(tmp_path / "theirs")
    how = {} if tower == "DINOv2" else dict(interpolate_pos_encoding=True)  # which that class always does
    with torch.no_grad():
        theirs = reference(to_torch(make_image(size, size)), **how)
    with caplog.at_level("INFO", "mllm_jax.models"):
        module, params = from_pretrained(tmp_path / "theirs", image_size=size)
    grid, before = size // 5, side["image_size"] // 5
    rows = grid**2 + int(module.config.class_token)
    assert params["position_embedding"].shape == (rows, 24) and module.config.image_size == size
    assert f"from {before} x {before} to {grid} x {grid}" in caplog.text
    ours = jax.jit(module.apply)({"params": params}, make_image(size, size))
    assert_close(ours.last_hidden_state, theirs.last_hidden_state, 1e-4, "last hidden state")
    assert_close(ours.pooler_output, theirs.pooler_output, 1e-4, "pooled")
    # What is written is a model of that size to transformers: its table needs no interpolation any more.
    save_pretrained(module, params, tmp_path / "ours")
    opened, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert opened.config.image_size == size
    with torch.no_grad():
        assert_close(
            opened(to_torch(make_image(size, size))).last_hidden_state, theirs.last_hidden_state, 1e-4, "written"
        )


@pytest.mark.parametrize("case,size", [("llava", 20), ("next", 8)])
def test_a_llava(case, size, randomise, assert_close, tmp_path):
    """Checks tiles, media tokens, positions and logits of the new size, and the written folder."""
    reference, processor = build(case, tmp_path / "theirs", randomise)
    model, params = from_pretrained(tmp_path / "theirs", image_size=size)
    ours = Processor.from_pretrained(tmp_path / "theirs", image_size=size)
    batch = ours(TEXTS, images=make_images())
    assert batch["images"].shape[2:] == (size, size, 3)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, batch).logits)
    save_pretrained(model, params, tmp_path / "ours", companions=tmp_path / "theirs")
    settings = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())
    kind = type(processor.image_processor)
    pixels = kind(**{name: value for name, value in settings.items() if not name.endswith("_type")})
    processor.image_processor = pixels
    inputs = reference_inputs(processor, TEXTS, make_images(), "right")
    tower, config = reference.model.vision_tower, reference.config
    tower.forward = partial(tower.forward, interpolate_pos_encoding=True)
    config.vision_config.image_size = size  # the whole model reads the tiles' side from it, the tower does not
    if case != "llava":
        config.image_grid_pinpoints = settings["image_grid_pinpoints"]
    opened = type(reference).from_pretrained(tmp_path / "ours").eval()
    for which, theirs in (("interpolated", reference), ("written", opened)):
        with torch.no_grad():
            wanted = theirs(**inputs).logits.numpy()
        for row, segments in enumerate(batch["segments"]):
            length = int(segments.sum())
            assert_close(logits[row, :length], wanted[row, :length], 1e-4, f"{which}, row {row}")
