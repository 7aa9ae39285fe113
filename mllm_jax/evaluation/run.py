"""The evaluation of a run folder: results.json, examples.json, report.html and the table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.evaluate import evaluate
from mllm_jax.evaluation.report import write_report
from mllm_jax.inference.generate import Generator
from mllm_jax.training.loop import load_run
from mllm_jax.training.run_folder import RunFolder, write_json


def evaluate_run(
    run_dir: Path,
    *,
    tasks: Sequence[str] | None = None,
    devices: Sequence[jax.Device] | None = None,
    batch_size: int = 64,
) -> dict:
    """Evaluates a run by its own config and writes what it finds into the folder.

    Args:
        tasks: only these; None: all that the config's evaluation has.

    Raises:
        ConfigError: the config has no evaluation, or none of these tasks.
    """
    folder = RunFolder(Path(run_dir))
    experiment, model, params, tokenizer, mesh = load_run(folder, devices)
    if experiment.evaluation is None:
        raise ConfigError(f"{run_dir}: a config without evaluation", "an `evaluation` in it", "add one and run again")
    splits = experiment.evaluation.questions()
    if tasks is not None:
        known = sorted({q.task for questions in splits.values() for q in questions})
        unknown = sorted(set(tasks) - set(known))
        if unknown:
            raise ConfigError(f"tasks {unknown}", f"some of {known}", "change --tasks")
        splits = {name: [q for q in questions if q.task in tasks] for name, questions in splits.items()}
    generator = Generator(model, params, tokenizer, mesh, batch_size=batch_size)
    results, examples = evaluate(generator, splits)
    write_json(folder.path / "results.json", results)
    write_json(folder.path / "examples.json", examples)
    write_report(folder.path)
    return results
