"""Schedulers by themselves: states, compiled loops, batches over devices, and refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.generators import schedulers

SHAPE = (4, 2, 3, 3)
# Every scheduler, stochastic ones included, with a method of several steps or a limit where it has one.
OPTIONS = {
    "ddpm": {"thresholding": True},
    "ddim": {"clip_sample": True},
    "pndm": {"skip_prk_steps": True},
    "euler": {"use_karras_sigmas": True},
    "euler_ancestral": {},
    "dpm++": {"thresholding": True},
    "flow": {"shift": 3.0},
}


@pytest.fixture(params=OPTIONS)
def scheduler(request):
    return schedulers.by_name(request.param, OPTIONS[request.param])


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def run(scheduler, sample: jax.Array, noise: jax.Array, steps: int = 6) -> jax.Array:
    """Samples as one loop, with the noise of each call."""
    state = scheduler.init(steps, sample.shape)

    def body(carry, inputs):
        state, sample = carry
        timestep, fresh = inputs
        output = jnp.tanh(scheduler.scale(state, sample) + timestep / 1000)
        return scheduler.step(state, output, sample, noise=fresh), None

    return jax.lax.scan(body, (state, sample), (state.timesteps, noise))[0][1]


def test_python_loop_equals_scan(scheduler):
    """Steps without the sample's shape: the first one allocates the history."""
    sample, state = draw(0, *SHAPE), scheduler.init(6)
    noise = draw(1, len(state.timesteps), *SHAPE)
    expected = jax.jit(lambda sample: run(scheduler, sample, noise))(sample)
    step = jax.jit(scheduler.step)
    for index, timestep in enumerate(state.timesteps):
        assert int(state.index) == index
        output = jnp.tanh(scheduler.scale(state, sample) + timestep / 1000)
        state, sample = step(state, output, sample, noise=noise[index])
    np.testing.assert_allclose(sample, expected, rtol=1e-4, atol=1e-5)


def test_one_sample_of_a_batch(scheduler):
    """Draws the same sample alone, in a batch, and under vmap."""
    calls = len(scheduler.init(6).timesteps)
    sample, noise = draw(0, *SHAPE), draw(1, calls, *SHAPE)
    whole = jax.jit(lambda *given: run(scheduler, *given))(sample, noise)
    alone = jax.jit(lambda *given: run(scheduler, *given))(sample[2:3], noise[:, 2:3])
    np.testing.assert_allclose(whole[2:3], alone, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(lambda *given: run(scheduler, *given), in_axes=(0, 1))(sample[:, None], noise[:, :, None])
    np.testing.assert_allclose(mapped[:, 0], whole, rtol=1e-5, atol=1e-5)


def test_batch_over_devices(scheduler):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    calls = len(scheduler.init(6).timesteps)
    sample, noise = draw(0, *SHAPE), draw(1, calls, *SHAPE)
    expected = jax.jit(lambda *given: run(scheduler, *given))(sample, noise)
    sample = jax.device_put(sample, NamedSharding(mesh, PartitionSpec("data")))
    noise = jax.device_put(noise, NamedSharding(mesh, PartitionSpec(None, "data")))
    result = jax.jit(lambda *given: run(scheduler, *given))(sample, noise)
    assert len(result.sharding.device_set) == 2
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_sample_keeps_its_dtype(scheduler):
    sample, state = draw(0, *SHAPE).astype(jnp.bfloat16), scheduler.init(6, SHAPE)
    assert scheduler.scale(state, sample).dtype == jnp.bfloat16
    state, sample = scheduler.step(state, sample, sample, noise=sample)
    assert sample.dtype == jnp.bfloat16
    assert all(each.dtype == jnp.float32 for each in state.history)
    assert scheduler.add_noise(sample, sample, state.timesteps[:4]).dtype == jnp.bfloat16


def test_protocol(scheduler):
    assert all(hasattr(scheduler, name) for name in vars(schedulers.Scheduler) if not name.startswith("_"))


def test_config_is_a_value(scheduler):
    """Hashes it, as a static argument of jit is, copies it and pickles it."""
    same = schedulers.by_name(*next((k, v) for k, v in OPTIONS.items() if schedulers.NAMES[k] is type(scheduler)))
    assert same == scheduler and hash(same) == hash(scheduler)
    assert copy.deepcopy(scheduler) == pickle.loads(pickle.dumps(scheduler)) == scheduler
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheduler.num_train_timesteps = 5


def test_start_forgets(scheduler):
    """Starts a state again after a step: it equals a fresh one."""
    fresh = scheduler.init(6, SHAPE)
    state, _ = scheduler.step(fresh, draw(0, *SHAPE), draw(1, *SHAPE), noise=draw(2, *SHAPE))
    for ours, expected in zip(
        jax.tree.leaves(scheduler.start(state, 0)), jax.tree.leaves(scheduler.start(fresh, 0)), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


def test_saved_options_return(scheduler, tmp_path):
    scheduler.save(tmp_path / "scheduler")
    assert schedulers.from_folder(tmp_path) == scheduler
    assert schedulers.from_folder(tmp_path / "scheduler") == scheduler


def test_changed_options_are_saved(tmp_path):
    """Writes an option that was read and then changed, to the default too, as it is now; those of others stay."""
    values = {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True, "_diffusers_version": "0.20.0"}
    scheduler = schedulers.by_name("ddim", values)
    dataclasses.replace(scheduler, steps_offset=0, set_alpha_to_one=False).save(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written == {**values, "steps_offset": 0, "set_alpha_to_one": False, "_class_name": "DDIMScheduler"}


def test_pipeline_names_the_class(tmp_path):
    """Takes the class in model_index.json first, as diffusers does."""
    schedulers.by_name("ddim").save(tmp_path / "scheduler")
    assert isinstance(schedulers.from_folder(tmp_path), schedulers.NAMES["ddim"])
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert isinstance(schedulers.from_folder(tmp_path), schedulers.NAMES["euler"])
    assert isinstance(schedulers.from_folder(tmp_path / "scheduler"), schedulers.NAMES["ddim"])


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "dpm++"])
def test_trailing_timesteps_are_never_negative(name):
    """Takes 61 of 1,000 timesteps, where rounding in NumPy's arange adds a 62nd one of -1."""
    assert len(np.arange(1000, 0, -1000 / 61)) == 62
    timesteps = schedulers.by_name(name, {"timestep_spacing": "trailing"}).init(61).timesteps
    assert len(timesteps) == 61 and timesteps.min() >= 0


def test_last_level_twice():
    """Steps from the least noise level to itself: the sample stays, where diffusers divides 0 by 0."""
    options = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_type": "heun"}
    state = schedulers.by_name("dpm++", options).init(20, SHAPE)
    last = state.replace(index=state.index + 19)
    sample = draw(0, *SHAPE)
    _, result = schedulers.by_name("dpm++", options).step(last, draw(1, *SHAPE), sample)
    np.testing.assert_allclose(result, sample, rtol=1e-5)


def test_initial_scale_depends_on_spacing():
    """Compares the factor of the whole training schedule with that of a run which begins at an earlier timestep."""
    scheduler = schedulers.by_name("euler", {"timestep_spacing": "leading"})
    highest = scheduler.sigmas.max()
    assert scheduler.initial_scale == pytest.approx(np.sqrt(highest**2 + 1))
    assert scheduler.initial_scale_of(scheduler.init(5)) < 0.5 * scheduler.initial_scale
    linspace = schedulers.by_name("euler")
    assert linspace.initial_scale == pytest.approx(float(linspace.initial_scale_of(linspace.init(5))), rel=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "flow", "ddim"])
