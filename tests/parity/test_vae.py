"""The autoencoder of latent diffusion against diffusers' AutoencoderKL: encode, decode, tiles, gradients, folders."""

from __future__ import annotations

import json
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from mllm_jax import from_pretrained, pretrained_config, save_pretrained
from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.errors import CheckpointError, ConfigError, DataError
from mllm_jax.generators.vae import AutoencoderKLConfig
from mllm_jax.generators.vae_hub import FAMILIES, from_hf_config, to_hf_config
from mllm_jax.layers.compute import Compute
from mllm_jax.models.registry import abstract_params

FAMILY = FAMILIES[0]
STEM = "diffusion_pytorch_model"


def blocks(*widths: int) -> dict:
    names = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    return dict(block_out_channels=widths, **{name: (kind,) * len(widths) for name, kind in names.items()})


# Of each kind a tiny one: the image's height and width have remainders by what the blocks divide them by.
CASES = {
    "Stable Diffusion 1": (
        dict(**blocks(8, 16, 24), layers_per_block=2, norm_num_groups=4, sample_size=32),
        (24, 40),
    ),
    "Stable Diffusion 3": (
        dict(
            **blocks(12, 18),
            latent_channels=6,
            norm_num_groups=3,
            sample_size=20,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            force_upcast=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        (23, 41),
    ),
    "AudioLDM-2": (
        dict(
            **blocks(8, 8, 16),
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            latent_channels=8,
            norm_num_groups=2,
            sample_size=64,
            mid_block_add_attention=False,
        ),
        (50, 16),
    ),
    "means and deviations of latents": (
        dict(
            **blocks(6, 10),
            in_channels=4,
            out_channels=2,
            latent_channels=2,
            norm_num_groups=2,
            sample_size=16,
            act_fn="gelu",
            latents_mean=(0.5, -0.25),
            latents_std=(2.0, 0.5),
        ),
        (9, 14),
    ),
}


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(0, scale, shape).astype(np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(rearrange(x, "b h w c -> b c h w"))


def to_ours(x: torch.Tensor) -> np.ndarray:
    return rearrange(x.detach().numpy(), "b c h w -> b h w c")


@pytest.fixture(scope="module", params=CASES)
def opened(request, randomise, tmp_path_factory):
    """Returns (reference, module, parameters, folder, height and width) of each case."""
    options, size = CASES[request.param]
    folder = tmp_path_factory.mktemp("vae") / "theirs"
    reference = randomise(diffusers.AutoencoderKL(**options))
    reference.save_pretrained(folder)
    return reference, *from_pretrained(folder), folder, size


def test_encode_and_decode(opened, assert_close):
    reference, module, params, _, size = opened
    c = module.config
    images = normal(2, *size, c.in_channels)
    mean, log_variance = jax.jit(lambda p, x: module.apply(p, x, method="encode"))({"params": params}, images)
    latents = normal(2, *mean.shape[1:])
    decoded = jax.jit(lambda p, x: module.apply(p, x, method="decode"))({"params": params}, latents)
    with torch.no_grad():
        moments = reference.encode(to_torch(images)).latent_dist
        images = reference.decode(to_torch(latents)).sample
    assert mean.shape == (2, size[0] // c.factor, size[1] // c.factor, c.latent_channels)
    assert_close(mean, to_ours(moments.mean), 1e-5, "mean")
    assert_close(log_variance, to_ours(moments.logvar), 1e-5, "log-variance")
    assert_close(decoded, to_ours(images), 1e-5, "images")


def test_log_variances_are_limited(opened):
    reference, module, params, _, size = opened
    images = normal(1, *size, module.config.in_channels, scale=1.0)
    layer = "quant_conv" if module.config.quant_conv else None
    path = [layer] if layer else ["encoder", "out", "conv"]
    inner = params
    for name in path:
        inner = inner[name]
    steep = jax.tree.map(lambda leaf: leaf, params)
    place = steep
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = {name: 100 * leaf for name, leaf in inner.items()}
    log_variance = jax.jit(lambda p, x: module.apply(p, x, method="encode"))({"params": steep}, images)[1]
    assert log_variance.min() == -30 and log_variance.max() == 20


def test_a_saved_folder_opens_in_diffusers(opened, tmp_path):
    reference, module, params, folder, _ = opened
    save_pretrained(module, params, tmp_path / "ours")
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {"config.json", f"{STEM}.safetensors"}
    written, given = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "ours", folder))
    assert written == given
    again, report = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert again.config == reference.config or dict(again.config) | {"_name_or_path": ""} == dict(reference.config) | {
        "_name_or_path": ""
    }
    kept = reference.state_dict()
    assert again.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.state_dict().items())


def test_tiles(opened, assert_close):
    reference, module, params, _, _ = opened
    c, side = module.config, module.config.sample_size[0] // module.config.factor
    decode = jax.jit(lambda p, z: module.apply(p, z, method="decode_tiled"))
    reference.enable_tiling()
    try:
        # Not tiled; a tile and a part; parts of two sizes each way, of which one is smaller than the overlap.
        for height, width in ((side, side - 1), (side + 1, side), (2 * side + 1, 2 * side - 1)):
            latents = normal(1, height, width, c.latent_channels)
            with torch.no_grad():
                theirs = to_ours(reference.decode(to_torch(latents)).sample)
            assert_close(decode({"params": params}, latents), theirs, 1e-5, f"{height} x {width}")
            whole = module.apply({"params": params}, latents, method="decode")
            same = theirs.shape == whole.shape and np.allclose(theirs, whole, atol=1e-3)
            assert same == (max(height, width) <= side), "tiles make a difference"
    finally:
        reference.disable_tiling()
