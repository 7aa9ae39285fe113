"""TPU slices by their usual names."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from functools import cached_property

from mllm_jax.errors import PlanError
from mllm_jax.sharding.chips import GPUS, TPUS, Chip

# Names count chips for v5e and v6e, and TensorCores, two a chip, for v4, v5p and v7x: v5p-128 has 64 chips
# (cloud.google.com/tpu/docs/{v4,v5p}#configurations, and xpk's and MaxText's tables of names). v5e and v6e are a torus
# of two dimensions, whose axes wrap if they have 16 chips; the others have three, which wrap in multiples of 4.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBIC = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 192: "4x4x12", 256: "4x8x8",
    384: "4x8x12", 512: "8x8x8", 768: "8x8x12", 1024: "8x8x16", 1536: "8x12x16", 2048: "8x16x16", 3072: "12x16x16",
    4096: "16x16x16",
}  # fmt: skip
_SHAPES = {"v4": _CUBIC, "v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT, "v7x": _CUBIC}
_COUNTS_CORES = ("v4", "v5p", "v7x")
# libtpu's name of a generation, and the configuration of its chips: v4's two cores work as one there.
_LIBTPU = {"v4": ("v4", "megacore"), "v5e": ("v5e", None), "v5p": ("v5p", None), "v6e": ("v6e", None)}
_LIBTPU["v7x"] = ("tpu7x", None)
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6": "v6e", "trillium": "v6e"}
_ALIASES |= {"tpu7x": "v7x", "tpu7": "v7x", "v7": "v7x", "7x": "v7x", "ironwood": "v7x"}


@dataclass(frozen=True)
class Topology:
    """One or several slices of a kind, joined by the data centre's network, or GPUs.

    Attributes:
        name: normalised name: "v5e-256", "2xv5p-128", "64xh100".
        shape: chips along each axis of a slice; empty for GPUs.
        slices: number of slices; of nodes for GPUs.
    """

    name: str
    generation: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def is_tpu(self) -> bool:
        return bool(self.shape)

    @property
    def chips_a_slice(self) -> int:
        return math.prod(self.shape) if self.is_tpu else self.chip.node

    @property
    def chips(self) -> int:
        return self.slices * self.chips_a_slice

    @property
    def devices(self) -> int:
        """Returns the number of JAX devices."""
        return self.chips * self.chip.devices

    @cached_property
    def host_bounds(self) -> tuple[int, int, int]:
        """Returns the chips of one host along each axis."""
        return (1, 1, 1) if self.chips_a_slice == 1 else (2, 2, 1)

    @property
    def libtpu_name(self) -> str:
        """Returns the slice as `jax.experimental.topologies` takes it, such as "v5e:16x16"."""
        return f"{_LIBTPU[self.generation][0]}:{'x'.join(map(str, self.shape))}"

    @property
    def libtpu_options(self) -> dict:
        """Returns the other options that it takes."""
        options: dict = {"chips_per_host_bounds": self.host_bounds}
        if config := _LIBTPU[self.generation][1]:
            options["chip_config_name"] = config
        if self.slices > 1:
            options["num_slices"] = self.slices
        return options

    def wraps(self, axis: int) -> bool:
        """Returns whether the last chip along an axis is a neighbour of the first."""
        size = self.shape[axis]
        return size == 16 if len(self.shape) == 2 else size % 4 == 0


def topology(name: str) -> Topology:
    """Parses a name: "v5e-256", "v5p-128", "v6e-256", "v7x-128" or "tpu7x-128", "2xv5e-256"; "8xh100".

    A shape may replace the number: "v5p-4x4x8". The number of GPUs comes first, 8 to a node.

    Raises:
        PlanError: an unknown kind or size.
    """
    given = name.strip().lower()
    found = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+?)(?:-(\d+(?:x\d+)*))?", given)
    kind = _ALIASES.get(found[2], found[2]) if found else None
    if kind in GPUS and found[3] is None:
        return _gpus(name, kind, int(found[1] or 1))
    if kind not in TPUS or found[3] is None:
        near = difflib.get_close_matches(given, [*TPUS, *GPUS], n=1, cutoff=0.3)
        raise PlanError(
            f"topology {name!r}",
            f"a slice such as v5e-256, v5p-128, 2xv6e-256 (of {', '.join(TPUS)}), or 64xh100 (of {', '.join(GPUS)})",
            f"name one of those{f'; did you mean {near[0]}?' if near else ''}",
        )
    slices = int(found[1] or 1)
    shapes = _SHAPES[kind]
    if "x" in found[3]:
        shape = tuple(map(int, found[3].split("x")))
    else:
        size = int(found[3])
        chips, odd = divmod(size, 2) if kind in _COUNTS_CORES else (size, 0)
        if odd or chips not in shapes:
            known = [f"{kind}-{n * (2 if kind in _COUNTS_CORES else 1)}" for n in shapes]
            raise PlanError(
                f"topology {name!r}",
                f"one of {', '.join(known)}"
                + (" (the number counts TensorCores, two a chip)" if kind in _COUNTS_CORES else ""),
                f"name one of those, or its shape, as in {kind}-{list(shapes.values())[-1]}",
            )
        shape = tuple(map(int, shapes[chips].split("x")))
    if len(shape) != TPUS[kind].axes or slices < 1:
        raise PlanError(
            f"topology {name!r}",
            f"{TPUS[kind].axes} dimensions, as {kind} has, in at least one slice",
            f"name a shape such as {list(shapes.values())[-1]}",
        )
    count = math.prod(shape) * (2 if kind in _COUNTS_CORES else 1)
    usual = math.prod(shape) in shapes and shapes[math.prod(shape)] == "x".join(map(str, shape))
    title = f"{kind}-{count if usual else 'x'.join(map(str, shape))}"
    return Topology(title if slices == 1 else f"{slices}x{title}", kind, TPUS[kind], shape, slices)


def _gpus(name: str, kind: str, count: int) -> Topology:
    node = GPUS[kind].node
    if count % node and count > node or count < 1:
        raise PlanError(f"{name!r}: {count} GPUs", f"one node, or whole nodes of {node}", "change the number")
    chip = GPUS[kind] if count >= node else Chip(**{**GPUS[kind].__dict__, "node": count})
    return Topology(f"{count}x{kind}", kind, chip, (), max(1, count // node))
