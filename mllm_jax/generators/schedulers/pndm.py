"""PNDM (arXiv 2202.09778): a linear multistep method, after Runge-Kutta steps or, as Stable Diffusion, without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.generators.schedulers.diffusion import DiffusionScheduler
from mllm_jax.generators.schedulers.options import choice, flag
from mllm_jax.generators.schedulers.prediction import to_noise
from mllm_jax.generators.schedulers.protocol import State

# Weights of the present output and of earlier ones, by the number of calls before this one. The second call repeats
# the first step with the mean of both outputs.
_WEIGHTS = np.array(
    (
        (1, 0, 0, 0),
        (1 / 2, 1 / 2, 0, 0),
        (3 / 2, -1 / 2, 0, 0),
        (23 / 12, -16 / 12, 5 / 12, 0),
        (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    ),
    np.float32,
)
_RUNGE_KUTTA = 12  # calls of the model: three steps of four
_SHARES = np.array((1 / 6, 1 / 3, 1 / 3, 1 / 6), np.float32)


@dataclass(frozen=True)
class PNDM(DiffusionScheduler):
    """diffusers' PNDMScheduler.

    With skip_prk_steps the model is called once more than `steps`: its second timestep comes twice. Else the first
    three steps take four calls each, and sampling cannot start from an image.
    """

    class_name: ClassVar[str] = "PNDMScheduler"
    memory: ClassVar[int] = 5  # three outputs, latest first; the sample of a step in several calls; their weighted sum

    prediction_type: str = choice("epsilon", "v_prediction")
    rescale_betas_zero_snr: bool = choice(False, ours=True)
    skip_prk_steps: bool = flag(False)
    set_alpha_to_one: bool = flag(False)

    def schedule(self, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rising = self._discrete_timesteps(steps)[::-1]
        if self.skip_prk_steps:
            timesteps = np.concatenate([rising[:-1], rising[-2:-1], rising[-1:]])[::-1]
        elif steps < 4:
            raise self.refusal(f"{steps} steps", "at least 4", "take more steps, or set skip_prk_steps")
        else:
            halves = np.tile([0, self.num_train_timesteps // steps // 2], 4)
            calls = (rising[-4:].repeat(2) + halves)[:-1].repeat(2)[1:-1]
            timesteps = np.concatenate([calls[::-1], rising[:-3][::-1]])
        return timesteps.astype(np.int32), {}

    def start(self, state: State, index: int) -> State:
        """Returns a fresh state at a later step."""
        if index and not self.skip_prk_steps:
            raise self.refusal(f"a start at step {index!r} with skip_prk_steps=False", "step 0", "set skip_prk_steps")
        return super().start(state, index)

    def step(
        self, state: State, output: jax.Array, sample: jax.Array, noise: jax.Array | None = None
    ) -> tuple[State, jax.Array]:
        """Returns the next state and sample; see `Scheduler.step`."""
        output, noisy = output.astype(jnp.float32), sample.astype(jnp.float32)
        recalled = self.recall(state, sample)
        history, result = self._linear(state, recalled, output, noisy)
        if not self.skip_prk_steps:
            early = state.count < _RUNGE_KUTTA
            others, other = self._runge_kutta(state, recalled, output, noisy)
            history = tuple(jnp.where(early, a, b) for a, b in zip(others, history, strict=True))
            result = jnp.where(early, other, result)
        return state.next(history), result.astype(sample.dtype)

    def _linear(
        self, state: State, history: tuple[jax.Array, ...], output: jax.Array, noisy: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Does a linear multistep step."""
        count, stride = state.count, self.num_train_timesteps // state.steps
        last, second, third, kept, total = history
        weights = jnp.asarray(_WEIGHTS)[count.clip(max=4)]
        combined = sum(weight * each for weight, each in zip(weights, (output, last, second, third), strict=True))
        again = count == 1
        timestep = state.timestep + jnp.where(again, stride, 0)
        result = self._moved(jnp.where(again, kept, noisy), combined, timestep, timestep - stride)
        pushed = (output, last, second)
        history = tuple(jnp.where(again, old, new) for old, new in zip((last, second, third), pushed, strict=True))
        return (*history, jnp.where(count == 0, noisy, kept), total), result

    def _runge_kutta(
        self, state: State, history: tuple[jax.Array, ...], output: jax.Array, noisy: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Does one of the four calls of a Runge-Kutta step."""
        call, half = state.count % 4, self.num_train_timesteps // state.steps // 2
        last, second, third, kept, total = history
        first = call == 0
        kept = jnp.where(first, noisy, kept)
        total = jnp.where(first, 0.0, total) + jnp.asarray(_SHARES)[call] * output
        timestep = state.timesteps[state.count // 4 * 4]
        before = state.timestep - jnp.where(call % 2 == 0, half, 0)
        result = self._moved(kept, jnp.where(call == 3, total, output), timestep, before)
        pushed = (output, last, second)
        history = tuple(jnp.where(first, new, old) for old, new in zip((last, second, third), pushed, strict=True))
        return (*history, kept, total), result

    def _moved(self, sample: jax.Array, output: jax.Array, timestep: jax.Array, before: jax.Array) -> jax.Array:
        """Moves a sample from one timestep to an earlier one along an output (formula 9)."""
        table = jnp.asarray(self.alphas_cumprod)
        share = table[timestep]
        final = 1.0 if self.set_alpha_to_one else table[0]
        share_before = jnp.where(before >= 0, table[before.clip(0)], final)
        noise = to_noise(self.prediction_type, output, sample, jnp.sqrt(share), jnp.sqrt(1 - share))
        divisor = share * jnp.sqrt(1 - share_before) + jnp.sqrt(share * (1 - share) * share_before)
        return jnp.sqrt(share_before / share) * sample - (share_before - share) * noise / divisor
