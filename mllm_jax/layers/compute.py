"""The way a part of a model is computed: its dtype, what its backward pass keeps, and how its layers are unrolled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from mllm_jax.errors import ConfigError
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import REMAT_POLICIES

DTYPES = ("float32", "bfloat16", "float16")
Config = TypeVar("Config")


@dataclass(frozen=True)
class Compute:
    """The dtype, rematerialisation and unrolling of a part; they do not change the meaning of its parameters.

    None is the value of the composition that holds the part, else float32, "none" and 1.

    Attributes:
        dtype: of the activations, "float32", "bfloat16" or "float16".
        remat: the values recomputed in the backward pass, a key of `REMAT_POLICIES`: "none", "full", "dots" or
            "offload".
        scan_unroll: layers that each iteration of the loop over them computes; more is faster on a CPU and slower to
            compile.
    """

    dtype: str | None = None
    remat: str | None = None
    scan_unroll: int | None = None

    def __post_init__(self):
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype {self.dtype!r}", "float32, bfloat16 or float16", "choose one of the three")
        require = Requirements("compute", self)
        require.one_of("remat", (None, *REMAT_POLICIES))
        given = self.scan_unroll
        require(given is None or given >= 1, f"scan_unroll {given}", "at least 1 layer", "change scan_unroll")

    def over(self, outer: Compute) -> Compute:
        """Returns these values, with those that are open taken from `outer`."""
        names = [field.name for field in dataclasses.fields(self)]
        return Compute(**{n: getattr(outer, n) if getattr(self, n) is None else getattr(self, n) for n in names})


@dataclass(frozen=True, kw_only=True)
class WithCompute:
    """A config with a `Compute`: the base of the configs of every part and every composition.

    A composition's values apply to the parts that leave them open; see `within`.

    Attributes:
        compute: dtype, remat and unrolling.
    """

    compute: Compute = Compute()

    @property
    def dtype(self) -> str:
        """The dtype of the activations."""
        return self.compute.dtype or "float32"

    @property
    def remat(self) -> str:
        """The policy of rematerialisation."""
        return self.compute.remat or "none"

    @property
    def scan_unroll(self) -> int:
        """Layers that each iteration of the loop over them computes."""
        return self.compute.scan_unroll or 1

    def with_dtype(self, dtype: str) -> Self:
        """Returns the same config with every part computing in `dtype`."""
        return with_compute(self, dtype=dtype)


def within(part: Config, outer: Compute) -> Config:
    """Returns a part's config whose open values of `compute` are those of the composition."""
    if not isinstance(part, WithCompute):
        return part
    return dataclasses.replace(part, compute=part.compute.over(outer))


def with_compute(config: Config, **changes: Any) -> Config:
    """Returns the config with these values of `compute` in all its parts.

    Args:
        config: of a part, or of a composition.
        changes: fields of `Compute` with their values.
    """
    if isinstance(config, Mapping):
        found = {name: with_compute(value, **changes) for name, value in config.items()}
        return config if found == dict(config) else found
    if not dataclasses.is_dataclass(config) or isinstance(config, Compute):
        return config
    new: dict[str, Any] = {}
    if isinstance(config, WithCompute):
        new["compute"] = dataclasses.replace(config.compute, **changes)
        changes = dict.fromkeys(changes)  # what it holds takes them from here
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in new and (changed := with_compute(value, **changes)) != value:
            new[field.name] = changed
    return dataclasses.replace(config, **new)
