"""The autoencoder of latent diffusion against diffusers' AutoencoderKL: encode, decode, tiles, gradients, folders."""

from __future__ import annotations

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
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
        dict(**blocks(8, 12, 16), layers_per_block=2, norm_num_groups=4, sample_size=32),
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


@pytest.mark.parametrize("opened", ["Stable Diffusion 3", "AudioLDM-2"], indirect=True)
def test_log_variances_are_limited(opened):
    _, module, params, _, size = opened
    last = ("quant_conv",) if module.config.quant_conv else ("encoder", "out", "conv")
    steep = flatten_dict(params)
    steep |= {path: 100 * leaf for path, leaf in steep.items() if path[: len(last)] == last}
    encode = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))
    log_variance = encode(unflatten_dict(steep), normal(1, *size, module.config.in_channels))[1]
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
    kept = reference.state_dict()
    assert again.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("opened", ["Stable Diffusion 3", "means and deviations of latents"], indirect=True)
def test_tiles(opened, assert_close):
    reference, module, params, _, _ = opened
    c, side = module.config, module.config.sample_size[0] // module.config.factor
    decode = jax.jit(lambda p, z: module.apply(p, z, method="decode_tiled"))
    reference.enable_tiling()
    try:
        # One tile, which is decoded whole; then tiles of up to three sizes each way, the smallest below the overlap.
        for height, width in ((side, side - 1), (2 * side, side + 3)):
            latents = normal(1, height, width, c.latent_channels)
            with torch.no_grad():
                theirs = to_ours(reference.decode(to_torch(latents)).sample)
            ours = decode({"params": params}, latents)
            assert_close(ours, theirs, 1e-5, f"{height} x {width}")
        reference.disable_tiling()
        with torch.no_grad():
            whole = to_ours(reference.decode(to_torch(latents)).sample)
        assert whole.shape != ours.shape or np.abs(whole - ours).max() > 1e-2, "tiles make a difference"
    finally:
        reference.disable_tiling()


