"""The cost of the named models on TPU slices, each compiled with `mllm plan`: memory, collectives, roofline.

    python benchmarks/plan_table.py [--models llava15_7b:align ...] [--slices v5e-256 ...] [--rescue 4] [--again]
    python benchmarks/plan_table.py --print

Rows are made one at a time, each in its own process, and kept in benchmarks/plan_table.json; existing rows are skipped
without --again. `--print` prints the table in Markdown. fsdp gets as many devices of a slice as divide the rows and the
parameters' sizes, data and tensor get the rest. If a step does not fit, `mllm plan --search` tries up to --rescue
others and adds the fastest that fits. No TPU is needed; a row takes one to five minutes of two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).with_suffix(".json")
SLICES = ("v5e-256", "v5p-128", "v6e-256", "v7x-128")
MODELS = {
    "llava15_7b:align": "configs/llava15_7b.py",
    "llava15_7b:instruct": "configs/llava15_7b.py",
    "internvl3_8b:finetune": "configs/internvl3_8b.py",
    "qwen25vl_7b:instruct": "configs/qwen25vl_7b.py",
    "qwen2_audio_7b:instruct": "configs/qwen2_audio_7b.py",
    "instructblip_vicuna7b:instruct": "configs/instructblip_vicuna7b.py",
    "internvl25_78b:finetune": "configs/internvl25_78b.py",
}


def run_plan(config: str, topology: str, *options: str) -> dict:
    """Runs `mllm plan` in its own process; returns its figures and the command's "seconds", or {"error": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "mllm_jax.cli", "plan", config, "--topology", topology, "--json", str(file)]
        began = time.monotonic()
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
        seconds = time.monotonic() - began
        if not file.is_file():
            return {"error": done.stderr.strip()[-2000:], "seconds": seconds}
        return json.loads(file.read_text()) | {"seconds": seconds}


def mesh_options(experiment, stage: int, devices: int) -> list[str]:
    """Returns fsdp over as many devices as divide the rows and the parameters' sizes, and tensor over the rest."""
    from mllm_jax.planning.arithmetic import dividing_fsdp
    from mllm_jax.sharding.mesh import MeshConfig

    most = math.gcd(experiment.stages[stage].data.rows, devices)
    fsdp = dividing_fsdp(experiment, stage, MeshConfig(1, most, 1, devices // most))
    sizes = {"data": most // fsdp, "fsdp": fsdp, "context": 1, "tensor": devices // most}
    return [part for axis, size in sizes.items() for part in (f"--mesh.{axis}", str(size))]


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def make(models, slices, rescue: int, again: bool) -> None:
    from mllm_jax.planning.plan import stage_index
    from mllm_jax.planning.topologies import topology
    from mllm_jax.training.config_file import load_config

    for name in models:
        experiment, stage = load_config(ROOT / MODELS[name]), name.split(":")[1]
        index = stage_index(experiment, stage)
        for where in slices:
            key = f"{name} {where}"
            if key in read(OUT) and not again:
                continue
            devices = topology(where).devices
            plan = run_plan(MODELS[name], where, "--stage", stage, *mesh_options(experiment, index, devices))
            print(key, verdict(plan), f"{plan['seconds']:.0f} s", flush=True)
            if plan.get("fits") is False and rescue:
                plan["rescue"] = run_plan(MODELS[name], where, "--stage", stage, "--search", str(rescue))
                print("   instead:", verdict(plan["rescue"]), f"{plan['rescue']['seconds']:.0f} s", flush=True)
            write(OUT, read(OUT) | {key: plan})


def verdict(plan: dict) -> str:
    if "error" in plan:
        return f"failed: {plan['error'].splitlines()[-1] if plan['error'] else 'no message'}"
    return f"fits, {mesh_of(plan)}" if plan["fits"] else f"does not fit, {mesh_of(plan)}"


def mesh_of(plan: dict) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    pieces = f", {plan['accumulate']} pieces" if plan["accumulate"] > 1 else ""
    return f"{axes}{pieces}, remat {plan['remat']}"


def table(rows: dict) -> str:
    """Returns the rows in Markdown."""
    lines = [
        "| model:stage, slice | mesh | rows x length | state, peak of usable GiB | model PFLOP, compiled | "
        "sent GB a step: all-gather, all-reduce, scattered | bound | MFU overlapped, serial | compile s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, plan in sorted(rows.items()):
        lines.append(_line(key, plan))
        if "rescue" in plan and "error" not in plan["rescue"] and plan["rescue"]["fits"]:
            lines.append(_line(f"{key}, changed", plan["rescue"]))
    return "\n".join(lines)


def _line(key: str, plan: dict) -> str:
    if "error" in plan:
        return f"| {key} | failed: {plan['error'].splitlines()[0] if plan['error'] else ''} | | | | | | | |"
    memory = plan["memory"]
    gib = {name: f"{value / 2**30:.2f}" if value is not None else "more" for name, value in memory.items()}
    size = f"{gib['state']}, {gib['peak']} of {gib['available']}"
    shape = f"{plan['rows']} x {plan['length']}"
    if plan["times"] is None:
        return f"| {key} | {mesh_of(plan)} | {shape} | {size}: does not fit | {plan['flops'] / 1e15:.1f} | | | | |"
    sent: dict[str, float] = {}
    for kind, _, _, nbytes in plan["collectives"]:
        sent[kind] = sent.get(kind, 0) + nbytes / 1e9
    scattered = sent.get("all-reduce-scatter", 0) + sent.get("reduce-scatter", 0)
    wire = f"{sent.get('all-gather', 0):.1f}, {sent.get('all-reduce', 0):.1f}, {scattered:.1f}"
    mfu = f"{plan['mfu']['overlapped']:.1%}, {plan['mfu']['serial']:.1%}"
    flops = f"{plan['flops'] / 1e15:.1f}, x{plan['recompute']:.3f}"
    fits = "" if plan["fits"] else ": does not fit"
    return (
        f"| {key} | {mesh_of(plan)} | {shape} | {size}{fits} | {flops} | {wire} | {plan['times']['bound']} | {mfu} | "
        f"{plan['compile_seconds']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--slices", nargs="+", default=list(SLICES))
    parser.add_argument("--rescue", type=int, default=4, help="plans to try if one does not fit")
    parser.add_argument("--again", action="store_true", help="make existing rows again")
    parser.add_argument("--print", action="store_true", help="print the table of existing rows")
    options = parser.parse_args()
    if not options.print:
        make(options.models, options.slices, options.rescue, options.again)
    print(table(read(OUT)))


if __name__ == "__main__":
    main()
