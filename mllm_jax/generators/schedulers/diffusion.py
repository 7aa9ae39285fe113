"""The noise schedule of training, which all schedulers of discrete-time diffusion share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.checkpoints.config_options import is_number
from mllm_jax.generators.schedulers.betas import SCHEDULES, betas_of, cumulative, zero_terminal_snr
from mllm_jax.generators.schedulers.config import SchedulerConfig
from mllm_jax.generators.schedulers.options import choice, flag, number, option, whole
from mllm_jax.generators.schedulers.prediction import PREDICTIONS, threshold
from mllm_jax.generators.schedulers.protocol import State, per_sample
from mllm_jax.generators.schedulers.spacing import SPACINGS, discrete


def _are_betas(value: Any) -> bool:
    return value is None or (
        isinstance(value, tuple) and bool(value) and all(is_number(each) and 0 < each <= 1 for each in value)
    )


@dataclass(frozen=True)
class DiffusionScheduler(SchedulerConfig):
    """The options that all schedulers of discrete-time diffusion have, under diffusers' names.

    Training noise: noisy = sqrt(a) * sample + sqrt(1 - a) * noise, with a = `alphas_cumprod` at the timestep.

    Attributes:
        least_alpha: what the last value of `alphas_cumprod` becomes when the schedule ends without signal.
    """

    least_alpha: ClassVar[float] = 0.0

    num_train_timesteps: int = whole(1000, least=1)
    beta_start: float = number(0.0001, above=0, most=1)
    beta_end: float = number(0.02, above=0, most=1)
    beta_schedule: str = choice(*SCHEDULES)
    trained_betas: tuple[float, ...] | None = option(None, _are_betas, "a list of numbers above 0, at most 1")
    prediction_type: str = choice(*PREDICTIONS)
    timestep_spacing: str = choice(*SPACINGS)
    steps_offset: int = whole(0)
    rescale_betas_zero_snr: bool = flag(False)

    def __post_init__(self):
        super().__post_init__()
        betas = self.trained_betas
        if betas is not None and len(betas) != self.num_train_timesteps:
            raise self.refusal(f"{len(betas)} trained_betas", f"num_train_timesteps={self.num_train_timesteps}")

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Returns the share of the sample's variance at each timestep, float32 [T]."""
        if self.trained_betas is not None:
            betas = np.array(self.trained_betas, np.float32)
        else:
            betas = betas_of(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)
        if self.rescale_betas_zero_snr:
            betas = zero_terminal_snr(betas)
        result = cumulative(np.float32(1) - betas)
        if self.rescale_betas_zero_snr:
            result[-1] = max(result[-1], self.least_alpha)
        result.flags.writeable = False
        return result

    def _discrete_timesteps(self, steps: int) -> np.ndarray:
        """Returns the integer timesteps. Raises ConfigError if the training schedule lacks them."""
        train = self.num_train_timesteps
        if steps > train:
            raise self.refusal(f"{steps} steps", f"at most num_train_timesteps={train}", "take fewer steps")
        timesteps = discrete(self.timestep_spacing, train, steps, self.steps_offset).astype(np.int32)
        self._check_timesteps(timesteps)
        return timesteps

    def _check_timesteps(self, timesteps: np.ndarray) -> None:
        """Raises ConfigError for timesteps without noise level, or without signal that noise predictions need."""
        if timesteps.max() >= self.num_train_timesteps:
            raise self.refusal(
                f"timestep {timesteps.max()} of {len(timesteps)} steps with steps_offset={self.steps_offset}",
                f"timesteps below num_train_timesteps={self.num_train_timesteps}",
                "take fewer steps, or a smaller steps_offset",
            )
        if self.prediction_type == "epsilon" and (self.alphas_cumprod[timesteps] <= 0).any():
            raise self.refusal(
                f"prediction_type='epsilon' with rescale_betas_zero_snr at timestep {timesteps.max()}",
                "a timestep with signal, because a sample cannot be computed from noise alone",
                "set prediction_type='v_prediction', or timestep_spacing='leading'",
            )

    def add_noise(self, sample: jax.Array, noise: jax.Array, timesteps: Any) -> jax.Array:
        """Returns the sample at the noise level of the timesteps, a scalar or [B]."""
        alpha, sigma = self._levels(sample, timesteps)
        return (alpha * sample + sigma * noise).astype(sample.dtype)

    def noised(self, state: State, sample: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the sample at the noise level of the current step."""
        return self.add_noise(sample, noise, state.timestep)

    def velocity(self, sample: jax.Array, noise: jax.Array, timesteps: Any) -> jax.Array:
        """Returns the velocity sqrt(a) * noise - sqrt(1 - a) * sample (arXiv 2202.00512)."""
        alpha, sigma = self._levels(sample, timesteps)
        return (alpha * noise - sigma * sample).astype(sample.dtype)

    def target(self, sample: jax.Array, noise: jax.Array, timesteps: Any) -> jax.Array:
        """Returns what the model is trained to predict."""
        if self.prediction_type == "v_prediction":
            return self.velocity(sample, noise, timesteps)
        return noise if self.prediction_type == "epsilon" else sample

    def snr(self, timesteps: Any) -> jax.Array:
        """Returns the signal-to-noise ratio a / (1 - a) at each timestep."""
        share = jnp.asarray(self.alphas_cumprod)[jnp.asarray(timesteps)]
        return share / (1 - share)

    def _levels(self, sample: jax.Array, timesteps: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the factors of sample and noise in training, float32."""
        share = per_sample(jnp.asarray(self.alphas_cumprod)[jnp.asarray(timesteps)], sample)
        return jnp.sqrt(share), jnp.sqrt(1 - share)


@dataclass(frozen=True)
class Thresholded(DiffusionScheduler):
    """The options of schedulers that may limit a predicted sample by its own magnitudes."""

    thresholding: bool = flag(False)
    dynamic_thresholding_ratio: float = number(0.995, above=0, most=1)
    sample_max_value: float = number(1.0, above=0)

    def limited(self, sample: jax.Array) -> jax.Array:
        """Returns the predicted sample [B, ...] within its limits."""
        if self.thresholding:
            return threshold(sample, self.dynamic_thresholding_ratio, self.sample_max_value)
        return sample


@dataclass(frozen=True)
class Clipped(Thresholded):
    """The options of schedulers that clip a predicted sample, unless it is thresholded."""

    clip_sample: bool = flag(True)
    clip_sample_range: float = number(1.0, above=0)

    def limited(self, sample: jax.Array) -> jax.Array:
        """Returns the predicted sample [B, ...] within its limits."""
        if self.thresholding or not self.clip_sample:
            return super().limited(sample)
        return sample.clip(-self.clip_sample_range, self.clip_sample_range)
