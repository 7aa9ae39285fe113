"""A model's parameters under their shardings: as shapes, or initialised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from mllm_jax.errors import ConfigError
from mllm_jax.models.part_names import is_inside
from mllm_jax.models.registry import abstract_init
from mllm_jax.sharding.logical import PartRules
from mllm_jax.sharding.mesh import param_shardings


def placed_params(model: nn.Module, mesh: Mesh, parts: Sequence[PartRules] = ()) -> dict:
    """Returns all parameters as ShapeDtypeStructs with their shardings; computes nothing.

    Args:
        parts: rules for logical axes of single parts.
    """
    boxed = abstract_init(model, model.config.batch_spec().empty(), method="touch")
    shardings = param_shardings(boxed, mesh, parts)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings
    )


def placed_together(configs: Sequence[Any], mesh: Mesh, parts: Sequence[PartRules] = ()) -> dict:
    """Returns `placed_params` of several compositions, which share parts of the same name.

    Raises:
        ConfigError: parameters of the same name have different shapes.
    """
    placed: dict = {}
    for config in configs:
        for name, part in placed_params(config.make(), mesh, parts).items():
            if part != placed.setdefault(name, part):
                raise ConfigError(
                    f"{name!r} of a {type(config).__name__}, with other shapes than in the compositions before it",
                    "equal parts under one name",
                    "build both from one config, or give the stages runs of their own",
                )
    return placed


def shardings_of(placed: dict) -> dict:
    """Returns the shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda x: x.sharding, placed)


def init_params(
    model: nn.Module,
    mesh: Mesh,
    seed: int,
    *,
    without: Sequence[str] = (),
    parts: Sequence[PartRules] = (),
    placed: dict | None = None,
) -> tuple[dict, dict]:
    """Initialises all parameters under their shardings; no host or device ever holds a full copy of a sharded one.

    Args:
        without: parts, and parts inside them, that are not initialised.
        parts: rules for logical axes of single parts.
        placed: the result of `placed_params`, if the caller has it.

    Returns:
        (params, shardings): nested dicts of float32 arrays and of their NamedShardings, the latter of all parts.
    """
    shardings = shardings_of(placed_params(model, mesh, parts) if placed is None else placed)
    flat = flatten_dict(shardings, sep="/")
    wanted = {path: sharding for path, sharding in flat.items() if not is_inside(path, without)}

    def make(key):
        params = nn.meta.unbox(model.init(key, model.config.batch_spec().empty(), method="touch")["params"])
        leaves = flatten_dict(params, sep="/")
        return {path: leaves[path] for path in wanted}

    drawn = jax.jit(make, out_shardings=wanted)(jax.random.key(seed)) if wanted else {}
    return unflatten_dict(drawn, sep="/"), shardings
