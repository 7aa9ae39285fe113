"""The planner's step time against published measurements, with one fitted factor per generation of chips.

    python benchmarks/plan_calibration.py [--runs llama31_8b@v6e-256 ...] [--again]
    python benchmarks/plan_calibration.py --print

Each published run is compiled ahead of time (`mllm plan` on configs/plans/), which gives a bound: the slowest of
computing, HBM and network at their peak rates. A generation's factor is the geometric mean of bound / measured over its
runs; the predicted time is bound / factor. The factors are in mllm_jax/sharding/chips.py as `efficiency`, which is not
used here. Results are kept in benchmarks/plan_calibration.json.

The measured runs are MaxText's: configs/v5e/README.md and configs/v5p/README.md of AI-Hypercomputer/maxtext for the 16B
and 32B, its benchmark recipes' tokens/s/chip for the others. Their TFLOP/s count all attention blocks (before July
2025).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from plan_table import read, run_plan, write

from mllm_jax.layers.stack import REMAT_POLICIES

OUT = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
        rows: rows per chip.
        seconds: published seconds of a step, or None with `tflops`.
        tflops: model TFLOP/s a chip with all attention blocks; our count of the model's FLOPs converts them to seconds.
        setup: how it was run, if that differs from what is compiled here.
        options: other options of `mllm plan`.
    """

    rows: int
    seconds: float | None
    tflops: float | None
    setup: str
    options: tuple[str, ...] = ()


LLM = "--model.llm.remat"
OFFLOAD = (LLM, "offload" if "offload" in REMAT_POLICIES else "full")
RUNS = {
    "maxtext_16b@v5e-256": Run(6, None, 120, "full remat, as here"),
    "maxtext_32b@v5e-256": Run(4, None, 132, "full remat, as here", ("--mesh.tensor", "1", LLM, "full")),
    "maxtext_32b@v5p-128": Run(
        6, None, 328, "minimal remat: every product kept, as here, but in two pieces", ("--stages.0.accumulate", "2")
    ),
    "llama2_70b@v5p-1024": Run(4, 4 * 4096 / 692, None, "keeps all products but the MLP's first; full remat here"),
    "llama31_8b@v6e-256": Run(
        4, 4 * 8192 / 7207, None, "q, k, v, out and inputs offloaded; inputs alone here", OFFLOAD
    ),
    "llama31_70b@v6e-256": Run(4, 4 * 8192 / 960, None, "q, k, v and inputs offloaded; inputs alone here", OFFLOAD),
}


def make(names, again: bool) -> None:
    from mllm_jax.planning.topologies import topology

    for name in names:
        if name in read(OUT) and not again:
            continue
        config, where = name.split("@")
        run, chips = RUNS[name], topology(where).chips
        plan = run_plan(
            f"configs/plans/{config}.py", where, "--stages.0.data.rows", str(run.rows * chips), *run.options
        )
        print(name, plan.get("error", plan.get("times")), f"{plan['seconds']:.0f} s", flush=True)
        write(OUT, read(OUT) | {name: plan})


def measured(run: Run, plan: dict) -> float:
    """Returns the seconds of a published step."""
    return run.seconds if run.seconds is not None else plan["flops"] / plan["chips"] / (run.tflops * 1e12)


def factors(rows: dict) -> dict[str, float]:
    """Returns generation -> geometric mean of bound / measured."""
    logs: dict[str, list[float]] = {}
    for name, plan in rows.items():
        if plan.get("times"):
            ratio = plan["times"]["overlapped"] / measured(RUNS[name], plan)
            logs.setdefault(_generation(name), []).append(math.log(ratio))
    return {generation: math.exp(sum(each) / len(each)) for generation, each in logs.items()}


def _generation(name: str) -> str:
    return name.split("@")[1].split("-")[0]


def table(rows: dict) -> str:
    """Returns the rows in Markdown."""
    lines = [
        "| run | how it was run | measured s | compute, HBM, network s | bound s | factor | predicted s | off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = factors(rows)
    for name in RUNS:
        plan, run = rows.get(name), RUNS[name]
        if plan is None or "error" in plan:
            lines.append(f"| {name} | {run.setup} | {'not run' if plan is None else 'failed'} | | | | | |")
            continue
        truth = measured(run, plan)
        if not plan["times"]:
            lines.append(f"| {name} | {run.setup} | {truth:.2f} | does not fit as compiled here | | | | |")
            continue
        times, factor = plan["times"], found[_generation(name)]
        bound = times["overlapped"]
        parts = f"{times['compute']:.2f}, {times['hbm']:.2f}, {times['ici']:.2f}"
        predicted = bound / factor
        fits = "" if plan["fits"] else " (over HBM)"
        lines.append(
            f"| {name}{fits} | {run.setup} | {truth:.2f} | {parts} | {bound:.2f} | {factor:.3f} | {predicted:.2f} | "
            f"{predicted / truth - 1:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--again", action="store_true", help="compile existing rows again")
    parser.add_argument("--print", action="store_true", help="print the table of existing rows")
    options = parser.parse_args()
    if not options.print:
        make(options.runs, options.again)
    print(table(read(OUT)))
    print(
        "efficiency, for sharding/chips.py: " + ", ".join(f"{name} {f:.3f}" for name, f in factors(read(OUT)).items())
    )


if __name__ == "__main__":
    main()
