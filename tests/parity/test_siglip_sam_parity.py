"""DeepSeek-VL's hybrid encoder and its projector against stored outputs of the authors' own code."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import save_file
from vision_checks import GOLDENS

from mllm_jax.checkpoints.hf import read_weights
from mllm_jax.checkpoints.table import Table, Weight, nested
from mllm_jax.encoders.sam import SamConfig, convolution_weight, neck_weights, sam_weights
from mllm_jax.encoders.siglip_sam import SiglipSamConfig
from mllm_jax.encoders.vision_hub import ViTNames, vit_table
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.errors import ConfigError
from mllm_jax.models.registry import abstract_init
from mllm_jax.projectors.paired import PairedProjectorConfig

HALF, CLIP_MEAN, CLIP_STD = (0.5,) * 3, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TIMM = ViTNames(
    patch="patch_embed.proj",
    layers="blocks",
    position="pos_embed",
    attention_norm="norm1",
    q="attn.qkv",
    k="attn.qkv",
    v="attn.qkv",
    out="attn.proj",
    mlp_norm="norm2",
    final_norm="norm",
)
HIGH, LOW = "tower.vision_tower_high.vision_tower", "tower.vision_tower_low.vision_tower"
# The authors' names of modules that transformers names differently.
SPELLINGS = (
    (r"(high.*)patch_embed\.proj\.", r"\1patch_embed.projection."),
    (r"(high.*)blocks\.(\d+)\.norm([12])\.", r"\1layers.\2.layer_norm\3."),
    (r"(high.*)blocks\.", r"\1layers."),
    (r"(neck\w*)\.0\.", r"\1.conv1."),
    (r"(neck\w*)\.1\.", r"\1.layer_norm1."),
    (r"(neck\w*)\.2\.", r"\1.conv2."),
    (r"(neck\w*)\.3\.", r"\1.layer_norm2."),
)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDENS / "deepseek_vl_hybrid.npz")


@pytest.fixture(scope="module")
def config() -> SiglipSamConfig:
    sizes = json.loads((GOLDENS / "deepseek_vl_hybrid.json").read_text("utf-8"))["config"]
    sam, siglip = sizes["sam"], sizes["siglip"]
    high = SamConfig(
        image_size=sizes["high"],
        patch_size=sam["patch"],
        hidden_size=sam["width"],
        num_layers=sam["depth"],
        num_heads=sam["heads"],
        mlp_size=4 * sam["width"],
        output_channels=sam["out_chans"],
        window=sam["window"],
        global_layers=tuple(sam["global"]),
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    low = ViTConfig(
        image_size=sizes["low"],
        patch_size=siglip["patch"],
        hidden_size=siglip["width"],
        num_layers=siglip["depth"],
        num_heads=siglip["heads"],
        mlp_size=int(siglip["mlp_ratio"] * siglip["width"]),
        image_mean=HALF,
        image_std=HALF,
        dialect=ViTDialect(pooler="none"),
    )
    return SiglipSamConfig(low, high, downsample=tuple(sam["downs"]))


def tower_table(c: SiglipSamConfig, unread: list[str]) -> Table:
    weights = [
        *nested(vit_table(c.low, TIMM), f"{LOW}.", "low/"),
        *nested(Table(tuple(sam_weights(c.high))), f"{HIGH}.", "high/"),
        *neck_weights(f"{HIGH}.neck_hd", "neck"),
        *(convolution_weight(f"{HIGH}.downsamples.{i}", f"downsample_{i}") for i in range(len(c.downsample))),
        Weight(f"{HIGH}.hd_alpha_downsamples", "alpha"),
    ]
    return Table(tuple(weights), SPELLINGS, tuple(unread))


def aligner_table() -> Table:
    names = dict(first="high_up_proj", second="low_up_proj", out="layers.1")
    weights = [Weight(f"aligner.{n}.weight", f"{p}/kernel", "o i -> i o") for p, n in names.items()]
    return Table((*weights, *(Weight(f"aligner.{n}.bias", f"{p}/bias") for p, n in names.items())))


def load(golden, part: str, table: Table, module, sample, folder):
    """Reads the parameters of a module from the golden's tensors of one part."""
    prefix = f"weights/{part}."
    tensors = {f.removeprefix("weights/"): golden[f] for f in golden.files if f.startswith(prefix)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return read_weights(folder, table, abstract_init(module, sample))


def test_the_original_code(golden, config, tmp_path, assert_close):
    unread = json.loads((GOLDENS / "deepseek_vl_hybrid.json").read_text("utf-8"))["weights_with_no_effect_on_outputs"]
    module = config.make()
    pixels = rearrange(golden["inputs/images"], "b c h w -> b h w c")
    params = load(golden, "tower", tower_table(config, unread), module, pixels, tmp_path / "tower")
    run = jax.jit(module.apply)
    features = np.asarray(run({"params": params}, pixels).last_hidden_state)
    high, low = np.split(features, [config.widths[0]], axis=-1)
    assert_close(high, golden["outputs/high"], 1e-4, "SAM's half")
    assert_close(low, golden["outputs/low"], 1e-4, "SigLIP's half, on an image that is reduced here")

    aligner = PairedProjectorConfig(golden["outputs/projector_out"].shape[-1], config.widths).make()
    weights = load(golden, "aligner", aligner_table(), aligner, features, tmp_path / "aligner")
    assert_close(aligner.apply({"params": weights}, features), golden["outputs/projector_out"], 1e-4, "projected")

    # Given beside the large image, the small one gives the same.
    small = rearrange(golden["outputs/low_input_resized_normalised"] * 0.5 + 0.5, "b c h w -> b h w c")
    below = np.pad(small, [(0, 0), (0, 0), (0, pixels.shape[2] - small.shape[2]), (0, 0)], constant_values=7.0)
    given = run({"params": params}, np.concatenate([pixels, below], axis=1)).last_hidden_state
    assert_close(given, features, 1e-4, "both images given")


def test_sams_trunk(golden, config, tmp_path, assert_close):
    unread = json.loads((GOLDENS / "deepseek_vl_hybrid.json").read_text("utf-8"))["weights_with_no_effect_on_outputs"]
    module = config.make()
    pixels = rearrange(golden["inputs/images"], "b c h w -> b h w c")
    params = load(golden, "tower", tower_table(config, unread), module, pixels, tmp_path / "tower")
    normalised = (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    out = jax.jit(config.high.make().apply, static_argnums=2)({"params": params["high"]}, normalised, True)
    for i, state in enumerate(out.hidden_states[1:]):
        assert_close(state, rearrange(golden[f"outputs/sam_block{i}"], "b h w e -> b (h w) e"), 1e-4, f"layer {i}")
    assert_close(out.last_hidden_state, rearrange(golden["outputs/sam_neck"], "b e h w -> b (h w) e"), 1e-4, "neck")


def test_what_does_not_fit_is_refused(config):
    with pytest.raises(ConfigError, match=r"(?s)\[1, 64, 63, 3\].*\[B, 88, 64, 3\]"):
        config.make().init(jax.random.key(0), np.zeros((1, 64, 63, 3), np.float32))
    for wrong in (
        dict(high=dataclasses.replace(config.high, global_layers=())),
        dict(downsample=()),
        dict(low=dataclasses.replace(config.low, image_size=64)),
    ):
        with pytest.raises(ConfigError, match="SigLIP and SAM"):
            dataclasses.replace(config, **wrong)
    for wrong in (dict(output_size=7), dict(activation="sine")):
        with pytest.raises(ConfigError, match="paired projector"):
            PairedProjectorConfig(**dict(output_size=8, widths=(3, 4)) | wrong)
