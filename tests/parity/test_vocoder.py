"""HiFi-GAN against transformers' SpeechT5HifiGan, with and without the weight norm that its training has."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from mllm_jax import from_pretrained, save_pretrained
from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.errors import CheckpointError, ConfigError, DataError
from mllm_jax.generators.vocoder import FAMILIES, from_hf_config
from mllm_jax.models.registry import abstract_params

FAMILY = FAMILIES[0]
SIZES = dict(
    model_in_dim=6,
    upsample_initial_channel=16,
    upsample_rates=[3, 2],
    upsample_kernel_sizes=[5, 4],
    resblock_kernel_sizes=[3, 5],
    resblock_dilation_sizes=[[1, 3], [2, 1]],
)
CASES = {
    "SpeechT5's": dict(SIZES),
    # As in AudioLDM-2, a rate of 5 and a kernel of 16, which give one sample more.
    "AudioLDM-2's": dict(
        SIZES, upsample_rates=[5, 2], upsample_kernel_sizes=[16, 2], normalize_before=False, leaky_relu_slope=0.2
    ),
    "one step, one block": dict(
        model_in_dim=4,
        upsample_initial_channel=5,
        upsample_rates=[4],
        upsample_kernel_sizes=[7],
        resblock_kernel_sizes=[1],
        resblock_dilation_sizes=[[1, 2, 3]],
        sampling_rate=8000,
    ),
}


def make(options: dict, randomise):
    reference = randomise(transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**options)))
    generator = torch.Generator().manual_seed(1)
    reference.mean.copy_(torch.randn(reference.mean.shape, generator=generator))
    reference.scale.copy_(1.5 + torch.rand(reference.scale.shape, generator=generator))
    with torch.no_grad():
        reference.conv_post.weight.mul_(0.3)  # so that tanh does not saturate
    return reference


def frames(reference, rows: int = 2, n: int = 7) -> np.ndarray:
    return np.random.default_rng(n).normal(0, 1, (rows, n, reference.config.model_in_dim)).astype(np.float32)


def run(module, params, mel):
    return jax.jit(lambda p, x: module.apply({"params": p}, x))(params, mel)


def sound(reference, mel) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor(mel)).numpy()


@pytest.mark.parametrize("case", CASES)
def test_samples_and_folders(case, randomise, assert_close, tmp_path):
    reference = make(CASES[case], randomise)
    reference.save_pretrained(tmp_path / "theirs")
    module, params = from_pretrained(tmp_path / "theirs")
    mel = frames(reference)
    ours, theirs = run(module, params, mel), sound(reference, mel)
    assert 0.1 < np.abs(theirs).max() < 0.999
    assert_close(ours, theirs, 1e-5, case)

    save_pretrained(module, params, tmp_path / "ours")
    again, report = transformers.SpeechT5HifiGan.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    kept = reference.state_dict()
    assert again.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.state_dict().items())
    np.testing.assert_array_equal(sound(again, mel), theirs)
    assert FAMILY.from_hf(again.config.to_dict()) == module.config


@pytest.mark.parametrize("new", [True, False])
def test_the_weight_norm_of_training_in_both_spellings(new, randomise, assert_close, tmp_path):
    reference = make(CASES["AudioLDM-2's"], randomise)
    reference.save_pretrained(tmp_path / "theirs")
    reference.apply_weight_norm()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("original0"):
                parameter.mul_(torch.linspace(0.5, 2, parameter.numel()).reshape(parameter.shape))
    normed = {name: tensor.detach().numpy().copy() for name, tensor in reference.state_dict().items()}
    spelled = {
        name if new else name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in normed.items()
    }  # fmt: skip
    assert any("weight_g" in name for name in spelled) != new
    save_file(spelled, tmp_path / "theirs" / "model.safetensors")
    module, params = from_pretrained(tmp_path / "theirs")
    mel = frames(reference)
    assert_close(run(module, params, mel), sound(reference, mel), 1e-5, "with a weight norm")

    save_pretrained(module, params, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == normed.keys()
    assert all(np.array_equal(written[name], tensor) for name, tensor in normed.items())


@pytest.mark.parametrize("weight_norm", [False, True])
def test_gradients(weight_norm, randomise, assert_close, tmp_path):
    reference = make(CASES["SpeechT5's"], randomise)
    if weight_norm:
        reference.apply_weight_norm()
    config = transformers.SpeechT5HifiGanConfig(**SIZES)
    config.architectures = ["SpeechT5HifiGan"]
    config.save_pretrained(tmp_path)
    save_file(
        {name: t.detach().numpy().copy() for name, t in reference.state_dict().items()}, tmp_path / "model.safetensors"
    )
    module, params = from_pretrained(tmp_path)
    mel = frames(reference)
    reference(torch.tensor(mel)).square().mean().backward()
    gradients = jax.jit(jax.grad(lambda p: (module.apply({"params": p}, mel) ** 2).mean()))(params)
    ours = {name: tensor() for name, tensor in hub_tensors(FAMILY.table(module.config), gradients).items()}
    assert not ours.pop("mean").any() and not ours.pop("scale").any()  # they are not trained
    found = dict(reference.named_parameters())
    assert ours.keys() == found.keys()
    for name, tensor in ours.items():
        assert_close(tensor, found[name].grad, 1e-3, name)


def test_the_full_size_of_audioldm2():
    options = dict(
        model_in_dim=64,
        upsample_initial_channel=1024,
        upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4],
        resblock_kernel_sizes=[3, 7, 11],
        resblock_dilation_sizes=[[1, 3, 5]] * 3,
        normalize_before=False,
    )
    config = from_hf_config(dict(architectures=["SpeechT5HifiGan"], model_type="speecht5_hifigan", **options))
    abstract = nn.meta.unbox(abstract_params(config, FAMILY))
    statistics = abstract.pop("mean").size + abstract.pop("scale").size
    with torch.device("meta"):
        reference = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**options))
    assert statistics == 128 and sum(b.numel() for b in reference.buffers()) == 128
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize(
    "option,message",
    [
        (dict(upsample_rates=[3]), "rates"),
        (dict(upsample_kernel_sizes=[2, 4]), "kernels"),
        (dict(upsample_initial_channel=3), "hidden_size 3"),
        (dict(upsample_rates=[2000, 2000], upsample_kernel_sizes=[2000, 2000]), "1,048,576 samples"),
        (dict(resblock_kernel_sizes=[3, 4]), "odd kernel sizes"),
        (dict(resblock_dilation_sizes=[[1]]), "block_dilations"),
        (dict(resblock_dilation_sizes=[1, 2]), "resblock_dilation_sizes"),
        (dict(leaky_relu_slope="small"), "leaky_relu_slope='small'"),
        (dict(use_snake=True), "use_snake=True"),
    ],
)
def test_options_that_are_refused_by_name(option, message):
    with pytest.raises(ConfigError, match=message):
        from_hf_config(SIZES | option)


def test_an_incomplete_folder_and_frames_of_another_width_are_refused(randomise, tmp_path):
    reference = make(SIZES, randomise)
    reference.save_pretrained(tmp_path)
    module, params = from_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"frames of shape \[1, 4, 7\]"):
        module.apply({"params": params}, np.zeros((1, 4, 7), np.float32))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["scale"], tensors["conv_post.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="(?s)conv_post.bias: missing.*scale: missing"):
        from_pretrained(tmp_path)
