"""NFNet against timm's NormFreeNet through real folders both ways, and against numbers from its authors' Haiku code.

tests/goldens/nfnet_haiku.json describes the recording of the latter.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from timm_reference import timm_or_skip

from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.checkpoints.layout import lay_out
from mllm_jax.checkpoints.leaves import flatten
from mllm_jax.encoders.nfnet import NFNetConfig, NFNetDialect, nfnet
from mllm_jax.encoders.nfnet_timm import FAMILIES, from_hf_config, table, to_hf_config
from mllm_jax.models.registry import abstract_params, from_pretrained, save_pretrained

timm = timm_or_skip()
from timm.models import save_for_hf  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "goldens" / "nfnet_haiku"
TINY = dict(depths=(1, 2, 3, 1), channels=(16, 24, 40, 32), stem_chs=32, group_size=8, num_features=48, num_classes=7)
CASES = {
    "authors": ("dm_nfnet_f0", TINY, (64, 96)),
    "authors, odd sizes": ("dm_nfnet_f6", TINY | dict(std_conv_eps=0.1, alpha=0.5, num_classes=0), (75, 101)),
    "timm": ("nfnet_f0", TINY | dict(in_chans=1), (64, 64)),
    "timm, odd sizes": ("nfnet_f3", TINY | dict(act_layer="silu", attn_gain=1.5, bottle_ratio=0.75), (101, 75)),
    "no shortcut in front": ("nfnet_f1", TINY | dict(stem_chs=16, attn_kwargs=dict(rd_ratio=0.25)), (70, 33)),
    "rounding": (
        "dm_nfnet_f0",
        TINY | dict(channels=(38, 40, 78, 40), ch_div=4, group_size=5, attn_kwargs=dict(rd_ratio=0.5, rd_divisor=3)),
        (64, 64),
    ),
}


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Moves every parameter away from its initial value; standardising must remove the kernels' mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gain"):
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 4 and "attn" not in name:
                parameter.copy_(0.2 + 0.4 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
    return module.eval()


def theirs_of(model: torch.nn.Module, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the maps that hooks record, the features and the logits, channels last."""
    seen, hooks = [], []
    for module in (model.stem, *model.stages):
        hooks.append(module.register_forward_hook(lambda _, __, out: seen.append(out)))
    with torch.no_grad():
        features = model.forward_features(torch.tensor(rearrange(pixels, "b h w c -> b c h w")))
        pooled, logits = model.forward_head(features, pre_logits=True), model.forward_head(features)
    for hook in hooks:
        hook.remove()
    maps = [rearrange(x.numpy(), "b c h w -> b (h w) c") for x in (*seen, features)]
    return dict(maps=maps[:-1], last=maps[-1], pooled=pooled.numpy(), logits=logits.numpy())


def logits_of(module, pixels):
    """Applies the head of a checkpoint; the library itself reads only the features."""
    return module.head(module(pixels).pooler_output)


def both(module):
    """Returns every map, and the logits (None without a head), compiled as one function."""
    classes = bool(module.config.num_classes)
    return jax.jit(
        lambda variables, pixels: (
            module.apply(variables, pixels, output_hidden_states=True),
            module.apply(variables, pixels, method=logits_of) if classes else None,
        )
    )


@pytest.mark.parametrize("case", CASES)
def test_features_logits_and_folders_both_ways(case, assert_close, tmp_path):
    name, options, (height, width) = CASES[case]
    reference = randomise(timm.create_model(name, **options))
    save_for_hf(reference, tmp_path / "theirs", safe_serialization=True)
    module, params = from_pretrained(tmp_path / "theirs")
    pixels = np.random.default_rng(1).normal(size=(2, height, width, options.get("in_chans", 3))).astype(np.float32)
    theirs = theirs_of(reference, pixels)
    ours, logits = both(module)({"params": params}, pixels)
    assert len(ours.hidden_states) == len(theirs["maps"]) == 5
    for i, (mine, their) in enumerate(zip(ours.hidden_states, theirs["maps"], strict=True)):
        assert_close(mine, their, 1e-4, f"map {i}")
    assert_close(ours.last_hidden_state, theirs["last"], 1e-4, "features")
    assert_close(ours.pooler_output, theirs["pooled"], 1e-4, "pooled")
    if module.config.num_classes:
        assert_close(logits, theirs["logits"], 1e-4, "logits")
    assert jax.eval_shape(module.apply, {"params": params}, pixels).hidden_states is None

    save_pretrained(module, params, tmp_path / "ours")
    opened = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    wanted, found = reference.state_dict(), opened.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert_close(theirs_of(opened, pixels)["last"], theirs["last"], 1e-6, "the folder written here")
    before, after = (json.loads((tmp_path / by / "config.json").read_text("utf-8")) for by in ("theirs", "ours"))
    for key in ("mean", "std", "input_size", "test_input_size", "interpolation", "crop_pct", "crop_mode"):
        assert after["pretrained_cfg"].get(key) == before["pretrained_cfg"].get(key), key
    assert from_hf_config(after) == from_hf_config(before) == module.config


