"""The optimizer of a stage, built with optax."""

from __future__ import annotations

import jax
import optax

from mllm_jax.training.config import AdamW

DECAYED = ("kernel", "embedding")


def learning_rate(config: AdamW, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, cosine to `end_factor` of it at the last step."""
    warmup = min(config.warmup_steps, max(1, steps // 2))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(steps, warmup + 1), config.end_factor * config.learning_rate
    )


def _decay_mask(params):
    """True where a path ends in a matrix's name: scanned norms have two dimensions as well, so the name decides."""

    def one(path, _):
        return str(path[-1].key).endswith(DECAYED)

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(config: AdamW, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decay_mask,
        ),
    )