@pytest.mark.parametrize(
    "opened,remat", [("means and deviations of latents", "full"), ("AudioLDM-2", None)], indirect=["opened"]
)
def test_gradients_of_reconstruction_and_divergence(opened, remat, assert_close):
    reference, module, params, _, size = opened
    c = module.config
    images, noise = normal(2, *size, c.in_channels), normal(2, *(side // c.factor for side in size), c.latent_channels)
    target = normal(2, *(side // c.factor * c.factor for side in size), c.out_channels)
    model = dataclasses.replace(c, compute=Compute(remat=remat)).make()

    def loss(p):
        mean, log_variance = model.apply({"params": p}, images, method="encode")
        decoded = model.apply({"params": p}, mean + jnp.exp(0.5 * log_variance) * noise, method="decode")
        divergence = mean**2 + jnp.exp(log_variance) - 1 - log_variance
        return jnp.mean((decoded - target) ** 2) + 0.01 * jnp.mean(divergence)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    reference.zero_grad()
    moments = reference.encode(to_torch(images)).latent_dist
    decoded = reference.decode(moments.mean + moments.std * to_torch(noise)).sample
    divergence = moments.mean**2 + moments.var - 1 - moments.logvar
    theirs = ((decoded - to_torch(target)) ** 2).mean() + 0.01 * divergence.mean()
    theirs.backward()
    assert abs(float(value) - theirs.item()) <= 1e-5 * theirs.item()
    ours = hub_tensors(FAMILY.table(c), gradients)
    found = dict(reference.named_parameters())
    assert ours.keys() == found.keys()
    largest = max(float(p.grad.abs().max()) for p in found.values())
    for name, tensor in ours.items():
        # A key's bias cancels in the softmax: both gradients are rounding errors.
        if name.endswith("to_k.bias"):
            assert np.abs(tensor()).max() < 1e-6 * largest
        else:
            assert_close(tensor(), found[name].grad, 1e-3, name)


# ---- sizes


def test_the_full_size_of_stable_diffusion_15():
    config = from_hf_config(
        dict(
            _class_name="AutoencoderKL",
            _diffusers_version="0.6.0",
            **blocks(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        )
    )
    assert config == AutoencoderKLConfig()
    abstract = flatten_dict(nn.meta.unbox(abstract_params(config, FAMILY)))
    assert sum(leaf.size for leaf in abstract.values()) == 83_653_863
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**{k: v for k, v in to_hf_config(config).items() if k[0] != "_"})
    assert sum(p.numel() for p in theirs.parameters()) == 83_653_863


def test_the_memory_of_tiles_grows_only_with_the_decoded_image():
    config = AutoencoderKLConfig(block_channels=(16, 16), layers_per_block=1, norm_groups=4, sample_size=(64,))
    module = dataclasses.replace(config, middle_attention=False).make()
    params = nn.meta.unbox(abstract_params(module.config, FAMILY))

    def temporary(side: int, method: str) -> int:
        latents = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
        compiled = jax.jit(lambda p, z: module.apply({"params": p}, z, method=method)).lower(params, latents).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def grown(method: str) -> float:
        """Returns by how many bytes a byte of a larger image enlarges what is held at once."""
        return (temporary(160, method) - temporary(96, method)) / (4 * 3 * (320**2 - 192**2))

    assert grown("decode") > 10
    assert grown("decode_tiled") < 4


# ---- scales and dtypes


@pytest.mark.parametrize(
    "values,scaled",
    [
        (dict(scaling_factor=0.5), [1.0, 2.0]),
        (dict(scaling_factor=0.5, shift_factor=1.0), [0.5, 1.5]),
        (dict(scaling_factor=0.5, latents_mean=(1.0, 2.0), latents_std=(0.5, 4.0)), [1.0, 0.25]),
    ],
)
def test_scaled_latents_as_the_pipelines_of_diffusers_scale_them(values, scaled):
    config = AutoencoderKLConfig(latent_channels=2, **values)
    latents = jnp.array([[[[2.0, 4.0]]]])
    np.testing.assert_allclose(config.scaled(latents), [[[scaled]]])
    np.testing.assert_allclose(config.unscaled(config.scaled(latents)), latents)


@pytest.mark.parametrize("force_upcast", [True, False])
def test_float16_is_computed_in_float32_where_the_config_wants_that(force_upcast):
    config = from_hf_config(dict(**blocks(4), norm_num_groups=2, force_upcast=force_upcast)).with_dtype("float16")
    latents = jax.ShapeDtypeStruct((1, 2, 2, 4), jnp.float16)
    found = jax.eval_shape(lambda z: config.make().init_with_output(jax.random.key(0), z, method="decode")[0], latents)
    assert found.dtype == (jnp.float32 if force_upcast else jnp.float16)


# ---- other folders and other arrays


def tiny_folder(path, **more):
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**blocks(4, 8), norm_num_groups=2, sample_size=16).save_pretrained(path, **more)
    return path


def test_names_of_the_attention_in_old_checkpoints(tmp_path):
    folder = tiny_folder(tmp_path / "new")
    _, params = from_pretrained(folder)
    tensors = load_file(folder / f"{STEM}.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in list(tensors):
        for new, then in old.items():
            if f"attentions.0.{new}." in name:
                tensors[name.replace(new, then)] = tensors.pop(name)
    assert sum(any(f".{then}." in name for then in old.values()) for name in tensors) == 16
    save_file(tensors, folder / f"{STEM}.safetensors")
    config = json.loads((folder / "config.json").read_text())
    # As the first files of Stable Diffusion: no later option, and records of diffusers.
    for name in ("scaling_factor", "force_upcast", "shift_factor", "latents_mean", "latents_std"):
        del config[name]
    config |= {"_name_or_path": "somewhere", "_diffusers_version": "0.2.2", "_use_default_values": ["latents_std"]}
    (folder / "config.json").write_text(json.dumps(config))
    module, again = from_pretrained(folder)
    assert module.config.scaling_factor == 0.18215
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


def test_a_folder_of_several_files_and_one_written_so(tmp_path):
    folder = tiny_folder(tmp_path / "theirs", max_shard_size="20KB")
    assert (folder / f"{STEM}.safetensors.index.json").exists()
    module, params = from_pretrained(folder)
    save_pretrained(module, params, tmp_path / "ours", max_shard_bytes=20_000, dtype="bfloat16")
    assert (tmp_path / "ours" / f"{STEM}.safetensors.index.json").exists()
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", torch_dtype="auto").state_dict()
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).state_dict()
    assert again.keys() == theirs.keys()
    assert all(torch.equal(tensor.float(), theirs[name].bfloat16().float()) for name, tensor in again.items())


@pytest.mark.parametrize(
    "option,message",
    [
        (dict(act_fn="mish"), "act_fn='mish'"),
        (dict(down_block_types=["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]), "down_block_types.*Attn"),
        (dict(up_block_types=["UpDecoderBlock2D"]), "up_block_types"),
        (dict(block_out_channels=[4, 7]), "norm_groups 2"),
        (dict(layers_per_block=10**9), "layers_per_block=1000000000"),
        (dict(latents_mean=[0.0, 1.0]), "latents_mean of 2 numbers"),
        (dict(use_quant_conv=1), "use_quant_conv=1"),
        (dict(scaling_factor="large"), "scaling_factor='large'"),
        (dict(temporal_compression=4), "temporal_compression=4"),
        (dict(_class_name="AutoencoderTiny"), "(?s)AutoencoderTiny.*AutoencoderKL"),
        (dict(_class_name=None), "architectures=None"),
    ],
)
def test_options_that_are_refused_by_name(option, message, tmp_path):
    folder = tiny_folder(tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | option))
    with pytest.raises(ConfigError, match=message):
        pretrained_config(folder)


def cut(folder):
    path = folder / f"{STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without(folder):
    tensors = load_file(folder / f"{STEM}.safetensors")
    save_file({k: v for k, v in tensors.items() if "quant_conv" not in k}, folder / f"{STEM}.safetensors")


@pytest.mark.parametrize(
    "spoil,message",
    [
        (cut, STEM),
        (without, r"4 of its tensors do not match.*\n.*post_quant_conv.bias: missing"),
        (lambda folder: (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.bin"), rf"{STEM}\.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    ],
)
def test_a_corrupt_or_incomplete_folder_is_refused(spoil, message, tmp_path):
    folder = tiny_folder(tmp_path / "vae")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "method,shape,options,message",
    [
        ("encode", (1, 8, 8, 4), {}, "images of shape"),
        ("encode", (1, 1, 8, 3), {}, "at least 2"),
        ("encode", (8, 8, 3), {}, "images of shape"),
        ("decode", (1, 8, 8, 3), {}, "latents of shape"),
        ("decode_tiled", (1, 8, 8, 4), dict(tile=2), "tiles of 2 pixels"),
    ],
)
def test_arrays_of_another_shape_are_refused(method, shape, options, message):
    module = from_hf_config(dict(**blocks(4, 8), norm_num_groups=2)).make()
    with pytest.raises(DataError, match=message):
        jax.eval_shape(
            lambda x: module.init(jax.random.key(0), x, method=method, **options),
            jax.ShapeDtypeStruct(shape, "float32"),
        )
