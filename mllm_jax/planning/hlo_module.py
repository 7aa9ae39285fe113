"""A parser of compiled HLO modules: computations, instructions, shapes, and trip counts of loops."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mllm_jax.errors import PlanError

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
_SHAPE = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=\s]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
# A computation that runs on another thread, such as a SparseCore's, ends with the thread's name.
_END = re.compile(r"^\}(, execution_thread=\"[\w.\-]+\")?$")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
# Instructions that pass a value on unchanged, and those that do so with a tuple.
_PASSED_ON = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "optimization-barrier")
_PASSED_ON_WHOLE = ("copy", "optimization-barrier")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Shape:
    """The shape of one array: its element type, its dimensions, and whether it is in HBM (a TPU's memory space 0)."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.size * _bits(self.dtype) // 8)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    if digits is None:
        raise PlanError(f"element type {dtype!r} in a compiled program", "one with a known width", "report this")
    return int(digits[1])


@dataclass
class Instruction:
    """One line of a computation.

    Attributes:
        shapes: shapes of its result; several for a tuple.
        arguments: text between its parentheses: a constant's value, or the operands.
        operands: names in `arguments`.
        attributes: text after the parentheses.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    arguments: str
    attributes: str
    is_root: bool
    operands: tuple[str, ...] = ()
    called: dict[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    def attribute(self, name: str) -> str | None:
        """Returns the value of `name=value` if it is a word, a number or {...}."""
        found = re.search(rf"\b{name}=(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[^,\s]+)", self.attributes)
        return found[1] if found else None

    def branches(self) -> list[str]:
        """Returns the names of the computations of a conditional."""
        listed = _BRANCHES.search(self.attributes)
        if listed:
            return re.findall(r"%?([\w.\-]+)", listed[1])
        return [self.called[key] for key in ("true_computation", "false_computation") if key in self.called]


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def root(self) -> Instruction:
        return next((i for i in self if i.is_root), list(self)[-1])

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        table: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                table[operand].append(instruction)
        return table


class Module:
    """A parsed module.

    Attributes:
        devices: number of partitions times replicas; a collective without replica groups spans all.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry: Computation | None = None
        header = text[: text.find("\n")]
        counts = [re.search(rf"{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
        self.devices = math.prod(int(count[1]) for count in counts if count)
        current: Computation | None = None
        pending: list[str] = []

        def finish() -> None:
            if pending:
                instruction = _parse_instruction("\n".join(pending))
                current.instructions[instruction.name] = instruction
                pending.clear()

        for line in text.splitlines():
            if current is None:
                if started := _COMPUTATION.match(line):
                    current = self.computations.setdefault(started[2], Computation(started[2]))
                    self.entry = current if started[1] else self.entry
            elif _END.match(line):
                finish()
                current = None
            elif _INSTRUCTION.match(line):
                finish()
                pending.append(line)
            elif pending:  # the call of a Pallas kernel spans several lines
                pending.append(line)
        if self.entry is None:
            raise PlanError("text without an ENTRY computation", "a compiled HLO module", "pass compiled.as_text()")
        # The caller of each computation, to follow its parameters outwards.
        self.callers: dict[str, list[tuple[Computation, Instruction]]] = {}
        for computation in self.computations.values():
            for instruction in computation:
                for name in {*instruction.called.values(), *instruction.branches()}:
                    self.callers.setdefault(name, []).append((computation, instruction))

    def constant(self, computation: Computation, name: str, index: int | None = None) -> str | None:
        """Returns the text of a value or tuple element that is a constant, possibly passed on; None if it is not."""
        found = self._source(computation, name, index, 64)
        return None if found is None else found.arguments

    def _source(self, computation: Computation, name: str, index: int | None, depth: int) -> Instruction | None:
        """Returns the constant of a value (`index` None) or of an element of a tuple."""
        instruction = computation.instructions.get(name)
        if instruction is None or depth == 0:
            return None
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant" and index is None:
            return instruction
        if opcode == "get-tuple-element" and index is None:
            return self._source(computation, operands[0], int(instruction.attribute("index")), depth - 1)
        if opcode == "tuple" and index is not None:
            return self._source(computation, operands[index], None, depth - 1)
        passed_on = _PASSED_ON if index is None else _PASSED_ON_WHOLE
        loop = opcode == "while" and index is not None and self._unchanged(instruction, index)
        if loop or (opcode in passed_on and operands):
            return self._source(computation, operands[0], index, depth - 1)
        if opcode == "parameter":
            return self._argument(computation, int(instruction.arguments), index, depth - 1)
        if opcode == "fusion":
            inner = self.computations[instruction.called["calls"]]
            return self._source(inner, inner.root.name, index, depth - 1)
        return None

    def _argument(self, computation: Computation, number: int, index: int | None, depth: int) -> Instruction | None:
        """Does the same for a parameter of a computation with one caller."""
        callers = self.callers.get(computation.name, [])
        if len({(outer.name, call.name) for outer, call in callers}) != 1:
            return None
        outer, call = callers[0]
        if call.opcode == "while" and index is not None and self._unchanged(call, index):
            return self._source(outer, call.operands[0], index, depth)
        if call.opcode in ("fusion", "call"):
            return self._source(outer, call.operands[number], index, depth)
        return None

    def _unchanged(self, loop: Instruction, index: int) -> bool:
        """Returns whether a loop passes an element of its tuple on unchanged."""
        body = self.computations[loop.called["body"]]
        root = body.root
        if root.opcode != "tuple":
            return False
        value = body.instructions[root.operands[index]]
        while value.opcode in ("copy", "bitcast"):
            value = body.instructions[value.operands[0]]
        if value.opcode != "get-tuple-element" or int(value.attribute("index")) != index:
            return False
        return body.instructions[value.operands[0]].opcode == "parameter"

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Returns the number of iterations of a `while`; None if it is not constant.

        It is known_trip_count. TPU modules have none (jax 0.10): there it follows from the start, step and bound of the
        counter, the element of the loop's tuple that its condition compares with a constant.
        """
        if known := re.search(r'known_trip_count[":{\s]+n[":\s]+(\d+)', loop.attributes):
            return int(known[1])
        scope = condition = self.computations[loop.called["condition"]]
        compare = condition.root
        if compare.opcode == "fusion":
            scope = self.computations[compare.called["calls"]]
            compare = scope.root
        if compare.opcode != "compare":
            return None
        left, right = compare.operands
        direction = compare.attribute("direction")
        bound, counter = self.constant(scope, right), left
        if bound is None:
            bound, counter = self.constant(scope, left), right
            direction = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(direction, direction)
        index = self._counter_index(condition, scope, counter)
        if bound is None or index is None:
            return None
        start, step = self.constant(computation, loop.operands[0], index), self._step(loop, index)
        if start is None or not step:
            return None
        distance = int(bound) - int(start) + {"LE": step, "GE": step}.get(direction, 0)
        return max(0, -(-distance // step))

    def _counter_index(self, condition: Computation, scope: Computation, name: str) -> int | None:
        instruction = scope.instructions[name]
        while instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = scope.instructions[instruction.operands[0]]
        if scope is not condition and instruction.opcode == "parameter":
            outer = condition.root.operands[int(instruction.arguments)]
            return self._counter_index(condition, condition, outer)
        return int(instruction.attribute("index")) if instruction.opcode == "get-tuple-element" else None

    def _step(self, loop: Instruction, index: int) -> int | None:
        """Returns what the body adds to the counter."""
        body = self.computations[loop.called["body"]]
        if body.root.opcode != "tuple":
            return None
        scope, value = body, body.instructions[body.root.operands[index]]
        total = 0
        for _ in range(64):
            if value.opcode in ("copy", "bitcast"):
                value = scope.instructions[value.operands[0]]
            elif value.opcode == "add":
                constants = [self.constant(scope, operand) for operand in value.operands]
                if (constants[0] is None) == (constants[1] is None):
                    return None
                total += int(constants[0] if constants[1] is None else constants[1])
                value = scope.instructions[value.operands[0 if constants[0] is None else 1]]
            elif value.opcode == "fusion" and scope is body:
                call, scope = value, self.computations[value.called["calls"]]
                value = scope.root
            elif value.opcode == "parameter" and scope is not body:
                value = body.instructions[call.operands[int(value.arguments)]]
                scope = body
            else:
                return total if value.opcode == "get-tuple-element" else None
        return None


def _parse_instruction(text: str) -> Instruction:
    head = _INSTRUCTION.match(text)
    rest = text[head.end() :]
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ", _SHAPE.match(rest).end())
    shapes = tuple(
        Shape(
            dtype, tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip()), not re.search(r"S\([1-9]", layout)
        )
        for dtype, dims, layout in _SHAPE.findall(rest[:end])
    )
    opcode_start = end + 1
    opens = rest.index("(", opcode_start)
    closes = _balanced(rest, opens)
    arguments, attributes = rest[opens + 1 : closes - 1], rest[closes:]
    opcode = rest[opcode_start:opens].strip()
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", arguments))
    called = dict(_CALLED.findall(attributes))
    return Instruction(head[2], opcode, shapes, arguments.strip(), attributes, bool(head[1]), operands, called)


def _balanced(text: str, start: int) -> int:
    """Returns the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise PlanError(f"unbalanced parentheses in {text[:80]!r}", "a compiled HLO module", "report this")


_AXIS = re.compile(r"'([^']+)'=(\d+)")


def replica_groups(text: str | None, devices: int) -> np.ndarray | list[list[int]]:
    """Parses the groups of a collective, each a list of partitions, from any of the three forms that XLA prints.

    Args:
        text: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['a'=2,'b'=4] {'b'}`, or `{}`/None for one group of all.

    Raises:
        PlanError: another form.
    """
    if text is None or text.replace(" ", "") in ("{}", "{{}}"):
        return [list(range(devices))]
    if text.startswith("{"):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,\s]+)\}", text)]
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?$", text):
        return _iota(iota[2], iota[3]).reshape(_ints(iota[1]))
    if mesh := re.match(r"mesh\[([^\]]*)\](?:,?\s*device_ids=\(([^)]*(?:\([^)]*\))?[^)]*)\))?\s*\{([^}]*)\}$", text):
        axes = {name: int(size) for name, size in _AXIS.findall(mesh[1])}
        ids = np.arange(math.prod(axes.values()))
        if mesh[2]:
            if order := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", mesh[2].replace("<=", "")):
                ids = _iota(order[1], order[2]).ravel()
            else:
                ids = np.array(_ints(mesh[2]))
        return _mesh_groups(ids, axes, mesh[3])
    raise PlanError(f"replica_groups={text}", "one of XLA's three forms", "report this, with the jax version")


def _mesh_groups(ids: np.ndarray, axes: dict[str, int], wanted: str) -> np.ndarray:
    """Returns groups over axes of a mesh; 'a':(2)4 is the part of axis 'a' of size 4 after a part of size 2."""
    sizes: list[int] = []
    chosen: list[int] = []
    cuts = {n: (int(p), int(s)) for n, p, s in re.findall(r"'([^']+)':\((\d+)\)(\d+)", wanted)}
    whole = set(re.findall(r"'([^']+)'(?!:)", wanted))
    for name, size in axes.items():
        if name in cuts:
            before, part = cuts[name]
            chosen.append(len(sizes) + 1)
            sizes += [before, part, size // (before * part)]
        else:
            chosen += [len(sizes)] if name in whole else []
            sizes.append(size)
    rest = [i for i in range(len(sizes)) if i not in chosen]
    return ids.reshape(sizes).transpose(rest + chosen).reshape(-1, math.prod(sizes[i] for i in chosen))


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _ints(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_ints(order)) if order else ids


def _ints(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]
