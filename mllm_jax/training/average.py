"""A moving average of the trained parameters, as a part of the optimizer's state: checkpoints hold it with the rest."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AverageState(NamedTuple):
    """State of `moving_average`: the number of steps, and the average."""

    count: jax.Array
    params: Any


def moving_average(decay: float) -> optax.GradientTransformation:
    """Returns a transformation that averages the parameters and leaves the updates as they are; the last of a chain.

    After each step the average a of the parameters p becomes d a + (1 - d) p, where d is the smaller of `decay` and
    (1 + n) / (10 + n) after n earlier steps, so that the random beginning is soon forgotten.
    """

    def init(params):
        # A copy: a step donates both.
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        kept = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, new: (kept * old + (1 - kept) * new).astype(old.dtype), state.params, new)
        return updates, AverageState(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def averaged(params: Any, opt_state: Any) -> Any:
    """Returns the average that an optimizer's state holds; without one, the parameters themselves."""
    return next((part.params for part in opt_state if isinstance(part, AverageState)), params)
