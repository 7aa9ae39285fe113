"""DPM-Solver++ (arXiv 2211.01095): the multistep solver of order 1 or 2 for predicted samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.checkpoints.config_options import is_number
from mllm_jax.generators.schedulers import spacing
from mllm_jax.generators.schedulers.diffusion import Thresholded
from mllm_jax.generators.schedulers.euler import converter
from mllm_jax.generators.schedulers.options import choice, flag, number, option
from mllm_jax.generators.schedulers.prediction import to_sample
from mllm_jax.generators.schedulers.protocol import State

_FEW = 15  # below this number of steps lower_order_final takes effect


def _is_bound(value: Any) -> bool:
    return is_number(value) or value == -math.inf


@dataclass(frozen=True)
class DPMSolver(Thresholded):
    """diffusers' DPMSolverMultistepScheduler with algorithm_type "dpmsolver++" (2M at order 2)."""

    class_name: ClassVar[str] = "DPMSolverMultistepScheduler"
    memory: ClassVar[int] = 1  # the last predicted sample
    least_alpha: ClassVar[float] = 2.0**-24

    timestep_spacing: str = choice("linspace", "leading", "trailing")
    solver_order: int = choice(2, 1)
    algorithm_type: str = choice("dpmsolver++")
    solver_type: str = choice("midpoint", "heun")
    lower_order_final: bool = flag(True)
    euler_at_final: bool = flag(False)
    use_karras_sigmas: bool = flag(False)
    use_exponential_sigmas: bool = flag(False)
    use_beta_sigmas: bool = flag(False)
    use_lu_lambdas: bool = choice(False)
    use_flow_sigmas: bool = choice(False)
    flow_shift: float = number(1.0)  # without effect, as time_shift_type: both belong to flow sigmas
    use_dynamic_shifting: bool = choice(False)
    time_shift_type: str = choice("exponential")
    final_sigmas_type: str = choice("zero", "sigma_min")
    lambda_min_clipped: float = option(-math.inf, _is_bound, "a number or -Infinity")
    # The fixed variances of a DDPM have no effect on this solver; a learned one would double the model's output.
    variance_type: str | None = choice(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")

    def __post_init__(self):
        super().__post_init__()
        converter(self)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Returns training's noise levels beside a unit sample, float32 [T]."""
        return spacing.sigmas_of(self.alphas_cumprod)

    def schedule(self, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        log_sigmas = np.log(self.sigmas)
        if convert := converter(self):
            sigmas = convert(float(self.sigmas[-1]), float(self.sigmas[0]), steps)
            timesteps = spacing.timesteps_of(sigmas, log_sigmas)
            if self.use_karras_sigmas and self.beta_schedule != "squaredcos_cap_v2":
                timesteps = timesteps.round()
        else:
            timesteps = self._spaced(steps)
            self._check_timesteps(timesteps)
            sigmas = np.interp(timesteps, np.arange(len(self.sigmas)), self.sigmas)
        last = 0.0 if self.final_sigmas_type == "zero" else self.sigmas[0]
        sigmas = np.append(sigmas, last).astype(np.float32)
        return timesteps.astype(np.int32), self._coefficients(sigmas.astype(np.float64))

    def _spaced(self, steps: int) -> np.ndarray:
        """Returns the timesteps of a spacing; the last of steps + 1 is left out, except in "trailing"."""
        train = self.num_train_timesteps
        if steps > train:
            raise self.refusal(f"{steps} steps", f"at most num_train_timesteps={train}", "take fewer steps")
        # Half the log of the signal-to-noise ratio may have a least value, for the cosine schedule.
        share = self.alphas_cumprod
        half_log_snr = np.log(np.sqrt(share)) - np.log(np.sqrt(1 - share))
        last = train - int(np.searchsorted(half_log_snr[::-1], self.lambda_min_clipped))
        if self.timestep_spacing == "trailing":
            timesteps = spacing.trailing(last, train / steps, steps)
        else:
            timesteps = spacing.discrete(self.timestep_spacing, last, steps + 1, 0)[:-1]
            if self.timestep_spacing == "leading":
                timesteps = timesteps + self.steps_offset
        if not len(timesteps) or len(np.unique(timesteps)) < len(timesteps):
            raise self.refusal(
                f"{steps} steps with lambda_min_clipped={self.lambda_min_clipped}",
                f"different timesteps, of the {last} that are left",
                "take fewer steps",
            )
        return timesteps.astype(np.int64)

    def _coefficients(self, sigmas: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the factors of a step: of the noisy sample, of the predicted one, of its change since the last step.

        Also returns those of a noised sample at each step.
        """
        alpha = 1 / np.sqrt(sigmas**2 + 1)
        sigma = sigmas * alpha
        with np.errstate(divide="ignore", invalid="ignore"):
            half_log_snr = np.log(alpha) - np.log(sigma)
            step = np.diff(half_log_snr)
            decay = np.expm1(-step)
            heun = np.where(step == 0, 0, decay / step + 1)  # 0 / 0 where the last level comes twice
            share = -0.5 * decay if self.solver_type == "midpoint" else heun
            # The change over the last step, extrapolated to this one.
            change = np.append(0, alpha[2:] * share[1:] * step[1:] / step[:-1])
        change[~self._second_order(len(step))] = 0
        return {
            "alpha": alpha,
            "sigma": sigma,
            "noisy": sigma[1:] / sigma[:-1],
            "original": -alpha[1:] * decay,
            "change": change,
        }

    def _second_order(self, count: int) -> np.ndarray:
        """Returns which of the steps are of order 2, once there is an earlier prediction."""
        result = np.full(count, self.solver_order == 2)
        few = self.lower_order_final and count < _FEW
        if self.euler_at_final or few or self.final_sigmas_type == "zero":
            result[-1] = False
        return result

    def noised(self, state: State, sample: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the sample at the noise level of the current step."""
        return (state.at("alpha") * sample + state.at("sigma") * noise).astype(sample.dtype)

    def step(
        self, state: State, output: jax.Array, sample: jax.Array, noise: jax.Array | None = None
    ) -> tuple[State, jax.Array]:
        """Returns the next state and sample; see `Scheduler.step`."""
        output, noisy = output.astype(jnp.float32), sample.astype(jnp.float32)
        original = self.limited(to_sample(self.prediction_type, output, noisy, state.at("alpha"), state.at("sigma")))
        (last,) = self.recall(state, sample)
        change = jnp.where(state.count == 0, 0.0, original - last)
        result = state.at("noisy") * noisy + state.at("original") * original + state.at("change") * change
        return state.next((original,)), result.astype(sample.dtype)
