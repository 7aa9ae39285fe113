"""DDIM (arXiv 2010.02502), with eta between the deterministic form and DDPM's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.checkpoints.config_options import is_number
from mllm_jax.generators.schedulers.diffusion import Clipped
from mllm_jax.generators.schedulers.options import flag, option
from mllm_jax.generators.schedulers.prediction import to_noise, to_sample
from mllm_jax.generators.schedulers.protocol import State


def _is_share(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1


@dataclass(frozen=True)
class DDIM(Clipped):
    """diffusers' DDIMScheduler.

    Attributes:
        eta: the share of fresh noise in each step, 0 to 1. It is not saved: in diffusers `step` takes it.
    """

    class_name: ClassVar[str] = "DDIMScheduler"

    set_alpha_to_one: bool = flag(True)
    eta: float = option(0.0, _is_share, "a number, 0 to 1", ours=True)

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def schedule(self, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        timesteps = self._discrete_timesteps(steps)
        before = timesteps - self.num_train_timesteps // steps
        final = np.float32(1) if self.set_alpha_to_one else self.alphas_cumprod[0]
        share = self.alphas_cumprod[timesteps]
        share_before = np.where(before >= 0, self.alphas_cumprod[before.clip(0)], final)
        variance = (1 - share_before) / (1 - share) * (1 - share / share_before)
        deviation = self.eta * np.sqrt(variance.clip(0))
        return timesteps, {
            "alpha": np.sqrt(share),
            "sigma": np.sqrt(1 - share),
            "alpha_before": np.sqrt(share_before),
            "direction": np.sqrt((1 - share_before - deviation**2).clip(0)),
            "deviation": deviation,
        }

    def step(
        self, state: State, output: jax.Array, sample: jax.Array, noise: jax.Array | None = None
    ) -> tuple[State, jax.Array]:
        """Returns the next state and sample; see `Scheduler.step`."""
        levels = state.at("alpha"), state.at("sigma")
        output, noisy = output.astype(jnp.float32), sample.astype(jnp.float32)
        original = self.limited(to_sample(self.prediction_type, output, noisy, *levels))
        predicted_noise = to_noise(self.prediction_type, output, noisy, *levels)
        result = state.at("alpha_before") * original + state.at("direction") * predicted_noise
        if self.stochastic:
            result += state.at("deviation") * self.drawn(noise)
        return state.next(), result.astype(sample.dtype)
