"""The optimizer of a stage, built with optax."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from mllm_jax.errors import ConfigError
from mllm_jax.models.part_names import new_names
from mllm_jax.training.average import moving_average
from mllm_jax.training.config import AdamW

DECAYED = ("kernel", "embedding")


def learning_rate(config: AdamW, steps: int) -> optax.Schedule:
    """Builds the schedule: linear warm-up from 0 to the peak, then `AdamW.schedule`.

    A warm-up before a cosine takes at most half of the steps; before a constant it does not depend on their number.
    """
    if config.schedule == "constant":
        rise = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
        return optax.join_schedules([rise, optax.constant_schedule(config.learning_rate)], [config.warmup_steps])
    warmup = min(config.warmup_steps, max(1, steps // 2))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(steps, warmup + 1), config.end_factor * config.learning_rate
    )


def _decay_mask(params):
    """Marks paths that end in a matrix's name. The name decides, as scanned norms have two dimensions too."""

    def one(path, _):
        return str(path[-1].key).endswith(DECAYED)

    return jax.tree_util.tree_map_with_path(one, params)


def _by_pattern(factors: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies each update by the factor of the first pattern that its path matches."""

    def scale(updates, _):
        flat = flatten_dict(updates, sep="/")
        for pattern, _ in factors:
            if not any(fnmatchcase(path, pattern) for path in flat):
                raise ConfigError(
                    f"optimizer.factors: {pattern!r} matches nothing that is trained",
                    f"paths such as {sorted({path.split('/')[0] for path in flat})}",
                    f"change or drop it{new_names([pattern])}",
                )
        found = {path: next((f for p, f in factors if fnmatchcase(path, p)), 1.0) for path in flat}
        return unflatten_dict({path: update * found[path] for path, update in flat.items()}, sep="/")

    return optax.stateless(scale)


def make_optimizer(config: AdamW, steps: int, ema: float | None = None) -> optax.GradientTransformation:
    """Chains clipping by global norm, AdamW or a subclass's transformation, and the factors of single parts.

    Args:
        ema: decay of a moving average of the parameters, which the last state of the chain holds; None: no average.

    Raises:
        ConfigError: at the first update, a factor's pattern that matches nothing.
    """
    transformations = [
        optax.clip_by_global_norm(config.clip_norm),
        config.transform(learning_rate(config, steps), _decay_mask),
    ]
    transformations += [_by_pattern(config.factors)] if config.factors else []
    return optax.chain(*transformations, *([] if ema is None else [moving_average(ema)]))
