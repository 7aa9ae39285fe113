"""SAM's image encoder against SamVisionModel."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from einops import rearrange
from flax import linen as nn
from vision_checks import family_of, make_image, read, to_torch, write

from mllm_jax.encoders import sam
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import Compute

FAMILY = family_of(sam, "SamVisionModel")
SIZES = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=4, output_channels=12
)
CASES = {
    # 8 patches a side in windows of 3: the last ones are a third margin
    "windows and one global layer": dict(window_size=3, global_attn_indexes=[1]),
    "windows that fit, no biases, another width": dict(
        window_size=4, global_attn_indexes=[0, 2], qkv_bias=False, mlp_dim=30, hidden_act="relu", layer_norm_eps=0.1
    ),
    "no position tables": dict(window_size=5, global_attn_indexes=[], use_abs_pos=False, use_rel_pos=False),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_folders(case, randomise, assert_close, tmp_path):
    config = transformers.SamVisionConfig(**SIZES | CASES[case], attn_implementation="eager")
    reference = randomise(transformers.SamVisionModel(config))
    with torch.no_grad():
        for name, table in reference.named_parameters():
            if "rel_pos" in name or name.endswith("pos_embed"):
                table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(len(name))))
    reference.save_pretrained(tmp_path / "theirs")
    module, params = read(FAMILY, tmp_path / "theirs")
    assert FAMILY.from_hf(FAMILY.to_hf(module.config)) == module.config

    pixels = make_image(32, 32, rows=2)
    ours = jax.jit(module.apply, static_argnums=2)({"params": params}, pixels, True)

    def compare(model, what):
        with torch.no_grad():
            theirs = model(to_torch(pixels), output_hidden_states=True)
        last = rearrange(theirs.last_hidden_state, "b e h w -> b (h w) e")
        assert_close(ours.last_hidden_state, last, 1e-4, f"{what}: after the neck")
        for i, (mine, their) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
            assert_close(mine, rearrange(their, "b h w e -> b (h w) e"), 1e-4, f"{what}: hidden state {i}")

    compare(reference, "read")
    write(FAMILY, module, params, tmp_path / "ours")
    opened, report = transformers.SamVisionModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert all(torch.equal(t, opened.state_dict()[name]) for name, t in reference.state_dict().items())
    compare(opened, "written")


@pytest.mark.parametrize(
    "option", [dict(patch_size=[16, 8]), dict(rope=True), dict(window_size=0), dict(global_attn_indexes=[12])]
)
def test_options_that_cannot_be_honoured_are_refused_by_name(option):
    name = {"window_size": "window 0", "global_attn_indexes": "global layers"}
    with pytest.raises(ConfigError, match=name.get(next(iter(option)), next(iter(option)))):
        FAMILY.from_hf(dict(architectures=["SamVisionModel"]) | option)


def test_rematerialised_layers_give_the_same_gradients(assert_close):
    config = FAMILY.from_hf(SIZES | dict(window_size=3, global_attn_indexes=[1]))
    pixels = make_image(32, 32)
    params = nn.meta.unbox(config.make().init(jax.random.key(0), pixels)["params"])
    stored, again = (
        jax.jit(jax.grad(lambda p, m=m: (m.apply({"params": p}, pixels).last_hidden_state ** 2).sum()))(params)
        for m in (config.make(), dataclasses.replace(config, compute=Compute(remat="full")).make())
    )
    for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(again), strict=True):
        if np.abs(a).max() > 1e-3:  # gradients of key biases are zero up to rounding
            assert_close(b, a, 1e-4)


def test_images_of_another_size_are_refused():
    module = FAMILY.from_hf(SIZES | dict(window_size=3, global_attn_indexes=[1])).make()
    with pytest.raises(ConfigError, match=r"(?s)pixels of shape \[1, 32, 28, 3\].*\[B, 32, 32, 3\]"):
        module.init(jax.random.key(0), make_image(32, 28))
