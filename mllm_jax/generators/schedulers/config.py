"""The base of all schedulers: options from and to scheduler_config.json, and the parts that most of them share."""

from __future__ import annotations

import abc
import json
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.checkpoints.config_options import is_number, is_whole
from mllm_jax.errors import ConfigError
from mllm_jax.files import write_atomic
from mllm_jax.generators.schedulers.options import LARGEST
from mllm_jax.generators.schedulers.protocol import State

FILE = "scheduler_config.json"
_METADATA = frozenset(("_class_name", "_diffusers_version", "_name_or_path", "_commit_hash"))
# diffusers keeps all options of a file whatever the class, so that another scheduler can be made from it, and a class
# ignores those of others. These are the options of its schedulers for the same models that are not here.
_OTHERS = frozenset(("disable_corrector", "predict_x0", "solver_p"))


@dataclass(frozen=True)
class SchedulerConfig(abc.ABC):
    """The base of all schedulers: checked options, and what most of them share.

    Attributes:
        class_name: the class in diffusers.
        memory: the number of arrays of the sample's shape that the state keeps.
        given: the options of the file that this config was read from. Those of other schedulers are written back.
    """

    class_name: ClassVar[str]
    memory: ClassVar[int] = 0
    given: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    def __post_init__(self):
        for each in self._options():
            value = getattr(self, each.name)
            if isinstance(value, list):
                object.__setattr__(self, each.name, value := tuple(value))
            if not each.metadata["fits"](value):
                raise self.refusal(f"{each.name}={value!r:.100}", f"{each.name} to be {each.metadata['expected']}")

    @classmethod
    def _options(cls) -> list[Any]:
        return [each for each in fields(cls) if "fits" in each.metadata]

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Returns the names of the options that diffusers' class has too."""
        return frozenset(each.name for each in cls._options() if not each.metadata["ours"])

    @classmethod
    def refusal(cls, given: str, expected: str, todo: str = "change it, or choose another scheduler") -> ConfigError:
        """Returns the error of something that this scheduler does not take."""
        return ConfigError(f"{cls.class_name}: {given}", expected, todo)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], known: frozenset[str] = frozenset()) -> Self:
        """Makes the config from the values of a scheduler_config.json.

        Options that diffusers' class does not have are ignored there, and here if another scheduler has them.

        Args:
            known: names of the options of other schedulers.

        Raises:
            ConfigError: a value of another type or without support, or an option that no scheduler has.
        """
        own = cls.option_names()
        unset = values.get("_use_default_values")
        unset = unset if isinstance(unset, list) else ()
        values = {name: value for name, value in values.items() if name not in (*unset, "_use_default_values")}
        if unknown := sorted(values.keys() - own - known - _METADATA - _OTHERS):
            listed = ", ".join(f"{name}={values[name]!r:.60}" for name in unknown)
            raise cls.refusal(listed, f"the options {', '.join(sorted(own))}", "remove those without effect")
        kept = {name: value for name, value in values.items() if name in own and value is not None}
        return cls(**kept, given=values)

    def values(self) -> dict[str, Any]:
        """Returns the options as a scheduler_config.json has them: those that were read, and those that are set."""
        own = self.option_names()
        result = {name: value for name, value in self.given.items() if name not in own}
        for each in self._options():
            value = getattr(self, each.name)
            if each.name in own and (each.name in self.given or value != each.default):
                result[each.name] = list(value) if isinstance(value, tuple) else value
        return {**result, "_class_name": self.class_name}

    def save(self, folder: str | Path) -> None:
        """Writes scheduler_config.json into the scheduler's folder; diffusers loads it."""
        os.makedirs(folder, exist_ok=True)
        write_atomic(Path(folder) / FILE, json.dumps(self.values(), indent=2, sort_keys=True) + "\n")

    @property
    def stochastic(self) -> bool:
        """Returns whether `step` needs noise."""
        return False

    @property
    def initial_scale(self) -> float:
        """Returns the factor of the first unit noise for the full training schedule."""
        return 1.0

    def initial_scale_of(self, state: State) -> jax.Array:
        """Returns the factor of the first unit noise for these timesteps."""
        return jnp.float32(1.0)

    @abc.abstractmethod
    def schedule(self, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the timesteps and the tables of a state, of `steps` from 1."""

    def init(self, steps: int, shape: tuple[int, ...] | None = None) -> State:
        """Returns the state of the first step. A compiled loop needs the sample's shape; see `Scheduler`."""
        if not is_whole(steps) or not 1 <= steps <= LARGEST:
            raise self.refusal(f"{steps!r} steps", f"a whole number, 1 to {LARGEST:,}")
        timesteps, tables = self.schedule(steps)
        history = tuple(jnp.zeros(shape, jnp.float32) for _ in range(self.memory)) if shape is not None else None
        return State(
            timesteps=jnp.asarray(timesteps),
            tables={name: jnp.asarray(table, jnp.float32) for name, table in tables.items()},
            index=jnp.int32(0),
            begin=jnp.int32(0),
            steps=steps,
            history=history if self.memory else (),
        )

    def start(self, state: State, index: int) -> State:
        """Returns a fresh state at a later step."""
        calls = state.timesteps.shape[0]
        if not is_whole(index) or not 0 <= index < calls:
            raise self.refusal(f"a start at step {index!r}", f"a step, 0 to {calls - 1}")
        history = state.history and tuple(map(jnp.zeros_like, state.history))
        return state.replace(index=jnp.int32(index), begin=jnp.int32(index), history=history)

    def first_step(self, steps: int, strength: float) -> int:
        """Returns the step that an image's sampling starts with: none is left out at strength 1."""
        if not is_number(strength) or not 0 < strength <= 1 or int(steps * strength) < 1:
            raise self.refusal(f"strength={strength!r} with {steps} steps", "a number up to 1 that leaves a step")
        return steps - min(int(steps * strength), steps)

    def scale(self, state: State, sample: jax.Array) -> jax.Array:
        """Returns the model's input: here the sample itself."""
        return sample

    def recall(self, state: State, sample: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the state's history, allocated if it is not yet."""
        if state.history is not None:
            return state.history
        return tuple(jnp.zeros(sample.shape, jnp.float32) for _ in range(self.memory))

    def drawn(self, noise: jax.Array | None) -> jax.Array:
        """Returns the noise of a stochastic step in float32.

        Raises:
            ConfigError: there is none.
        """
        if noise is None:
            raise self.refusal("a step without noise", "unit noise of the sample's shape", "pass noise to `step`")
        return noise.astype(jnp.float32)
