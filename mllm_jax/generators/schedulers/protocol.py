"""The protocol of a scheduler: a frozen config, a state that is a pytree, and pure functions of both."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class State:
    """The state of one sampling run.

    Attributes:
        timesteps: int32 or float32 [N], the model's timesteps in order, one for each call of the model.
        tables: arrays that a step reads at its index, such as the noise level of each step.
        index: int32 scalar, the current step.
        begin: int32 scalar, the step that sampling began with; above 0 for a sample that starts from an image.
        steps: the number of steps that was asked for. N may differ: PNDM calls the model more often.
        history: earlier model outputs of a multistep method, float32; None until the sample's shape is known.
    """

    timesteps: jax.Array
    tables: dict[str, jax.Array]
    index: jax.Array
    begin: jax.Array
    steps: int = struct.field(pytree_node=False)
    history: tuple[jax.Array, ...] | None = ()

    def at(self, name: str, offset: int = 0) -> jax.Array:
        """Returns a table's value at the current step, or `offset` steps later."""
        return self.tables[name][self.index + offset]

    @property
    def timestep(self) -> jax.Array:
        """Returns the timestep of the current step."""
        return self.timesteps[self.index]

    @property
    def count(self) -> jax.Array:
        """Returns the number of steps that were done since sampling began."""
        return self.index - self.begin

    def next(self, history: tuple[jax.Array, ...] | None = ()) -> State:
        """Returns the state of the next step."""
        return self.replace(index=self.index + 1, history=history)


class Scheduler(Protocol):
    """A noise schedule for training and the steps of a sampler. All functions are pure and may be called inside jit.

    A sampling loop:

        state = s.init(20, sample.shape)
        sample = noise * s.initial_scale_of(state)
        for timestep in state.timesteps:
            output = model(s.scale(state, sample), timestep)
            state, sample = s.step(state, output, sample, noise=fresh_noise if s.stochastic else None)

    As one compiled loop, the state and the sample are the carry of `lax.scan` over `state.timesteps[first:]`. Then
    `init` needs the sample's shape, because the carry has one structure: multistep methods (PNDM, DPM-Solver++) keep
    earlier outputs. Without the shape, the first `step` allocates them, which is enough for a Python loop.

    To start from an image (`first = s.first_step(steps, strength)`):

        state = s.start(s.init(steps, image.shape), first)
        sample = s.noised(state, image, noise)

    Attributes:
        initial_scale: the factor of the first unit noise for the full training schedule (diffusers' `init_noise_sigma`
            before `set_timesteps`). It is 1 but for Euler. There, with spacing "leading" or one step, the factor
            depends on the number of steps: `initial_scale_of(state)` is diffusers' factor after `set_timesteps`.
        stochastic: whether `step` needs noise.
        alphas_cumprod: float32 [T], a NumPy array, the sample's share of the variance; flow matching has none.
    """

    num_train_timesteps: int
    prediction_type: str

    @property
    def initial_scale(self) -> float: ...
    @property
    def stochastic(self) -> bool: ...

    def init(self, steps: int, shape: tuple[int, ...] | None = None) -> State:
        """Returns the state of the first step. Raises ConfigError for a number of steps that the schedule lacks."""
        ...

    def start(self, state: State, index: int) -> State:
        """Returns a fresh state at a later step, as diffusers' `set_begin_index`."""
        ...

    def first_step(self, steps: int, strength: float) -> int:
        """Returns the step that an image's sampling starts with, as `get_timesteps` of diffusers' pipelines."""
        ...

    def initial_scale_of(self, state: State) -> jax.Array:
        """Returns the factor of the first unit noise for these timesteps."""
        ...

    def scale(self, state: State, sample: jax.Array) -> jax.Array:
        """Returns the model's input at the current step, diffusers' `scale_model_input`."""
        ...

    def step(
        self, state: State, output: jax.Array, sample: jax.Array, noise: jax.Array | None = None
    ) -> tuple[State, jax.Array]:
        """Returns the next state and sample. It computes in float32 and returns the sample's dtype.

        Raises:
            ConfigError: no noise where the scheduler is stochastic.
        """
        ...

    def add_noise(self, sample: jax.Array, noise: jax.Array, timesteps: Any) -> jax.Array:
        """Returns the sample at the noise level of the timesteps, a scalar or [B]."""
        ...

    def noised(self, state: State, sample: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the sample at the noise level of the current step."""
        ...

    def target(self, sample: jax.Array, noise: jax.Array, timesteps: Any) -> jax.Array:
        """Returns what the model is trained to predict: noise, sample, velocity or flow."""
        ...

    def velocity(self, sample: jax.Array, noise: jax.Array, timesteps: Any) -> jax.Array:
        """Returns the velocity; for flow matching noise - sample."""
        ...

    def snr(self, timesteps: Any) -> jax.Array:
        """Returns the signal-to-noise ratio at each timestep."""
        ...

    def values(self) -> dict[str, Any]:
        """Returns the options as a scheduler_config.json has them."""
        ...

    def save(self, folder: Any) -> None:
        """Writes scheduler_config.json, which diffusers loads."""
        ...


def per_sample(values: Any, sample: jax.Array) -> jax.Array:
    """Reshapes a scalar or [B] so that it multiplies a sample [B, ...]."""
    values = jnp.asarray(values)
    return values.reshape(values.shape + (1,) * (sample.ndim - values.ndim)) if values.ndim else values
