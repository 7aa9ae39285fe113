"""The table of one model's stored tensors: their names, shapes, and the parameters inside them.

No file is read here. One layout serves both directions: `parameter_view` takes a parameter out of a stored tensor, and
`assemble` makes a stored tensor from its parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from einops import EinopsError, rearrange

from mllm_jax.checkpoints.leaves import listed
from mllm_jax.checkpoints.table import Table, Weight
from mllm_jax.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor, or one for each layer.

    Attributes:
        name: the hub's name, with "{layer}" if there is one per layer.
        shape: shape of one of them.
        slots: lines of the table in it, one slot after the other along the first axis; several lines of a slot are
            interleaved.
        layers: number of such tensors; None means one, without a number.
    """

    name: str
    shape: Shape
    slots: tuple[tuple[Weight, ...], ...]
    layers: int | None

    def names(self) -> list[str]:
        return [self.name] if self.layers is None else [named(self.name, layer) for layer in range(self.layers)]


_LAYER = re.compile(r"\{layer(?:\*(\d+)\+(\d+))?\}")


def is_layered(name: str) -> bool:
    """Returns whether a line's name means one tensor per layer."""
    return _LAYER.search(name) is not None


def named(name: str, layer: int) -> str:
    """Returns the hub's name of a layer: "{layer}" becomes its number n, "{layer*2+1}" becomes 2n+1."""
    return _LAYER.sub(lambda found: str(layer if found[1] is None else layer * int(found[1]) + int(found[2])), name)


def lay_out(table: Table, shapes: Mapping[str, Shape]) -> list[StoredTensor]:
    """Returns the stored tensors of a model whose parameters have these shapes (path -> shape, with the layer axis).

    Raises:
        CheckpointError: the table and the parameters do not match; lists every wrong line and parameter.
    """
    paths = [line.path for line in table.weights]
    wrong = [f"{path}: in the table, not in the model" for path in paths if path not in shapes]
    known = set(paths)
    wrong += [f"{path}: in the model, not in the table" for path in shapes if path not in known]
    wrong += [f"{path}: in the table {count} times" for path, count in Counter(paths).items() if count > 1]
    layouts = []
    if not wrong:
        by_name: dict[str, list[Weight]] = {}
        for line in table.weights:
            by_name.setdefault(line.name, []).append(line)
        for name, lines in by_name.items():
            try:
                layouts.append(_layout(name, lines, shapes))
            except ValueError as error:
                wrong.append(f"{name}: {error}")
    if not wrong:
        names = Counter(name for layout in layouts for name in layout.names())
        wrong += [f"{name}: {count} lines name it" for name, count in names.items() if count > 1]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} faults between the table of weights and the parameters{listed(sorted(wrong))}",
            "one line per parameter, with patterns that match the shapes",
            "pass the parameters of this model; if they are, correct its table",
        )
    return layouts


def _layout(name: str, lines: list[Weight], shapes: Mapping[str, Shape]) -> StoredTensor:
    layered = is_layered(name)
    counts = {shapes[line.path][0] if layered and shapes[line.path] else None for line in lines}
    if len(counts) > 1 or (layered and None in counts):
        raise ValueError("parameters with different numbers of layers")
    by_rows: dict[tuple[int, int] | None, list[Weight]] = {}
    for line in lines:
        by_rows.setdefault(line.rows, []).append(line)
    if None in by_rows and len(by_rows) > 1:
        raise ValueError("lines with rows and lines without")
    slots, total = [], None
    for rows, slot in sorted(by_rows.items(), key=lambda item: item[0] or (0, 0)):
        slot.sort(key=lambda line: -1 if line.part is None else line.part)
        if [line.part for line in slot] not in ([None], list(range(len(slot)))):
            raise ValueError("lines of one slot that are not its parts 0, 1, ...")
        shape = _stored_shape(slot, [shapes[line.path][int(layered) :] for line in slot])
        if rows is not None:
            if rows[0] != (total[0] if total else 0) or not shape or shape[0] != rows[1] - rows[0]:
                raise ValueError(f"rows {rows} that are not consecutive, or do not hold {list(shape)}")
            if total and shape[1:] != total[1:]:
                raise ValueError(f"rows {rows} of another width than the previous rows")
            shape = (rows[1], *shape[1:])
        total = shape
        slots.append(tuple(slot))
    return StoredTensor(name, total, tuple(slots), counts.pop() if layered else None)


