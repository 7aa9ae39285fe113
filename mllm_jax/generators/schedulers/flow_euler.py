"""Flow matching (arXiv 2210.02747, 2403.03206): a straight line from sample to noise, followed by Euler steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.checkpoints.config_options import is_number
from mllm_jax.generators.schedulers.config import SchedulerConfig
from mllm_jax.generators.schedulers.euler import converter
from mllm_jax.generators.schedulers.options import choice, flag, number, whole
from mllm_jax.generators.schedulers.protocol import State, per_sample


@dataclass(frozen=True)
class FlowEuler(SchedulerConfig):
    """diffusers' FlowMatchEulerDiscreteScheduler, without dynamic shifting.

    A noisy sample is (1 - sigma) * sample + sigma * noise, its timestep sigma * num_train_timesteps, and the model
    predicts noise - sample. In training, draw u in (0, 1), take `timesteps_of(shifted(u))` for `add_noise` and
    `target`. The options base_shift, max_shift, base_image_seq_len, max_image_seq_len and time_shift_type belong to
    dynamic shifting.
    """

    class_name: ClassVar[str] = "FlowMatchEulerDiscreteScheduler"
    prediction_type: ClassVar[str] = "flow"

    num_train_timesteps: int = whole(1000, least=1)
    shift: float = number(1.0, above=0)
    use_dynamic_shifting: bool = choice(False)
    base_shift: float = number(0.5)
    max_shift: float = number(1.15)
    base_image_seq_len: int = whole(256)
    max_image_seq_len: int = whole(4096)
    invert_sigmas: bool = choice(False)
    shift_terminal: float | None = number(None, above=0, most=0.999999)
    use_karras_sigmas: bool = flag(False)
    use_exponential_sigmas: bool = flag(False)
    use_beta_sigmas: bool = flag(False)
    time_shift_type: str = choice("exponential", "linear")
    stochastic_sampling: bool = flag(False)

    def __post_init__(self):
        super().__post_init__()
        converter(self)

    @property
    def stochastic(self) -> bool:
        return self.stochastic_sampling

    def shifted(self, sigmas: Any) -> Any:
        """Returns noise levels in [0, 1] after the time shift: a shift above 1 raises them."""
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def timesteps_of(self, sigmas: Any) -> Any:
        """Returns the timesteps of noise levels."""
        return sigmas * self.num_train_timesteps

    def schedule(self, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        train = self.num_train_timesteps
        # As in diffusers, the ends of the schedule are shifted already, and are shifted again with the others.
        ends = self.shifted(np.array((train, 1), np.float32) / np.float32(train)).astype(np.float32)
        sigmas = self.shifted(np.linspace(float(ends[0]) * train, float(ends[1]) * train, steps) / train)
        if self.shift_terminal:
            if sigmas[-1] >= 1:
                raise self.refusal(f"{steps} steps with shift_terminal={self.shift_terminal}", "at least 2 steps")
            sigmas = 1 - (1 - sigmas) * (1 - self.shift_terminal) / (1 - sigmas[-1])
        if convert := converter(self):
            sigmas = convert(float(sigmas[0]), float(sigmas[-1]), steps)
        sigmas = sigmas.astype(np.float32)
        return sigmas * np.float32(train), {"sigma": np.append(sigmas, np.float32(0))}

    def first_step(self, steps: int, strength: float) -> int:
        """Returns the step that an image's sampling starts with, as diffusers' pipeline of Stable Diffusion 3."""
        if not is_number(strength) or not 0 < strength <= 1:
            raise self.refusal(f"strength={strength!r}", "a number above 0, at most 1")
        return int(max(steps - min(steps * strength, steps), 0))

    def step(
        self, state: State, output: jax.Array, sample: jax.Array, noise: jax.Array | None = None
    ) -> tuple[State, jax.Array]:
        """Returns the next state and sample; see `Scheduler.step`."""
        sigma, after = state.at("sigma"), state.at("sigma", 1)
        output, noisy = output.astype(jnp.float32), sample.astype(jnp.float32)
        if self.stochastic:
            result = (1 - after) * (noisy - sigma * output) + after * self.drawn(noise)
        else:
            result = noisy + (after - sigma) * output
        return state.next(), result.astype(sample.dtype)

    def add_noise(self, sample: jax.Array, noise: jax.Array, timesteps: Any) -> jax.Array:
        """Returns the sample at the noise level of the timesteps, a scalar or [B]."""
        sigma = per_sample(jnp.asarray(timesteps, jnp.float32) / self.num_train_timesteps, sample)
        return ((1 - sigma) * sample + sigma * noise).astype(sample.dtype)

    def noised(self, state: State, sample: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the sample at the noise level of the current step."""
        return self.add_noise(sample, noise, state.timestep)

    def velocity(self, sample: jax.Array, noise: jax.Array, timesteps: Any = None) -> jax.Array:
        """Returns noise - sample, at all timesteps."""
        return noise - sample

    def target(self, sample: jax.Array, noise: jax.Array, timesteps: Any = None) -> jax.Array:
        """Returns what the model is trained to predict, noise - sample."""
        return self.velocity(sample, noise)

    def snr(self, timesteps: Any) -> jax.Array:
        """Returns the signal-to-noise ratio at each timestep."""
        sigma = jnp.asarray(timesteps, jnp.float32) / self.num_train_timesteps
        return ((1 - sigma) / sigma) ** 2
