"""Schedulers against diffusers: timesteps, whole sampling runs, training noise and folders.

The model is a fixed function of its input and the timestep. It bends every error of a step into the next one.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.training_utils import compute_snr
from einops import rearrange

from mllm_jax.generators import schedulers

SHAPE = (2, 4, 6, 3)
V, SAMPLE = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
BETAS = {"trained_betas": [0.001 * (1 + i % 7) for i in range(200)], "num_train_timesteps": 200}
TRAILING, LINSPACE, LEADING = ({"timestep_spacing": each} for each in ("trailing", "linspace", "leading"))
ZERO_SNR = {"rescale_betas_zero_snr": True, **V}
LIMITS = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.8}

# A scheduler, its options and the number of steps.
CASES = [
    ("ddim", LATENT, 10),
    ("ddim", {**LATENT, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}, 10),
    ("ddim", {**V, **LINSPACE, "clip_sample_range": 0.4}, 10),
    ("ddim", {**SAMPLE, **TRAILING, "clip_sample": False}, 7),
    ("ddim", {**LATENT, **LIMITS}, 10),
    ("ddim", {**LATENT, **ZERO_SNR, **TRAILING}, 10),
    ("ddim", {**LATENT, **ZERO_SNR, **LINSPACE, "clip_sample": False}, 25),
    ("ddim", {**BETAS, "eta": 0.6}, 10),
    ("ddim", {**COSINE, **V, "eta": 1.0, "clip_sample": False}, 25),
    ("ddim", {}, 1),
    ("ddpm", LATENT, 10),
    ("ddpm", {**V, **TRAILING, "variance_type": "fixed_large", "clip_sample": False}, 10),
    ("ddpm", {**SAMPLE, **LINSPACE, "variance_type": "fixed_small_log"}, 10),
    ("ddpm", {**COSINE, **LIMITS, "steps_offset": 1}, 25),
    ("ddpm", {**LATENT, **ZERO_SNR, **TRAILING}, 10),
    ("ddpm", {"beta_schedule": "sigmoid"}, 10),
    ("ddpm", {"beta_schedule": "laplace"}, 10),
    ("ddpm", {}, 1),
    ("pndm", {**LATENT, "skip_prk_steps": True, "steps_offset": 1}, 10),
    ("pndm", {**LATENT, **V, **TRAILING, "skip_prk_steps": True, "set_alpha_to_one": True}, 25),
    ("pndm", {**COSINE, **LINSPACE, "skip_prk_steps": True}, 10),
    ("pndm", {**BETAS, "skip_prk_steps": True}, 2),
    ("pndm", {"skip_prk_steps": True}, 1),
    ("pndm", LATENT, 10),
    ("pndm", {**V, **LINSPACE, "set_alpha_to_one": True}, 25),
    ("pndm", {**TRAILING}, 4),
    ("euler", LATENT, 10),
    ("euler", {**LATENT, **V, **LEADING, "steps_offset": 1}, 10),
    ("euler", {**LATENT, **SAMPLE, **TRAILING, "final_sigmas_type": "sigma_min"}, 10),
    ("euler", {**LATENT, "use_karras_sigmas": True}, 25),
    ("euler", {**LATENT, **V, "use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0}, 10),
    ("euler", {**LATENT, **LEADING, "use_exponential_sigmas": True}, 10),
    ("euler", {**LATENT, "use_beta_sigmas": True}, 10),
    ("euler", {**LATENT, "interpolation_type": "log_linear"}, 10),
    ("euler", {**LATENT, **ZERO_SNR, **TRAILING}, 10),
    ("euler", BETAS, 1),
    ("euler_ancestral", LATENT, 10),
    ("euler_ancestral", {**LATENT, **V, **LEADING, "steps_offset": 1}, 10),
    ("euler_ancestral", {**LATENT, **ZERO_SNR, **TRAILING}, 25),
    ("dpm++", LATENT, 10),
    ("dpm++", {**LATENT, **V, **TRAILING, "solver_type": "heun"}, 25),
    ("dpm++", {**LATENT, **SAMPLE, **LEADING, "steps_offset": 1, "solver_order": 1}, 10),
    ("dpm++", {**LATENT, "use_karras_sigmas": True}, 10),
    ("dpm++", {**LATENT, "use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}, 10),
    ("dpm++", {**LATENT, "use_beta_sigmas": True}, 25),
    ("dpm++", {**LATENT, **LIMITS, "final_sigmas_type": "sigma_min", "lower_order_final": False}, 10),
    ("dpm++", {**LATENT, "final_sigmas_type": "sigma_min", "euler_at_final": True, "lower_order_final": False}, 10),
    ("dpm++", {**LATENT, "final_sigmas_type": "sigma_min"}, 10),
    ("dpm++", {**LATENT, "final_sigmas_type": "sigma_min", "solver_type": "heun"}, 15),
    ("dpm++", {**COSINE, **V, "lambda_min_clipped": -5.1}, 10),
    ("dpm++", {**COSINE, "use_karras_sigmas": True, "solver_type": "heun"}, 10),
    ("dpm++", {**LATENT, **ZERO_SNR, **TRAILING}, 10),
    ("dpm++", {}, 1),
    ("flow", {}, 10),
    ("flow", {"shift": 3.0}, 25),
    ("flow", {"shift": 3.0, "stochastic_sampling": True}, 10),
    ("flow", {"shift": 2.0, "shift_terminal": 0.1}, 10),
    ("flow", {"use_karras_sigmas": True}, 10),
    ("flow", {"use_beta_sigmas": True, "shift": 3.0}, 1),
]
# The classes for the same models, but one that needs torchsde and one that belongs to other models.
KINDS = sorted({each.name for each in KarrasDiffusionSchedulers} - {"DPMSolverSDEScheduler", "EDMEulerScheduler"})
IDS = [f"{name}-{index}" for index, (name, _, _) in enumerate(CASES)]


def both(name: str, options: dict):
    """Returns our scheduler and diffusers'; eta is no option there."""
    options = dict(options)
    eta = options.pop("eta", None)
    scheduler = schedulers.by_name(name, options)
    theirs = getattr(diffusers, scheduler.class_name)(**options)
    return (scheduler if eta is None else dataclasses.replace(scheduler, eta=eta)), theirs


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def torch_of(sample: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rearrange(sample, "b h w c -> b c h w").copy())