def _stored_shape(slot: list[Weight], shapes: list[Shape]) -> Shape:
    """Returns the shape that `_join` gives to parameters of these shapes."""
    if len(set(shapes)) > 1 or len({(line.pattern, tuple(sorted(line.sizes.items()))) for line in slot}) > 1:
        raise ValueError(f"interleaved parts with different shapes or patterns: {shapes}")
    try:
        arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
        return jax.eval_shape(partial(_join, slot, jax.numpy), arrays).shape
    except EinopsError as error:
        message = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"the parameter's shape {list(shapes[0])} does not fit {slot[0].pattern!r}: {message}"
        ) from error


def _join(slot, numpy, arrays):
    line = slot[0]
    array = arrays[0] if line.part is None else numpy.stack(arrays)
    if not line.pattern:
        return array
    stored, ours = line.pattern.split("->")
    return rearrange(array, f"{ours} -> {stored}", **line.sizes)


def parameter_view(line: Weight, tensor: np.ndarray) -> np.ndarray:
    """Returns the parameter (or a layer of it) inside a stored tensor; a view unless the pattern merges axes."""
    if line.rows is not None:
        tensor = tensor[slice(*line.rows)]
    if line.pattern:
        tensor = rearrange(tensor, line.pattern, **line.sizes)
    return tensor if line.part is None else tensor[line.part]


def assemble(layout: StoredTensor, get: Callable[[str], np.ndarray]) -> np.ndarray:
    """Makes a stored tensor from its parameters; `get(path)` returns the parameter, or one layer of it."""
    slots = [_join(slot, np, [get(line.path) for line in slot]) for slot in layout.slots]
    return slots[0] if len(slots) == 1 else np.concatenate(slots)


# ---- names


def resolve(table: Table, layouts: list[StoredTensor], stored: Mapping[str, Shape]) -> tuple[dict[str, str], list[str]]:
    """Returns hub name -> stored name of each tensor, and a line for everything that does not match.

    Names in the table are kept; all others are replaced by its spellings, one after the other.
    """
    wanted = {name: layout.shape for layout in layouts for name in layout.names()}
    ignored = re.compile("|".join(re.escape(name).replace(r"\{layer\}", r"\d+") for name in table.ignored) or r"(?!)")
    found: dict[str, str] = {}
    wrong = []
    for raw, shape in stored.items():
        name = raw
        if name not in wanted and not ignored.fullmatch(name):
            for spelling, replacement in table.spellings:
                name = re.sub(spelling, replacement, name)
        as_read = raw if name == raw else f"{raw} (read as {name})"
        if name in wanted:
            if name in found:
                wrong.append(f"{as_read}: a duplicate of {found[name]}")
            elif tuple(shape) != wanted[name]:
                wrong.append(f"{as_read}: shape {list(shape)}, expected {list(wanted[name])}")
            found.setdefault(name, raw)
        elif not ignored.fullmatch(name):
            wrong.append(f"{as_read}: unknown")
    wrong += [f"{name}: missing" for name in wanted if name not in found]
    return found, wrong


def gather_layers(lines: list[str]) -> list[str]:
    """Joins lines that differ only in one layer's number: "layers.{0-31}.x: missing"."""
    groups: dict[str, list[int]] = {}
    for line in lines:
        number = re.search(r"(?<=\.)\d+(?=\.)", line)
        key = line if number is None else re.sub(rf"\.{number[0]}\.", ".\0.", line)
        groups.setdefault(key, []).append(-1 if number is None else int(number[0]))
    return [key.replace("\0", _ranges(sorted(numbers))) for key, numbers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"
