"""`mllm convert`: converts a model folder into another format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mllm_jax.checkpoints.run import RunFolder, is_run
from mllm_jax.errors import ConfigError, TrainingError


@dataclass(frozen=True)
class Convert:
    """Writes a model folder in the other format, or in another dtype, and proves that nothing was lost.

    It also copies the tokenizer, the chat template and the generation settings.

    Attributes:
        source: a Hugging Face folder (config.json, safetensors), a native one, or a run that trained a named model.
        target: the folder to write.
        to: the format to write; default: the one that the source does not have.
        dtype: of the stored parameters; default: as in the source.
        overwrite: replace an existing model.
    """

    source: tyro.conf.Positional[Path]
    target: tyro.conf.Positional[Path]
    to: Literal["native", "huggingface"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    overwrite: bool = False


def run(arguments: list[str]) -> int:
    options = tyro.cli(Convert, args=arguments, prog="mllm convert")

    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and the host has the most memory

    if is_run(options.source):
        run = RunFolder(options.source)
        _check_run(run)

        from mllm_jax.training.run_processor import export_run

        export_run(run, options.target, dtype=options.dtype, overwrite=options.overwrite)
        print(f"{run.path} written to {options.target} as a Hugging Face folder")
        return 0

    from mllm_jax.models.convert import convert

    convert(options.source, options.target, to=options.to, dtype=options.dtype, overwrite=options.overwrite, say=print)
    return 0


def _check_run(run: RunFolder) -> None:
    """Refuses a run that cannot be written as a folder, before any weights are read."""
    experiment = run.experiment()
    if getattr(experiment.model, "family", None) is None:
        raise ConfigError(
            f"{run.path}, a run of a {type(experiment.model).__name__} that was composed here",
            "a run that trains a named model, such as LLaVA: other programs support no others",
            f"use the run itself: mllm generate {run.path}, mllm embed {run.path}, or mllm_jax.load_run in Python",
        )
    if not run.is_trained():
        raise TrainingError(f"{run.path}: no stage is finished", "a run with a finished stage", "train it further")
