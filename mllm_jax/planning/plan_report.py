"""Printing of a plan on one screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mllm_jax.planning.plan import Plan
from mllm_jax.sharding.chips import GIB

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def show(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    for part in render(plan):
        console.print(part)


def render(plan: Plan) -> list[RenderableType]:
    """Returns the parts of the screen: verdict, memory, FLOPs, collectives, times, notes, advice."""
    from rich.columns import Columns
    from rich.markup import escape

    parts: list[RenderableType] = [_headline(plan), _verdict(plan)]
    tables = [_memory(plan), _flops(plan)]
    if plan.times is not None:
        tables += [_collectives(plan), _times(plan)]
    parts.append(Columns(tables, padding=(0, 2)))
    parts += [f"[dim]note:[/] {escape(note)}" for note in plan.notes]
    parts += [f"[bold]to do:[/] {escape(line)}" for line in plan.advice]
    return parts


def show_search(plans: Sequence[Plan], tried: Sequence[Plan], console: Console) -> None:
    """Prints the best plans of a search, and those that did not fit."""
    from rich.table import Table

    table = Table("mesh", "rows", "pieces", "remat", "HBM GiB", "bound", "step s", "tokens/s/chip", "MFU", title="Best")
    for plan in plans:
        table.add_row(*_row(plan))
    console.print(table)
    for plan in tried:
        if not plan.fits:
            row = _row(plan)
            console.print(f"[dim]does not fit:[/] mesh {row[0]}, {row[2]} piece(s), remat {row[3]}: needs {row[4]} GiB")


def _row(plan: Plan) -> tuple[str, ...]:
    peak = plan.memory.peak
    where = (mesh_name(plan), str(plan.rows), str(plan.accumulate), plan.remat, _gib(peak) if peak else "more")
    if plan.times is None:
        return (*where, "", "", "", "")
    seconds = plan.times.expected
    speed = f"{plan.tokens / seconds / plan.chips:,.0f}"
    return (*where, plan.times.bound, f"{seconds:.3g}", speed, f"{plan.mfu(seconds):.1%}")


def mesh_name(plan: Plan) -> str:
    """Returns the axes of the mesh that are longer than 1, such as "fsdp 64 x tensor 4"."""
    return " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"


def _headline(plan: Plan) -> str:
    a_device = plan.rows / plan.devices * plan.mesh["tensor"] * plan.mesh["context"]
    pieces = f" in {plan.accumulate} pieces" if plan.accumulate > 1 else ""
    return (
        f"[bold]{plan.config}[/], stage [bold]{plan.stage}[/] on [bold]{plan.topology}[/] "
        f"({plan.chips} chips, {plan.devices} devices; {mesh_name(plan)}): {plan.rows} rows of {plan.length}{pieces}, "
        f"{a_device:g} a device; remat {plan.remat}"
    )


def _verdict(plan: Plan) -> str:
    memory = plan.memory
    if plan.fits is None:
        return (
            f"[yellow]may fit[/]: parameters and optimizer take {_gib(memory.state)} of {_gib(memory.available)} GiB a "
            "device; the memory of activations is not known without compiling"
        )
    if not plan.fits:
        needed = memory.peak if memory.peak is not None else memory.state if memory.state > memory.available else None
        over = f"needs {_gib(needed)} GiB a device of {_gib(memory.available)}" if needed else "the compiler refuses it"
        return f"[bold red]does not fit[/]: {over}"
    spare = _gib(memory.available - memory.peak)
    return (
        f"[bold green]fits[/]: {_gib(memory.peak)} of {_gib(memory.available)} GiB a device, {spare} GiB to spare; "
        f"compiled in {plan.compile_seconds:.0f} s, traced in {plan.lower_seconds:.0f} s"
    )


def _memory(plan: Plan):
    table = _table("HBM of a device", "GiB")
    memory = plan.memory
    rows = [("trained parameters", memory.parameters), ("frozen parameters", memory.frozen)]
    rows += [("optimizer", memory.optimizer), ("batch", memory.batch)]
    rows += [("activations, gradients, ...", memory.temporaries), ("peak", memory.peak), ("usable", memory.available)]
    for name, size in rows:
        table.add_row(name, "-" if size is None else _gib(size))
    return table


def _flops(plan: Plan):
    table = _table("FLOPs a step", "forward T", "backward T")
    for part, flops in plan.model_flops.items():
        table.add_row(part, _tera(flops.forward), _tera(flops.backward) if flops.backward else "frozen")
    table.add_row("[bold]model", f"[bold]{_tera(plan.flops)}", "")
    if plan.dense_flops is not None:
        word = "compiled" if plan.compiled else "estimated"
        table.add_row(f"{word}, attention whole", _tera(plan.dense_flops), f"x{plan.recompute:.3f}")
        if plan.compiled_flops != plan.dense_flops:
            table.add_row(f"{word}, blocks skipped", _tera(plan.compiled_flops), "")
    return table


def _collectives(plan: Plan):
    table = _table("sent by a device a step", "over", "runs", "GB")
    for kind, link, runs, sent in plan.collectives:
        table.add_row(kind, link if plan.compiled or link == "DCN" else "NVLink", f"{runs:,}", f"{sent / 1e9:.3f}")
    if not plan.collectives:
        table.add_row("nothing", "", "", "")
    return table


def _times(plan: Plan):
    table = _table("a step", "s", "MFU")
    times = plan.times
    names = {"compute": "computing", "hbm": "HBM", "ici": "ICI" if plan.compiled else "NVLink", "dcn": "DCN"}
    for name, title in names.items():
        seconds = getattr(times, name)
        if seconds or name != "dcn":
            mark = "[bold]" if name == times.bound else ""
            table.add_row(f"{mark}{title} alone", f"{seconds:.4g}", "")
    table.add_row("all overlapped", f"{times.overlapped:.4g}", f"{plan.mfu(times.overlapped):.1%}")
    table.add_row("nothing overlapped", f"{times.serial:.4g}", f"{plan.mfu(times.serial):.1%}")
    if times.efficiency < 1:
        expected = times.expected
        title = f"expected, {times.efficiency:.0%} of the bound"
        table.add_row(title, f"{expected:.4g}", f"{plan.mfu(expected):.1%}")
    table.add_row("tokens/s/chip", f"{plan.tokens / times.expected / plan.chips:,.0f}", "")
    return table


def _table(title: str, *columns: str):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.4g}"
