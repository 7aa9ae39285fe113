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
    """The way to compute; parameters mean the same whatever this says.

    None is what the composition that holds the part says, else float32, "none" and 1.

    Attributes:
        dtype: of the activations, "float32", "bfloat16" or "float16".
        remat: what the backward pass computes again, a key of `REMAT_POLICIES`: "none", "full", "dots" or "offload".
        scan_unroll: layers that each turn of the loop over them computes; more is faster on a CPU and slower to
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
        """Returns this with what it leaves open taken from `outer`."""
        names = [field.name for field in dataclasses.fields(self)]
        return Compute(**{n: getattr(outer, n) if getattr(self, n) is None else getattr(self, n) for n in names})


@dataclass(frozen=True, kw_only=True)
class WithCompute:
    """A config that says how it is computed: the base of that of every part and of every composition.

    What a composition says holds for the parts that leave it open; see `within`.

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
        """Layers that each turn of the loop over them computes."""
        return self.compute.scan_unroll or 1

    def with_dtype(self, dtype: str) -> Self:
        """Returns the same config with every part computing in `dtype`."""
        return with_compute(self, dtype=dtype)


def within(part: Config, outer: Compute) -> Config:
    """Returns a part's config with what its `compute` leaves open taken from the composition's."""
    if not isinstance(part, WithCompute):
        return part
    return dataclasses.replace(part, compute=part.compute.over(outer))


def with_compute(config: Config, **changes: Any) -> Config:
    """Returns a config that is computed as the changes say, whatever its parts said before.

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
