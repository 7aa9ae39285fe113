"""The UNet against diffusers' UNet2DConditionModel, through real folders both ways."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from flax import linen as nn

from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.checkpoints.layout import lay_out
from mllm_jax.checkpoints.leaves import flatten
from mllm_jax.errors import ConfigError
from mllm_jax.generators.unet import UNetConfig
from mllm_jax.generators.unet_hub import from_hf_config, sample, table
from mllm_jax.models.registry import abstract_params, family_of_config, from_pretrained, save_pretrained
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh, param_shardings

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"
SD_1 = dict(
    block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    down_block_types=(CROSS, PLAIN), up_block_types=(UP_PLAIN, UP_CROSS), sample_size=8,
)  # fmt: skip
# Options of diffusers' class, and height and width of the latents.
CASES = {
    "SD 1": (SD_1 | dict(block_out_channels=(8, 16, 24), down_block_types=(CROSS, CROSS, PLAIN),
                         up_block_types=(UP_PLAIN, UP_CROSS, UP_CROSS), layers_per_block=2), (8, 12)),
    "SD 2": (SD_1 | dict(attention_head_dim=(2, 3), use_linear_projection=True, upcast_attention=True,
                         down_block_types=(CROSS, CROSS), up_block_types=(UP_CROSS, UP_CROSS)), (7, 10)),
    "scale_shift, uneven layers": (SD_1 | dict(
        resnet_time_scale_shift="scale_shift", layers_per_block=(2, 1, 3), attention_head_dim=(2, 4, 3),
        block_out_channels=(8, 16, 12), down_block_types=(CROSS, PLAIN, CROSS), mid_block_type="UNetMidBlock2D",
        up_block_types=(UP_CROSS, UP_CROSS, UP_PLAIN), transformer_layers_per_block=(2, 1, 0), norm_eps=0.1,
        only_cross_attention=(True, False, True), act_fn="mish"), (9, 13)),
    "no middle": (SD_1 | dict(
        mid_block_type=None, center_input_sample=True, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0,
        conv_in_kernel=5, conv_out_kernel=1, in_channels=3, out_channels=6, time_embedding_dim=20,
        timestep_post_act="gelu", time_embedding_act_fn="relu", time_cond_proj_dim=5, act_fn="GELU",
        attention_head_dim=3, num_class_embeds=7), (11, 5)),
    "vectors as classes": (SD_1 | dict(
        class_embed_type="projection", projection_class_embeddings_input_dim=6, class_embeddings_concat=True,
        mid_block_scale_factor=1.5, sample_size=(4, 6), transformer_layers_per_block=((1, 2), (2, 1)),
        reverse_transformer_layers_per_block=((2, 1, 3), (1, 2)), block_out_channels=(16, 8), dropout=0.1,
        down_block_types=(CROSS, CROSS), only_cross_attention=True), (4, 6)),
}  # fmt: skip


def build(options: dict, randomise) -> UNet2DConditionModel:
    return randomise(UNet2DConditionModel(**options))


def inputs(config: UNetConfig, size: tuple[int, int], rows: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns the arguments of a call, with a different time and a different mask for each row."""
    rng, d = np.random.default_rng(seed), config.dialect
    text = rng.normal(size=(rows, 5, config.text_widths[0] or 12)).astype(np.float32)
    found = dict(
        latents=rng.normal(size=(rows, *size, config.in_channels)).astype(np.float32),
        timesteps=rng.permutation(1000)[:rows],
        text=text,
    )
    if d.class_embedding == "index":
        found["class_labels"] = rng.integers(config.class_size, size=rows)
    elif d.class_embedding is not None:
        widths = dict(identity=config.time_width).get(d.class_embedding, config.class_size)
        shape = (rows,) if d.class_embedding == "timestep" else (rows, widths)
        found["class_labels"] = rng.normal(size=shape).astype(np.float32)
    if config.condition_size is not None:
        found["timestep_cond"] = rng.normal(size=(rows, config.condition_size)).astype(np.float32)
    return found


