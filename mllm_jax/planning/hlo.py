"""The cost of a compiled step: FLOPs, HBM traffic and communication, counted in its HLO with trip counts.

`compiled.cost_analysis()` counts the body of a loop once and does not count Pallas kernels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from mllm_jax.planning.hlo_module import Computation, Instruction, Module, Shape, replica_groups
from mllm_jax.planning.pallas import is_kernel, kernel

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# A TPU runs a reduce-scatter as one fusion: an all-reduce and the slice that a chip keeps.
FUSED_SCATTER = "all-reduce-scatter"
_GROUPS = re.compile(
    r"replica_groups=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[[^\]]*\][^{]*\{[^}]*\})"
)
# Instructions without traffic of their own.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
_FREE |= {"partition-id", "replica-id", "after-all", "add-dependency", "optimization-barrier", "async-update"}
_FREE |= {f"{kind}-done" for kind in (*COLLECTIVES, "copy", "slice", "async", "call", "send", "recv")}
_FREE |= {"async-start", "call-start"}  # their computations are counted where they are defined


@dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
        times: number of runs in a step.
        group: number of chips in a group, which spans `slices` slices (1: all over ICI).
        bytes: size of its operands on one chip, for one run.
        members: partitions in one of its groups.
        ici_bytes, dcn_bytes: bytes that one chip sends in a step over all runs, by the cost of a ring: over ICI, and
            over the network between slices.
    """

    kind: str
    times: int
    group: int
    slices: int
    bytes: int
    ici_bytes: float
    dcn_bytes: float
    name: str = ""
    members: tuple[int, ...] = ()

    @property
    def wire_bytes(self) -> float:
        return self.ici_bytes + self.dcn_bytes


