"""Euler steps over noise levels (algorithm 2 of arXiv 2206.00364), deterministic and ancestral."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.generators.schedulers import spacing
from mllm_jax.generators.schedulers.diffusion import DiffusionScheduler
from mllm_jax.generators.schedulers.options import choice, flag, number
from mllm_jax.generators.schedulers.prediction import to_sample
from mllm_jax.generators.schedulers.protocol import State, per_sample


@dataclass(frozen=True)
class EulerBase(DiffusionScheduler):
    """Noise levels of both Euler schedulers: samples are sample + sigma * noise, and `scale` gives them unit variance.

    `add_noise` has this form too. For training take "ddpm" with the same options: its samples are the model's inputs.
    """

    least_alpha: ClassVar[float] = 2.0**-24  # diffusers' choice: the first sigma is finite

    timestep_spacing: str = choice("linspace", "leading", "trailing")

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Returns training's noise levels, float32 [T]."""
        return spacing.sigmas_of(self.alphas_cumprod)

    def _spaced(self, steps: int) -> np.ndarray:
        if self.timestep_spacing == "leading" and steps > self.num_train_timesteps:
            raise self.refusal(f"{steps} steps", f"at most num_train_timesteps={self.num_train_timesteps}")
        return spacing.continuous(self.timestep_spacing, self.num_train_timesteps, steps, self.steps_offset)

    def _first_scale(self, sigma: Any) -> Any:
        return sigma if self.timestep_spacing in ("linspace", "trailing") else (sigma**2 + 1) ** 0.5

    @property
    def initial_scale(self) -> float:
        return float(self._first_scale(self.sigmas.max()))

    def initial_scale_of(self, state: State) -> jax.Array:
        """Returns the factor of the first unit noise for these timesteps."""
        return self._first_scale(state.tables["sigma"].max())

    def scale(self, state: State, sample: jax.Array) -> jax.Array:
        """Returns the sample with about unit variance, as the model takes it."""
        return (sample / jnp.sqrt(state.at("sigma") ** 2 + 1)).astype(sample.dtype)

    def add_noise(self, sample: jax.Array, noise: jax.Array, timesteps: Any) -> jax.Array:
        """Returns sample + sigma * noise at the timesteps, a scalar or [B]; they may lie between integers."""
        return self._with_noise(sample, noise, self._sigma(jnp.asarray(timesteps, jnp.float32)))

    def noised(self, state: State, sample: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the sample at the noise level of the current step."""
        return self._with_noise(sample, noise, state.at("sigma"))

    def _with_noise(self, sample: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
        return (sample + per_sample(sigma, sample) * noise).astype(sample.dtype)

    def _sigma(self, timesteps: jax.Array) -> jax.Array:
        return jnp.interp(timesteps, jnp.arange(self.num_train_timesteps, dtype=jnp.float32), jnp.asarray(self.sigmas))

    def _original(self, output: jax.Array, noisy: jax.Array, sigma: jax.Array) -> jax.Array:
        """Returns the predicted sample, of noisy = sample + sigma * noise."""
        if self.prediction_type == "epsilon":
            return noisy - sigma * output
        alpha = 1 / jnp.sqrt(sigma**2 + 1)
        return to_sample(self.prediction_type, output, noisy * alpha, alpha, sigma * alpha)


@dataclass(frozen=True)
class Euler(EulerBase):
    """diffusers' EulerDiscreteScheduler, without churn."""

    class_name: ClassVar[str] = "EulerDiscreteScheduler"

    interpolation_type: str = choice("linear", "log_linear")
    use_karras_sigmas: bool = flag(False)
    use_exponential_sigmas: bool = flag(False)
    use_beta_sigmas: bool = flag(False)
    sigma_min: float | None = number(None, above=0)
    sigma_max: float | None = number(None, above=0)
    timestep_type: str = choice("discrete")
    final_sigmas_type: str = choice("zero", "sigma_min")

    def __post_init__(self):
        super().__post_init__()
        converter(self)

    def schedule(self, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        timesteps = self._spaced(steps)
        log_sigmas = np.log(self.sigmas)
        if self.interpolation_type == "linear":
            sigmas = np.interp(timesteps, np.arange(len(self.sigmas)), self.sigmas)
        else:
            sigmas = np.exp(np.linspace(log_sigmas[-1], log_sigmas[0], steps + 1))
        if convert := converter(self):
            highest = sigmas[0] if self.sigma_max is None else self.sigma_max
            lowest = sigmas[-1] if self.sigma_min is None else self.sigma_min
            sigmas = convert(float(highest), float(lowest), steps)
            timesteps = spacing.timesteps_of(sigmas, log_sigmas)
        last = 0.0 if self.final_sigmas_type == "zero" else self.sigmas[0]
        return timesteps.astype(np.float32), {"sigma": np.append(sigmas, last).astype(np.float32)}

    def step(
        self, state: State, output: jax.Array, sample: jax.Array, noise: jax.Array | None = None
    ) -> tuple[State, jax.Array]:
        """Returns the next state and sample; see `Scheduler.step`."""
        sigma, after = state.at("sigma"), state.at("sigma", 1)
        noisy = sample.astype(jnp.float32)
        slope = (noisy - self._original(output.astype(jnp.float32), noisy, sigma)) / sigma
        return state.next(), (noisy + slope * (after - sigma)).astype(sample.dtype)

    def _sigma(self, timesteps: jax.Array) -> jax.Array:
        if converter(self) is None:
            return super()._sigma(timesteps)
        # The inverse of `spacing.timesteps_of`.
        logs = jnp.log(jnp.asarray(self.sigmas))
        return jnp.exp(jnp.interp(timesteps, jnp.arange(len(self.sigmas), dtype=jnp.float32), logs))


@dataclass(frozen=True)
class EulerAncestral(EulerBase):
    """diffusers' EulerAncestralDiscreteScheduler: fresh noise after each step, except the last."""

    class_name: ClassVar[str] = "EulerAncestralDiscreteScheduler"

    prediction_type: str = choice("epsilon", "v_prediction")

    @property
    def stochastic(self) -> bool:
        return True

    def schedule(self, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        timesteps = self._spaced(steps)
        sigmas = np.interp(timesteps, np.arange(len(self.sigmas)), self.sigmas)
        sigma = np.append(sigmas, 0.0).astype(np.float32)
        before, after = sigma[:-1], sigma[1:]
        up = np.sqrt(after**2 * (before**2 - after**2) / before**2)
        return timesteps, {"sigma": sigma, "up": up, "down": np.sqrt(after**2 - up**2)}

    def step(
        self, state: State, output: jax.Array, sample: jax.Array, noise: jax.Array | None = None
    ) -> tuple[State, jax.Array]:
        """Returns the next state and sample; see `Scheduler.step`."""
        sigma, noisy = state.at("sigma"), sample.astype(jnp.float32)
        slope = (noisy - self._original(output.astype(jnp.float32), noisy, sigma)) / sigma
        result = noisy + slope * (state.at("down") - sigma) + state.at("up") * self.drawn(noise)
        return state.next(), result.astype(sample.dtype)


def converter(config: Any) -> Callable[[float, float, int], np.ndarray] | None:
    """Returns the function that spaces noise levels (highest, lowest, steps), if a config has one.

    Raises:
        ConfigError: the config has several.
    """
    known = {
        "use_karras_sigmas": spacing.karras,
        "use_exponential_sigmas": spacing.exponential,
        "use_beta_sigmas": spacing.beta,
    }
    chosen = [name for name in known if getattr(config, name)]
    if len(chosen) > 1:
        raise config.refusal(" with ".join(chosen), "one of them")
    return known[chosen[0]] if chosen else None