def numpy_of(sample: torch.Tensor) -> np.ndarray:
    return rearrange(sample.numpy(), "b c h w -> b h w c")


def sampled_there(scheduler, theirs, timesteps, sample: torch.Tensor, noise: np.ndarray, monkeypatch) -> np.ndarray:
    """Samples in diffusers, with the given noise in place of its own."""
    if hasattr(theirs, "set_begin_index") and theirs.begin_index is None:
        theirs.set_begin_index(0)  # else the second of two equal timesteps is taken for the first
    queue = [torch_of(each) for each in noise]
    module = inspect.getmodule(type(theirs))
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: queue[0])
    extra = {"eta": scheduler.eta} if getattr(scheduler, "eta", 0) else {}
    for timestep in timesteps:
        # Flow matching has no scaling of the input.
        given = theirs.scale_model_input(sample, timestep) if hasattr(theirs, "scale_model_input") else sample
        output = 1.1 * torch.tanh(1.3 * given + timestep / 1000)
        sample = theirs.step(output, timestep, sample, **extra).prev_sample
        queue.pop(0)
    return numpy_of(sample)


def sampled_here(scheduler, state, sample, noise, first: int = 0) -> jax.Array:
    """Samples as one compiled loop."""

    @jax.jit
    def run(state, sample):
        def body(carry, inputs):
            state, sample = carry
            timestep, fresh = inputs
            output = 1.1 * jnp.tanh(1.3 * scheduler.scale(state, sample) + timestep / 1000)
            return scheduler.step(state, output, sample, noise=fresh), None

        return jax.lax.scan(body, (state, sample), (state.timesteps[first:], noise[first:]))[0][1]

    return run(state, sample)


@pytest.mark.parametrize("name, options, steps", CASES, ids=IDS)
def test_sampling(name, options, steps, monkeypatch, assert_close):
    scheduler, theirs = both(name, options)
    theirs.set_timesteps(steps)
    state = scheduler.init(steps, SHAPE)
    if name == "euler" and any(key.endswith("_sigmas") for key in options):
        # Logarithms of PyTorch's square roots, which are not rounded as NumPy's.
        np.testing.assert_allclose(state.timesteps, theirs.timesteps.numpy(), rtol=1e-6)
    else:
        np.testing.assert_array_equal(state.timesteps, theirs.timesteps.numpy())
    scale = getattr(theirs, "init_noise_sigma", 1.0)
    np.testing.assert_allclose(scheduler.initial_scale_of(state), float(scale), rtol=1e-6)

    first, noise = draw(0, *SHAPE), draw(1, len(theirs.timesteps), *SHAPE)
    expected = sampled_there(scheduler, theirs, theirs.timesteps, torch_of(first) * scale, noise, monkeypatch)
    assert np.isfinite(expected).all()
    result = sampled_here(scheduler, state, first * scheduler.initial_scale_of(state), noise)
    # Euler's noise is 4,096 times the sample at first if the schedule ends without signal.
    assert_close(result, expected, 1e-4 if "rescale_betas_zero_snr" in options else 2e-5, f"{name} {options}")