def test_missing_noise_is_refused(name):
    scheduler = schedulers.by_name(name, {"stochastic_sampling": True} if name == "flow" else {})
    if name == "ddim":
        assert not scheduler.stochastic
        scheduler = dataclasses.replace(scheduler, eta=0.5)
    assert scheduler.stochastic
    sample = jnp.ones(SHAPE)
    with pytest.raises(ConfigError, match="a step without noise"):
        scheduler.step(scheduler.init(5), sample, sample)


@pytest.mark.parametrize(
    "name, options, steps, message",
    [
        *((name, {}, steps, "steps") for name in OPTIONS for steps in (0, -1, 2.0, True, "5", 1 << 40)),
        *((name, {}, 1001, "1001 steps") for name in ("ddpm", "ddim", "pndm", "dpm++")),
        ("euler", {"timestep_spacing": "leading"}, 1001, "1001 steps"),
        ("dpm++", {"timestep_spacing": "leading"}, 1000, "1000 steps"),
        ("dpm++", {}, 1000, "1000 steps"),  # one timestep twice, by rounding; diffusers computes NaN
        ("dpm++", {"lambda_min_clipped": 4.5}, 900, "lambda_min_clipped"),
        ("ddim", {"steps_offset": 1}, 1000, "timestep 1000 of 1000 steps with steps_offset=1"),
        ("pndm", {}, 3, "3 steps"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10, "rescale_betas_zero_snr"),
        ("flow", {"shift_terminal": 0.1}, 1, "shift_terminal"),
    ],
)
def test_steps_that_are_refused(name, options, steps, message):
    with pytest.raises(ConfigError, match=message):
        schedulers.by_name(name, options).init(steps)


