"""DDPM (arXiv 2006.11239): ancestral sampling, and the training noise of all discrete diffusion models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.generators.schedulers.betas import SCHEDULES
from mllm_jax.generators.schedulers.diffusion import Clipped
from mllm_jax.generators.schedulers.options import choice
from mllm_jax.generators.schedulers.prediction import to_sample
from mllm_jax.generators.schedulers.protocol import State


@dataclass(frozen=True)
class DDPM(Clipped):
    """diffusers' DDPMScheduler with fixed variances."""

    class_name: ClassVar[str] = "DDPMScheduler"

    beta_schedule: str = choice(*SCHEDULES, "sigmoid", "laplace")
    variance_type: str = choice("fixed_small", "fixed_small_log", "fixed_large")

    @property
    def stochastic(self) -> bool:
        return True

    def schedule(self, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        timesteps = self._discrete_timesteps(steps)
        share = self.alphas_cumprod[timesteps]
        share_before = np.append(share[1:], np.float32(1))
        kept = share / share_before
        if self.variance_type == "fixed_large":
            variance = 1 - kept
        else:
            variance = ((1 - share_before) / (1 - share) * (1 - kept)).clip(1e-20)
        return timesteps, {
            "alpha": np.sqrt(share),
            "sigma": np.sqrt(1 - share),
            "original": np.sqrt(share_before) * (1 - kept) / (1 - share),
            "current": np.sqrt(kept) * (1 - share_before) / (1 - share),
            "deviation": np.where(timesteps > 0, np.sqrt(variance), 0),
        }

    def step(
        self, state: State, output: jax.Array, sample: jax.Array, noise: jax.Array | None = None
    ) -> tuple[State, jax.Array]:
        """Returns the next state and sample; see `Scheduler.step`. Nothing is added at timestep 0."""
        output, noisy = output.astype(jnp.float32), sample.astype(jnp.float32)
        original = self.limited(to_sample(self.prediction_type, output, noisy, state.at("alpha"), state.at("sigma")))
        result = state.at("original") * original + state.at("current") * noisy
        result += state.at("deviation") * self.drawn(noise)
        return state.next(), result.astype(sample.dtype)