@pytest.mark.parametrize(
    "name, options",
    [
        ("ddim", {**LATENT, "eta": 0.5}),
        ("ddpm", LATENT),
        ("pndm", {**LATENT, "skip_prk_steps": True, "steps_offset": 1}),
        ("euler", {**LATENT, **LEADING}),
        ("euler", {**LATENT, "use_karras_sigmas": True}),
        ("euler_ancestral", LATENT),
        ("dpm++", LATENT),
        ("dpm++", {**LATENT, "use_karras_sigmas": True}),
        ("flow", {"shift": 3.0}),
    ],
)
@pytest.mark.parametrize("strength", [0.55, 0.9, 1.0])
def test_start_from_an_image(name, options, strength, monkeypatch, assert_close):
    """Follows the pipelines of diffusers: the later timesteps, and the image with the noise of the first."""
    scheduler, theirs = both(name, options)
    steps = 10
    theirs.set_timesteps(steps)
    if name == "flow":  # StableDiffusion3Img2ImgPipeline.get_timesteps
        first = int(max(steps - min(steps * strength, steps), 0))
    else:  # StableDiffusionImg2ImgPipeline.get_timesteps
        first = max(steps - min(int(steps * strength), steps), 0)
    assert scheduler.first_step(steps, strength) == first
    timesteps = theirs.timesteps[first:]
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(first)

    image, fresh, noise = draw(0, *SHAPE), draw(2, *SHAPE), draw(1, len(theirs.timesteps), *SHAPE)
    add = theirs.scale_noise if name == "flow" else theirs.add_noise
    given = (timesteps[:1], torch_of(fresh)) if name == "flow" else (torch_of(fresh), timesteps[:1])
    noised = add(torch_of(image), *given)
    state = scheduler.start(scheduler.init(steps, SHAPE), first)
    result = scheduler.noised(state, image, fresh)
    assert_close(result, numpy_of(noised), 1e-6, "noised image")

    expected = sampled_there(scheduler, theirs, timesteps, noised, noise[first:], monkeypatch)
    assert_close(sampled_here(scheduler, state, result, noise, first), expected, 2e-5)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm"])
@pytest.mark.parametrize("options", [LATENT, COSINE, BETAS])
def test_training_noise(name, options, assert_close):
    scheduler, theirs = both(name, options)
    sample, noise = draw(0, 5, 4, 6, 3), draw(1, 5, 4, 6, 3)
    timesteps = np.array([0, 3, 100, 150, 199])
    there = torch_of(sample), torch_of(noise), torch.from_numpy(timesteps)
    assert_close(scheduler.add_noise(sample, noise, timesteps), numpy_of(theirs.add_noise(*there)), 1e-6)
    velocity = numpy_of(diffusers.DDPMScheduler(**options).get_velocity(*there))
    assert_close(scheduler.velocity(sample, noise, timesteps), velocity, 1e-6)
    np.testing.assert_allclose(scheduler.snr(timesteps), compute_snr(theirs, there[2]), rtol=1e-4)
    np.testing.assert_array_equal(scheduler.alphas_cumprod, theirs.alphas_cumprod)
    # One timestep for the whole batch.
    alone = scheduler.add_noise(sample, noise, 100)
    assert_close(alone, numpy_of(theirs.add_noise(*there[:2], torch.full((5,), 100))), 1e-6)


@pytest.mark.parametrize("name, options", [("euler", LATENT), ("euler_ancestral", COSINE), ("dpm++", LATENT)])
def test_training_noise_of_solvers(name, options, assert_close):
    scheduler, theirs = both(name, options)
    sample, noise = draw(0, 4, 4, 6, 3), draw(1, 4, 4, 6, 3)
    timesteps = np.array([0, 7, 500, 998])
    if name == "dpm++":  # before set_timesteps, diffusers' levels are in another order than its timesteps
        theirs = diffusers.DDPMScheduler(**options)
    there = theirs.add_noise(torch_of(sample), torch_of(noise), torch.from_numpy(timesteps).to(theirs.timesteps.dtype))
    # Relative to each sample: the noise of Euler grows with the timestep.
    for ours, expected in zip(scheduler.add_noise(sample, noise, timesteps), numpy_of(there), strict=True):
        assert_close(ours, expected, 1e-5)


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_noise_between_timesteps(kind, assert_close):
    """Timesteps of a run with other noise levels: `add_noise` finds the level again."""
    scheduler, _ = both("euler", {**LATENT, f"use_{kind}_sigmas": True})
    state = scheduler.init(8)
    sample, noise = draw(0, 8, 4, 6, 3), draw(1, 8, 4, 6, 3)
    result = scheduler.add_noise(sample, noise, state.timesteps)
    for index in range(8):
        expected = scheduler.noised(scheduler.start(state, index), sample[index], noise[index])
        assert_close(result[index], expected, 1e-4)