@pytest.mark.parametrize(
    "name, options",
    [
        ("ddim", {"num_train_timesteps": 0}),
        ("ddim", {"num_train_timesteps": "1000"}),
        ("ddim", {"num_train_timesteps": 1000.0}),
        ("ddim", {"num_train_timesteps": True}),
        ("ddim", {"beta_start": 0}),
        ("ddim", {"beta_end": float("nan")}),
        ("ddim", {"beta_schedule": "quadratic"}),
        ("ddim", {"beta_schedule": ["linear"]}),
        ("ddim", {"trained_betas": 0.1}),
        ("ddim", {"trained_betas": [0.1, 0.2]}),
        ("ddim", {"trained_betas": [0.1, "0.2"], "num_train_timesteps": 2}),
        ("ddim", {"trained_betas": [], "num_train_timesteps": 1}),
        ("ddim", {"prediction_type": "flow_prediction"}),
        ("ddim", {"timestep_spacing": {}}),
        ("ddim", {"steps_offset": -1}),
        ("ddim", {"clip_sample": "false"}),
        ("ddim", {"clip_sample": 1}),
        ("ddim", {"clip_sample_range": 0}),
        ("ddim", {"dynamic_thresholding_ratio": 1.5}),
        ("ddim", {"guidance_rescale": 0.7}),
        ("ddpm", {"variance_type": "learned_range"}),
        ("ddpm", {"variance_type": "fixed_large_log"}),
        ("pndm", {"prediction_type": "sample"}),
        ("euler", {"timestep_type": "continuous"}),
        ("euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}),
        ("euler", {"sigma_min": 0}),
        ("euler_ancestral", {"prediction_type": "sample"}),
        ("dpm++", {"solver_order": 3}),
        ("dpm++", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpm++", {"solver_type": "bh2"}),
        ("dpm++", {"use_lu_lambdas": True}),
        ("dpm++", {"use_flow_sigmas": True}),
        ("dpm++", {"variance_type": "learned"}),
        ("dpm++", {"lambda_min_clipped": "-inf"}),
        ("flow", {"use_dynamic_shifting": True}),
        ("flow", {"invert_sigmas": True}),
        ("flow", {"shift": 0}),
        ("flow", {"use_karras_sigmas": True, "use_exponential_sigmas": True}),
    ],
)
def test_options_that_are_refused(name, options):
    """Finds the option's name in the message."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        schedulers.by_name(name, options)


def test_null_is_the_default():
    nulls = dict.fromkeys(("trained_betas", "use_karras_sigmas", "sigma_min", "steps_offset"))
    assert schedulers.by_name("euler", nulls) == schedulers.by_name("euler")


@pytest.mark.parametrize("strength", [0, 0.05, 1e-9, 1.5, -1, float("nan"), "0.5", None])
def test_strengths_that_are_refused(strength):
    with pytest.raises(ConfigError, match="strength"):
        schedulers.by_name("ddim").first_step(10, strength)


@pytest.mark.parametrize("index", [-1, 6, 1.0, None])
def test_starts_that_are_refused(index):
    scheduler = schedulers.by_name("ddim")
    with pytest.raises(ConfigError, match="a start at step"):
        scheduler.start(scheduler.init(6), index)
    runge_kutta = schedulers.by_name("pndm")
    with pytest.raises(ConfigError, match="skip_prk_steps"):
        runge_kutta.start(runge_kutta.init(6), 1)


def test_names_that_are_refused():
    with pytest.raises(ConfigError, match="'heun'") as caught:
        schedulers.by_name("heun")
    assert all(name in str(caught.value) for name in schedulers.NAMES)
    with pytest.raises(ConfigError, match="'flow' for the options of 'DDIMScheduler'"):
        schedulers.by_name("flow", schedulers.by_name("ddim"))
    with pytest.raises(ConfigError, match="'ddim' for the options of 'FlowMatch"):
        schedulers.by_name("ddim", schedulers.by_name("flow"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "JSON"),
        (b"[]", "JSON object"),
        (b"\xff", "JSON"),
        (b"{}", "the scheduler None"),
        (b'{"_class_name": ["DDIMScheduler"]}', "DDIMScheduler"),
        (b'{"_class_name": "HeunDiscreteScheduler"}', "HeunDiscreteScheduler.*\n.*PNDMScheduler"),
        (b'{"_class_name": "DDIMScheduler", "predict_epsilon": false}', "predict_epsilon"),
        (b'{"_class_name": "DDIMScheduler", "_use_default_values": 5, "steps_offset": null}', None),
    ],
)
def test_files_that_are_refused(tmp_path, content, message):
    (tmp_path / "scheduler_config.json").write_bytes(content)
    if message is None:
        assert schedulers.from_folder(tmp_path) == schedulers.by_name("ddim")
        return
    with pytest.raises((CheckpointError, ConfigError), match=message):
        schedulers.from_folder(tmp_path)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="without scheduler_config.json"):
        schedulers.from_folder(tmp_path)
    (tmp_path / "scheduler_config.json").mkdir()
    with pytest.raises(CheckpointError, match="scheduler_config.json"):
        schedulers.from_folder(tmp_path)