def test_gradients(assert_close, tmp_path):
    """Checks gradients also through the standardisation."""
    reference = randomise(timm.create_model("dm_nfnet_f0", **TINY))
    save_for_hf(reference, tmp_path, safe_serialization=True)
    module, params = from_pretrained(tmp_path)
    rng = np.random.default_rng(2)
    pixels = rng.normal(size=(2, 48, 40, 3)).astype(np.float32)
    weights = rng.normal(size=(2, 7)).astype(np.float32)
    out = reference(torch.tensor(rearrange(pixels, "b h w c -> b c h w")))
    (out * torch.tensor(weights)).sum().backward()
    loss = lambda p: (module.apply({"params": p}, pixels, method=logits_of) * weights).sum()  # noqa: E731
    mine = hub_tensors(table(module.config), jax.jit(jax.grad(loss))(params))
    for name, parameter in reference.named_parameters():
        assert_close(mine[name](), parameter.grad.numpy(), 1e-3, name)


@pytest.mark.parametrize("variant", ("F0", "F6"))
def test_full_size_parameters(variant):
    """Checks names and shapes against timm's; the published numbers, in millions, are 71.5 and 438.4."""
    config = nfnet(variant)
    with torch.device("meta"):
        reference = timm.create_model(config.family)
    wanted = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    abstract = abstract_params(config, FAMILIES[0])
    leaves = {path: leaf.shape for path, leaf in flatten(nn.meta.unbox(abstract))[0].items()}
    found = {name: layout.shape for layout in lay_out(table(config), leaves) for name in layout.names()}
    assert found == wanted
    count = sum(math.prod(shape) for shape in wanted.values())
    assert count == sum(math.prod(shape) for shape in leaves.values())
    assert count == {"F0": 71_489_284, "F6": 438_359_116}[variant]


@pytest.mark.parametrize("architecture", FAMILIES[0].architectures)
def test_presets_are_timms(architecture):
    """Checks all settings that a name implies, image preprocessing included."""
    default = timm.get_pretrained_cfg(architecture)
    read = from_hf_config(dict(architecture=architecture, num_classes=1000, pretrained_cfg=default.to_dict()))
    with torch.device("meta"):
        reference = timm.create_model(architecture)
    assert [len(stage) for stage in reference.stages] == list(read.depths)
    assert [stage[-1].conv3.out_channels for stage in reference.stages] == list(read.widths)
    betas = [[block.beta for block in stage] for stage in reference.stages]
    for stage, theirs in enumerate(betas):
        np.testing.assert_allclose(read.betas(stage), theirs, rtol=1e-12)
    assert "model_args" not in to_hf_config(read)
    if architecture.startswith("dm_"):
        assert read == nfnet(architecture[-2:].upper())


# ---- the authors' code


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        return dict(arrays)


def haiku_name(path: str, block_of: dict[str, str]) -> str:
    """Returns the Haiku code's name of the parameter at a path of ours."""
    parts = path.split("/")
    leaf = {"kernel": "w", "gain": "gain", "bias": "bias"}.get(parts[-1])
    if parts[0].startswith("stem_"):
        return f"weights/NFNet/~/stem_conv{parts[0][-1]}//{leaf}"
    if parts[0] == "final_conv":
        return f"weights/NFNet/~/final_conv//{leaf}"
    if parts[0] == "head":
        return f"weights/NFNet/~/linear//{leaf[0]}"
    block = f"weights/NFNet/~/{block_of[parts[0]]}"
    if parts[1] == "skip_gain":
        return f"{block}//skip_gain"
    if parts[1] == "squeeze_excite":
        return f"{block}/~/squeeze_excite/~/{ {'down': 'linear', 'up': 'linear_1'}[parts[2]] }//{leaf[0]}"
    conv = {"shortcut": "conv_shortcut", "conv_1": "conv0", "conv_2": "conv1", "conv_3": "conv1b", "conv_4": "conv2"}
    return f"{block}/~/{conv[parts[1]]}//{leaf}"


def test_authors_code(golden, assert_close):
    recorded = json.loads(GOLDEN.with_suffix(".json").read_text("utf-8"))["config"]
    config = NFNetConfig(
        depths=tuple(recorded["depth"]),
        widths=tuple(recorded["width"]),
        group_sizes=tuple(recorded["group_width"]),
        stem_sizes=(16, 32, 64, recorded["width"][0] // 2),
        final_size=recorded["final_conv_mult"] * recorded["width"][-1],
        num_classes=recorded["num_classes"],
        activation="gelu_tanh",
        dialect=NFNetDialect(
            channel_divisor=1,
            se_ratio=recorded["se_ratio"],
            se_divisor=1,
            alpha=recorded["alpha"],
            std_eps=1e-4,
            std_floor=True,
        ),
    )
    blocks = [f"stages_{stage}_{i}" for stage, depth in enumerate(config.depths) for i in range(depth)]
    block_of = {ours: f"nf_block_{i}" if i else "nf_block" for i, ours in enumerate(blocks)}
    taken, params = set(), {}
    for line in table(config).weights:
        name = haiku_name(line.path, block_of)
        taken.add(name)
        params[line.path] = np.atleast_1d(golden[name])
    assert taken == {name for name in golden if name.startswith("weights/")}
    params = unflatten_dict(params, sep="/")
    module = config.make()
    variables, pixels = {"params": params}, golden["inputs/images_nhwc"]
    ours, logits = both(module)(variables, pixels)
    last_of_stage = np.cumsum(config.depths) - 1
    names = ["stem_conv3"] + [block_of[blocks[i]] for i in last_of_stage]
    for name, mine in zip(names, ours.hidden_states, strict=True):
        assert_close(mine, rearrange(golden[f"outputs/NFNet/{name}"], "b h w c -> b (h w) c"), 1e-4, name)
    assert_close(ours.pooler_output, golden["outputs/pool"], 1e-4, "pool")
    assert_close(logits, golden["outputs/logits"], 1e-4, "logits")