def test_flow_training(assert_close):
    scheduler, theirs = both("flow", {"shift": 3.0})
    sample, noise = draw(0, 3, 4, 6, 3), draw(1, 3, 4, 6, 3)
    timesteps = theirs.timesteps[torch.tensor([0, 500, 999])]
    # diffusers' schedule of training is shifted: the levels of u = 1, 0.5 and 0.001.
    levels = scheduler.shifted(np.array([1.0, 0.5, 0.001], np.float32))
    np.testing.assert_allclose(scheduler.timesteps_of(levels), timesteps, rtol=1e-5)
    expected = numpy_of(theirs.scale_noise(torch_of(sample), timesteps, torch_of(noise)))
    assert_close(scheduler.add_noise(sample, noise, timesteps.numpy()), expected, 1e-6)
    np.testing.assert_array_equal(scheduler.target(sample, noise), noise - sample)
    # One step along the true target, from any level to 0, is the sample.
    state = scheduler.init(1)
    _, result = scheduler.step(state, scheduler.target(sample, noise), noise)
    assert_close(result, sample, 1e-6)


@pytest.mark.parametrize("name", schedulers.NAMES)
def test_every_option_is_known(name):
    """Finds every option of diffusers' class declared: used, or refused unless it has the value without effect."""
    made = schedulers.NAMES[name]
    theirs = inspect.signature(getattr(diffusers, made.class_name).__init__).parameters
    assert made.option_names() == theirs.keys() - {"self"}
    defaults = {field.name: field.default for field in dataclasses.fields(made)}
    assert {key: defaults[key] for key in made.option_names()} == {
        key: theirs[key].default for key in made.option_names()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_options_of_other_classes(kind, tmp_path):
    """Opens a folder of any diffusion scheduler by another name: options of the other class have no effect."""
    getattr(diffusers, kind)().save_pretrained(tmp_path)
    for name in ("ddim", "euler"):
        scheduler = schedulers.from_folder(tmp_path, name)
        theirs = getattr(diffusers, scheduler.class_name).from_pretrained(tmp_path)
        scheduler.save(tmp_path / name)
        again = getattr(diffusers, scheduler.class_name).from_pretrained(tmp_path / name)
        assert {key: again.config[key] for key in scheduler.option_names()} == {
            key: theirs.config[key] for key in scheduler.option_names()
        }
        state = scheduler.init(10)
        theirs.set_timesteps(10)
        np.testing.assert_array_equal(state.timesteps, theirs.timesteps)


SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    **{**LATENT, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True},
    **{"steps_offset": 1, "trained_betas": None, "clip_sample": False},
}


@pytest.mark.parametrize("name", [name for name in schedulers.NAMES if name != "flow"])
def test_another_scheduler_by_name(name, tmp_path, monkeypatch, assert_close):
    """Equals `Class.from_config(pipeline.scheduler.config)` with the published options of Stable Diffusion 1.5."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD15))
    pipeline = diffusers.PNDMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    scheduler = schedulers.from_folder(tmp_path, name)
    assert scheduler == schedulers.by_name(name, schedulers.from_folder(tmp_path))
    theirs = getattr(diffusers, scheduler.class_name).from_config(pipeline.config)
    theirs.set_timesteps(5)
    state = scheduler.init(5, SHAPE)
    np.testing.assert_array_equal(state.timesteps, theirs.timesteps)
    first, noise = draw(0, *SHAPE), draw(1, len(theirs.timesteps), *SHAPE)
    scale = theirs.init_noise_sigma
    expected = sampled_there(scheduler, theirs, theirs.timesteps, torch_of(first) * scale, noise, monkeypatch)
    assert_close(sampled_here(scheduler, state, first * scheduler.initial_scale, noise), expected, 2e-5)


@pytest.mark.parametrize("name, options, _", CASES, ids=IDS)
def test_folders_both_ways(name, options, _, tmp_path):
    scheduler, theirs = both(name, options)
    scheduler.save(tmp_path / "ours")
    loaded = type(theirs).from_pretrained(tmp_path / "ours")
    own = scheduler.option_names()
    assert {key: loaded.config[key] for key in own} == {key: theirs.config[key] for key in own}
    theirs.save_pretrained(tmp_path / "theirs")
    read = schedulers.from_folder(tmp_path / "theirs")
    assert read == dataclasses.replace(scheduler, **({"eta": 0.0} if "eta" in options else {}))
    assert math.isclose(read.initial_scale, float(getattr(theirs, "init_noise_sigma", 1.0)), rel_tol=1e-6)