def mask_of(text: np.ndarray) -> np.ndarray:
    """Returns a mask of which the last row has nothing."""
    return (np.arange(text.shape[1]) < np.arange(len(text), 0, -1)[:, None] - 1).astype(np.int32)


def theirs(model: UNet2DConditionModel, latents, timesteps, text, text_mask=None, **more) -> torch.Tensor:
    """Returns the reference's output, channels last."""
    more = {name: torch.tensor(value) for name, value in more.items()}
    if text_mask is not None:
        more["encoder_attention_mask"] = torch.tensor(text_mask)
    x = torch.tensor(rearrange(latents, "b h w c -> b c h w"))
    out = model(x, torch.tensor(timesteps), torch.tensor(text), **more).sample
    return rearrange(out, "b c h w -> b h w c")


@pytest.fixture(scope="module")
def case(request, randomise, tmp_path_factory):
    """Returns (reference, module, parameters, size, folder, compiled call) of a case."""
    options, size = CASES[request.param]
    reference, folder = build(options, randomise), tmp_path_factory.mktemp("unet")
    reference.save_pretrained(folder)
    module, params = from_pretrained(folder)
    return reference, module, params, size, folder, jax.jit(module.apply)


every_case = pytest.mark.parametrize("case", CASES, indirect=True)


@every_case
def test_outputs_and_folders_both_ways(case, assert_close, tmp_path):
    reference, module, params, size, folder, apply = case
    call = inputs(module.config, size)
    with torch.no_grad():
        wanted = theirs(reference, **call)
    out = apply({"params": params}, **call)
    assert_close(out, wanted, 1e-4, "output")
    call["text_mask"] = mask_of(call["text"])
    with torch.no_grad():
        masked = theirs(reference, **call)
    assert_close(apply({"params": params}, **call), masked, 1e-4, "with a mask")

    save_pretrained(module, params, tmp_path / "ours")
    opened, report = UNet2DConditionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        assert torch.equal(theirs(opened.eval(), **call), masked)
    before, after = (json.loads((path / "config.json").read_text("utf-8")) for path in (folder, tmp_path / "ours"))
    assert from_hf_config(after) == from_hf_config(before) == module.config


@every_case
def test_gradient_of_every_parameter(case, assert_close):
    reference, module, params, size, *_ = case
    call = inputs(module.config, size, rows=2, seed=1)
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(2, *size, module.config.out_channels)).astype(np.float32)
    reference.zero_grad()
    torch.mean((theirs(reference, **call) - torch.tensor(noise)) ** 2).backward()
    loss = lambda p: ((module.apply({"params": p}, **call) - noise) ** 2).mean()  # noqa: E731
    mine = hub_tensors(table(module.config), jax.jit(jax.grad(loss))(params))
    found = dict(reference.named_parameters())
    assert found.keys() == mine.keys()
    for name, parameter in found.items():
        assert_close(mine[name](), parameter.grad.numpy(), 1e-3, name)


SD_15 = UNetConfig()
SD_2 = dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)


def test_full_size_parameters():
    """Checks names and shapes against diffusers'; the first number is that of the published weights."""
    for options, count in ((dict(cross_attention_dim=768), 859_520_964), (SD_2, 865_910_724)):
        with torch.device("meta"):
            reference = UNet2DConditionModel(**options)
        config = from_hf_config(json.loads(json.dumps(dict(reference.config))))
        shapes = {path: leaf.shape for path, leaf in _leaves(config).items()}
        assert sum(map(np.prod, shapes.values())) == count == sum(p.numel() for p in reference.parameters())
        layouts = lay_out(table(config), shapes)
        assert {name: tuple(p.shape) for name, p in reference.named_parameters()} == {
            layout.name: layout.shape for layout in layouts
        }
    assert SD_15 == from_hf_config(dict(cross_attention_dim=768, sample_size=64))


def _leaves(config):
    return flatten(nn.meta.unbox(abstract_params(config, family_of_config(config))))[0]
