"""The controlled study of projectors: every config of configs/projectors with several seeds, in one table and one plot.

    python benchmarks/projectors.py [--seeds 3] [--projectors linear mlp ...] [--runs runs/projectors] [--plot F.svg]

Each run is `mllm train` in its own process; finished runs are not repeated. Encoder and LLM are trained once; all runs
freeze this encoder and start from this LLM. Seeds change the projector's initial values and the order of the examples,
not the questions. The table has the mean over seeds and, after +-, half the spread between the best and the worst. A
second table lists claims of the literature about these projectors and whether they hold here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs" / "projectors"
PROJECTORS = ("linear", "mlp", "resampler", "qformer", "qformer_stage1", "pformer")
# The order of the columns: task -> name.
TASKS = {"naming": "naming", "top_left": "top left", "number": "counting", "text": "small text"}
COLOURS = ("#4878a8", "#e8894a", "#5fa55a", "#b4525a")

Scores = dict[str, dict[str, list[float]]]  # projector -> task -> accuracy of each seed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--projectors", nargs="+", choices=PROJECTORS, default=list(PROJECTORS))
    parser.add_argument("--runs", type=Path, default=Path("runs/projectors"))
    parser.add_argument("--plot", type=Path, default=Path("runs/projectors/study.svg"))
    return parser.parse_args()


def run(projector: str, seed: int, folder: Path) -> dict[str, float]:
    """Returns {task: accuracy} of a run; trains it if it is missing, and resumes it if it was stopped."""
    results = folder / "results.json"
    if not results.exists():
        start = time.perf_counter()
        command = [sys.executable, "-m", "mllm_jax.cli", "train", str(CONFIGS / f"{projector}.py")]
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            done = subprocess.run([*command, "--seed", str(seed), "--run-dir", str(folder)], stdout=out, stderr=out)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: see {log}")
        print(f"{projector}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    found = json.loads(results.read_text())
    return {task.rpartition("/")[2]: figures["accuracy"] for task, figures in found.items()}


def table(scores: Scores) -> str:
    lines = ["| projector | " + " | ".join(TASKS.values()) + " |", "|---|" + "---|" * len(TASKS)]
    for projector, tasks in scores.items():
        cells = [f"{100 * statistics.mean(v):.1f} ± {50 * (max(v) - min(v)):.1f}" for v in (tasks[t] for t in TASKS)]
        lines.append(f"| {projector} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims(scores: Scores) -> list[str]:
    """Returns claims of the literature about these projectors, each with the two figures and whether it holds.

    A claim holds if the worst seed of the one is better than the best seed of the other; overlaps are undecided.
    """
    stated = [
        ("MLP >= linear (LLaVA-1.5, arXiv 2310.03744)", "mlp", "linear", tuple(TASKS)),
        ("a Q-Former is worse than an MLP on position (arXiv 2312.06742)", "mlp", "qformer", ("top_left",)),
        ("a Q-Former is worse than an MLP on small text (arXiv 2312.06742)", "mlp", "qformer", ("text",)),
        ("a resampler is worse than an MLP on position (arXiv 2312.06742)", "mlp", "resampler", ("top_left",)),
        ("stage 1 closes the gap (BLIP-2, arXiv 2301.12597)", "qformer_stage1", "qformer", tuple(TASKS)),
        ("a P-Former's prompts help (arXiv 2307.07063)", "pformer", "qformer", tuple(TASKS)),
    ]
    lines = []
    for claim, better, worse, tasks in stated:
        if not {better, worse} <= set(scores):
            continue
        for task in tasks:
            ours, theirs = scores[better][task], scores[worse][task]
            means = [100 * statistics.mean(values) for values in (ours, theirs)]
            clear = "holds" if min(ours) > max(theirs) else "does not hold" if max(ours) < min(theirs) else "undecided"
            lines.append(f"| {claim} | {TASKS[task]} | {better} {means[0]:.1f}, {worse} {means[1]:.1f} | {clear} |")
    return ["| claim | task | mean accuracy | in this study |", "|---|---|---|---|", *lines]


def plot(scores: Scores) -> str:
    """Returns an SVG: a group of bars for each projector, a bar for each task, a dot for each seed."""
    group, bar, height, left, top = 128, 24, 220, 40, 34
    width = left + group * len(scores) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + top + 28}" font-family="sans-serif" '
        'font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for percent in range(0, 101, 20):
        y = top + height * (1 - percent / 100)
        parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{percent}</text>')
    for column, (name, colour) in enumerate(zip(TASKS.values(), COLOURS, strict=True)):
        x = left + 110 * column
        parts.append(
            f'<rect x="{x}" y="8" width="11" height="11" fill="{colour}"/><text x="{x + 16}" y="18">{name}</text>'
        )
    for place, (projector, tasks) in enumerate(scores.items()):
        start = left + group * place + (group - bar * len(TASKS)) / 2
        for column, (task, colour) in enumerate(zip(TASKS, COLOURS, strict=True)):
            x, mean = start + bar * column, statistics.mean(tasks[task])
            y = top + height * (1 - mean)
            parts.append(
                f'<rect x="{x + 2}" y="{y:.1f}" width="{bar - 4}" height="{height * mean:.1f}" fill="{colour}"/>'
            )
            for value in tasks[task]:
                y = top + height * (1 - value)
                parts.append(f'<circle cx="{x + bar / 2}" cy="{y:.1f}" r="2.5" fill="none" stroke="#222"/>')
        middle = left + group * (place + 0.5)
        parts.append(f'<text x="{middle}" y="{top + height + 16}" text-anchor="middle">{projector}</text>')
    return "".join([*parts, "</svg>\n"])


def main() -> None:
    options = arguments()
    scores: Scores = {}
    for seed in range(options.seeds):
        for projector in options.projectors:
            found = run(projector, seed, options.runs / f"{projector}-{seed}")
            for task in TASKS:
                scores.setdefault(projector, {}).setdefault(task, []).append(found[task])
    print(f"\naccuracy in %, mean of {options.seeds} seeds ± half their spread\n\n{table(scores)}\n")
    print("\n".join(claims(scores)))
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    options.plot.write_text(plot(scores))
    print(f"\n{options.plot}")


if __name__ == "__main__":
    main()