@dataclass
class Account:
    """The cost of a step on one chip.

    Attributes:
        dot_flops: FLOPs of matrix products and convolutions.
        kernel_flops: FLOPs of Pallas kernels, by formula, without the blocks that their masks skip.
        dense_flops: FLOPs of both, with those blocks.
        hbm_bytes: bytes read from and written to HBM by the scheduled program.
        kernels: (name, times, FLOPs of one run) of each Pallas kernel.
        unknown: descriptions of what could not be counted: loops without a constant trip count (counted once) and
            kernels without a formula (counted as 0).
    """

    dot_flops: float = 0
    kernel_flops: float = 0
    dense_flops: float = 0
    hbm_bytes: float = 0
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[tuple[str, int, float]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def flops(self) -> float:
        return self.dot_flops + self.kernel_flops

    @property
    def ici_bytes(self) -> float:
        return sum(c.ici_bytes for c in self.collectives)

    @property
    def dcn_bytes(self) -> float:
        return sum(c.dcn_bytes for c in self.collectives)

    def wire_bytes(self, *kinds: str) -> float:
        """Returns the bytes that a chip sends in a step, in these kinds of collectives or in all."""
        return sum(c.wire_bytes for c in self.collectives if not kinds or c.kind in kinds)

    def wire_bytes_unfused(self) -> float:
        """Returns the same with each fused all-reduce-scatter at the cost of the all-reduce in its text.

        It is an upper bound. Other tools, which read the text literally, report such figures.
        """
        return self.wire_bytes() + self.wire_bytes(FUSED_SCATTER)

    def by_kind(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Returns (kind, "ICI" or "DCN") -> (runs a step, bytes a chip sends a step), largest first."""
        table: dict[tuple[str, str], tuple[int, float]] = {}
        for c in self.collectives:
            for link, sent in (("ICI", c.ici_bytes), ("DCN", c.dcn_bytes)):
                if sent or (link == "ICI" and c.slices == 1):
                    runs, total = table.get((c.kind, link), (0, 0.0))
                    table[c.kind, link] = (runs + c.times, total + sent)
        return dict(sorted(table.items(), key=lambda item: -item[1][1]))


def account(text: str, slice_of: Sequence[int] | None = None) -> Account:
    """Counts a compiled module, as `compiled.as_text()` prints it.

    Args:
        slice_of: slice of each partition, in the order of the mesh's devices; None: one slice.

    Raises:
        PlanError: text that cannot be parsed.
    """
    module = Module(text)
    slices = np.zeros(module.devices, int) if slice_of is None else np.asarray(slice_of)
    return _Walk(module, slices).computation(module.entry, 1)


class _Walk:
    def __init__(self, module: Module, slices: np.ndarray):
        self.module, self.slices = module, slices

    def computation(self, computation: Computation, times: int) -> Account:
        total = Account()
        counted: set[tuple] = set()  # asynchronous collectives, whose parts are in several fusions
        for instruction in computation:
            total.hbm_bytes += times * self.traffic(computation, instruction)
            self.instruction(computation, instruction, times, total, counted)
        return total

    def instruction(self, computation, instruction: Instruction, times: int, total: Account, counted: set) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            trips = self.module.trip_count(computation, instruction)
            if trips is None:
                total.unknown.append(f"loop {instruction.name} without a constant trip count")
            inner = self.computation(self.module.computations[instruction.called["body"]], times * (trips or 1))
            _add(total, inner)
        elif opcode == "conditional":
            branches = [self.computation(self.module.computations[name], times) for name in instruction.branches()]
            _add(total, max(branches, key=lambda branch: (branch.flops, branch.hbm_bytes)))
        elif opcode == "fusion":
            self.fusion(self.module.computations[instruction.called["calls"]], times, total, counted)
        elif opcode in ("call", "call-start") or (opcode == "async-start" and "calls" in instruction.called):
            name = instruction.called["calls" if "calls" in instruction.called else "to_apply"]
            _add(total, self.computation(self.module.computations[name], times))
        elif opcode == "convolution":
            self.product(total, times * convolution_flops(computation, instruction))
        elif opcode == "dot":
            self.product(total, times * dot_flops(computation, instruction))
        elif kind := _collective(opcode):
            total.collectives.append(self.collective(computation, instruction, kind, times))
        elif opcode == "send":
            self.transfer(computation, instruction, times, total)
        elif is_kernel(instruction):
            run = kernel(self.module, computation, instruction)
            if run is None or run.note:
                total.unknown.append(
                    run.note if run else f"Pallas kernel {instruction.name} without a formula: 0 FLOPs"
                )
            flops = run.flops if run else 0
            total.kernel_flops += times * flops
            total.dense_flops += times * (run.dense_flops if run else 0)
            total.kernels.append((instruction.name, times, flops))

    def product(self, total: Account, flops: int) -> None:
        total.dot_flops += flops
        total.dense_flops += flops

    def fusion(self, inner: Computation, times: int, total: Account, counted: set) -> None:
        """Counts the body of a fusion: no traffic of its own, and only the start of an asynchronous collective."""
        starts = any('custom_call_target="AsyncCollectiveStart"' in i.attributes for i in inner)
        scatter = inner.root.opcode == "dynamic-slice" or inner.name.startswith(FUSED_SCATTER)
        for instruction in inner:
            kind = _collective(instruction.opcode)
            if kind is None:
                self.instruction(inner, instruction, times, total, counted)
                continue
            if starts or "chain_id=" in instruction.attributes or "async_collective_fusion" in instruction.attributes:
                # One collective is in three fusions: its start, what it overlaps with, and its end. They share channel
                # and chain, but permutes may share a channel too, so their pairs are part of the key.
                part = [instruction.attribute(name) for name in ("channel_id", "chain_id", "source_target_pairs")]
                key = (kind, *part, instruction.shapes)
                if key in counted and not starts:
                    continue
                if not starts and not self.is_first(inner, instruction):
                    continue
                counted.add(key)
            if kind == "all-reduce" and scatter:
                kind = FUSED_SCATTER
            total.collectives.append(self.collective(inner, instruction, kind, times))

    def is_first(self, inner: Computation, instruction: Instruction) -> bool:
        """Returns whether no other fusion starts this asynchronous collective, so that it is counted here."""
        channel = instruction.attribute("channel_id")
        for other in self.module.computations.values():
            if other is inner or not any("AsyncCollectiveStart" in i.attributes for i in other):
                continue
            if any(i.opcode == instruction.opcode and i.attribute("channel_id") == channel for i in other):
                return False
        return True

    def collective(self, computation, instruction: Instruction, kind: str, times: int) -> Collective:
        shapes = [computation.instructions[operand].shape for operand in instruction.operands]
        size = sum(shape.bytes for shape in shapes)
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs") or "")
            moved = [(int(a), int(b)) for a, b in pairs if a != b]
            members = moved[0] if moved else ()
            crossing = any(self.slices[a] != self.slices[b] for a, b in moved)
            group, slices = len({i for pair in moved for i in pair}), 1 + crossing
            ici, dcn = (0, size) if crossing else (size if moved else 0, 0)
        else:
            found = _GROUPS.search(instruction.attributes)
            groups = replica_groups(found[1] if found else None, self.module.devices)
            members = tuple(int(i) for i in max(groups, key=len))
            group = len(members)
            slices = max(len(set(self.slices[np.asarray(g)].tolist())) for g in groups)
            ici, dcn = ring_bytes(kind, size, group, slices)
        return Collective(kind, times, group, slices, size, times * ici, times * dcn, instruction.name, members)

    def transfer(self, computation, instruction: Instruction, times: int, total: Account) -> None:
        """Counts transfers between slices: the compiler emits them as a send and a recv on the hosts; one counts."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        if kind is None:
            return
        size = computation.instructions[instruction.operands[0]].shape.bytes
        target = re.search(r'_xla_megascale_target="\{([\d,]+)\}', instruction.attributes)
        slices = len(target[1].split(",")) if target else 2
        name = kind[1].lower().replace("_", "-")
        sent = ring_bytes(name if name in COLLECTIVES else "all-gather", size, slices)[0]
        total.collectives.append(Collective(name, times, slices, slices, size, 0, times * sent, instruction.name))

    def traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Returns the bytes that one run of an instruction moves between HBM and the chip's own memory."""
        opcode = instruction.opcode
        if opcode in _FREE:
            return 0
        operands = [computation.instructions[name] for name in instruction.operands]
        if is_kernel(instruction):
            run = kernel(self.module, computation, instruction)
            shapes = (*(o.shape for o in operands), *instruction.shapes)
            return run.hbm_bytes if run else sum(map(_hbm, shapes))
        if opcode == "custom-call":
            return 0  # markers such as AllocateBuffer and ConcatBitcast
        if opcode == "copy-start":
            return sum(map(_hbm, instruction.shapes[:2]))
        if opcode == "slice-start":  # (the whole operand), the slice, a flag
            piece = instruction.shapes[1]
            return _hbm(piece) + (piece.bytes if operands[0].shape.in_hbm else 0)
        if opcode == "dynamic-slice":
            return _hbm(instruction.shape) + (instruction.shape.bytes if operands[0].shape.in_hbm else 0)
        if opcode == "dynamic-update-slice":
            return _hbm(operands[1].shape) + (operands[1].shape.bytes if instruction.shape.in_hbm else 0)
        if opcode != "fusion":
            return sum(map(_hbm, instruction.shapes)) + sum(_hbm(o.shape) for o in operands if len(o.shapes) == 1)
        inner = self.module.computations[instruction.called["calls"]]
        read = sum(self.read(inner, inner.parameters[n].name) for n, o in enumerate(operands) if o.shape.in_hbm)
        outputs = [inner.root] if inner.root.opcode != "tuple" else [inner.instructions[n] for n in inner.root.operands]
        return read + sum(
            self.written(inner, out) for out, s in zip(outputs, instruction.shapes, strict=False) if s.in_hbm
        )

    def read(self, inner: Computation, name: str) -> int:
        """Returns the bytes that a fusion reads of one of its values: only the slices if it takes slices."""
        total, whole = 0, inner.instructions[name].shape.bytes
        for user in inner.users[name]:
            if user.opcode == "bitcast":
                total += self.read(inner, user.name)
            elif user.opcode == "fusion":
                nested = self.module.computations[user.called["calls"]]
                indices = [index for index, operand in enumerate(user.operands) if operand == name]
                total += sum(self.read(nested, nested.parameters[index].name) for index in indices)
            elif user.opcode == "dynamic-slice" and user.operands[0] == name:
                total += user.shape.bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:  # an update writes in place
                return whole
        return min(total, whole)

    def written(self, inner: Computation, output: Instruction) -> int:
        """Returns the bytes that a fusion writes of one of its results: only the slice if it updates one in place."""
        while output.opcode in ("bitcast", "copy", "convert") and output.operands:
            output = inner.instructions[output.operands[0]]
        if output.opcode == "fusion":
            nested = self.module.computations[output.called["calls"]]
            return self.written(nested, nested.root)
        if output.opcode == "dynamic-update-slice":
            return inner.instructions[output.operands[1]].shape.bytes
        return output.shape.bytes


def _hbm(shape: Shape) -> int:
    return shape.bytes if shape.in_hbm else 0


def _add(total: Account, part: Account) -> None:
    for one in fields(Account):
        setattr(total, one.name, getattr(total, one.name) + getattr(part, one.name))


def _collective(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def ring_bytes(kind: str, size: int, group: int, slices: int = 1) -> tuple[float, float]:
    """Returns the bytes that one chip sends in a collective: (over ICI, over DCN).

    On a ring of n chips an all-gather of a shard of b bytes sends (n-1) b, a reduce-scatter of b bytes (n-1)/n b, an
    all-reduce twice that. A group that spans k slices of m chips each runs in two steps: inside the slices over ICI,
    then over DCN between corresponding chips, which hold 1/m of it each.

    Args:
        size: size of one chip's operands in bytes.
    """
    if group <= 1:
        return 0.0, 0.0
    m = group // slices
    inside, between = (m - 1) / m, (slices - 1) / slices
    if kind in ("all-gather", "collective-broadcast"):
        return float(size * slices * (m - 1)), float(size * (slices - 1))
    if kind in ("reduce-scatter", FUSED_SCATTER):
        return size * inside, size / m * between
    if kind == "all-reduce":
        return 2 * size * inside, 2 * size / m * between
    return size * (m - 1) / group, size * between  # all-to-all: each chip keeps 1/group


def dot_flops(computation: Computation, instruction: Instruction) -> int:
    """Returns the FLOPs of an HLO dot; a multiply-add is two."""
    left = computation.instructions[instruction.operands[0]].shape
    contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
    return 2 * instruction.shape.size * math.prod(left.dims[int(axis)] for axis in contracted)


def convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """Returns the FLOPs of an HLO convolution, without products with padding or the holes of dilation.

    A TPU's matrix products are convolutions. Their batch dimensions are spatial dimensions, dilated so that each window
    meets one element. Counting whole windows would count a product for each pair of batch entries.
    """
    left, kernel = (computation.instructions[name].shape for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    lhs, rhs, out = labels[1], labels[2], labels[3]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (instruction.attribute("window") or "{}").strip("{}")))
    spatial = sorted(c for c in lhs if c.isdigit())
    pairs = 1
    for number, axis in enumerate(spatial):
        pick = lambda name, default, n=number: window[name].split("x")[n] if name in window else default  # noqa: E731
        low, _ = (int(p) for p in pick("pad", "0_0").split("_"))
        pairs *= _valid_pairs(
            inputs=left.dims[lhs.index(axis)],
            outputs=instruction.shape.dims[out.index(axis)],
            size=int(pick("size", "1")),
            stride=int(pick("stride", "1")),
            low=low,
            input_dilation=int(pick("lhs_dilate", "1")),
            window_dilation=int(pick("rhs_dilate", "1")),
        )
    batch = left.dims[lhs.index("b")] // int(instruction.attribute("batch_group_count") or 1)
    return 2 * pairs * batch * kernel.dims[rhs.index("i")] * kernel.dims[rhs.index("o")]


def _valid_pairs(inputs, outputs, size, stride, low, input_dilation, window_dilation) -> int:
    """Returns the number of (output, window) position pairs that meet a real input element, along one axis."""
    if size == 1 and low == 0 and input_dilation == 1:
        return outputs
    starts = np.arange(outputs) * stride - low
    total = 0
    for offset in range(size):
        at = starts + offset * window_dilation
        total += int(((at >= 0) & (at % input_dilation == 0) & (at // input_dilation < inputs)).sum())
    return total
