"""Training named models, such as LLaVA, from their checkpoints: their own processor, and a folder to leave with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mllm_jax.checkpoints.hf import copy_companions
from mllm_jax.data.chat import PROCESSORS_TEMPLATE, ChatTokenizer
from mllm_jax.errors import ConfigError
from mllm_jax.models.dialogue import DialogueEncoder
from mllm_jax.models.processor import Processor
from mllm_jax.models.registry import family_of_config, has_layout, save_pretrained
from mllm_jax.training.config import Experiment
from mllm_jax.training.operations.run_folder import RunFolder


def dialogues_of(experiment: Experiment, run: RunFolder) -> DialogueEncoder | None:
    """What lays a named model's conversations out; None for a model with a tokenizer of the run.

    The tokenizer's and processor's files are copied into the run folder once and read from there.

    Raises:
        ConfigError: no folder is named in `experiment.tokenizer`.
    """
    if not has_layout(experiment.model):
        return None
    source = experiment.tokenizer.folder
    if source is None and not run.processor_folder.is_dir():
        raise ConfigError(
            f"a {experiment.model.family} without TokenizerConfig(folder=...)",
            "the folder that has its tokenizer, chat template and preprocessor_config.json",
            "name the checkpoint's folder there",
        )
    if not run.processor_folder.is_dir():
        temporary = run.processor_folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        copy_companions(Path(source), temporary)
        if experiment.tokenizer.template is not None:
            # What is trained leaves with the template that it was trained with.
            (temporary / PROCESSORS_TEMPLATE).unlink(missing_ok=True)
            (temporary / "chat_template.jinja").write_text(experiment.tokenizer.template, "utf-8")
        temporary.rename(run.processor_folder)
    return DialogueEncoder(processor_of(experiment, run), experiment.tokenizer.system)


def processor_of(experiment: Experiment, run: RunFolder) -> Processor:
    """The processor of a named model that a run trains."""
    folder = run.processor_folder
    layout = family_of_config(experiment.model).layout(experiment.model, folder)
    return Processor(experiment.model, ChatTokenizer.load(folder), layout)


def export_run(run: RunFolder, target: Path, *, dtype: Any = None, overwrite: bool = False) -> None:
    """Writes a named model that a run trained as a Hugging Face folder.

    Raises:
        ConfigError: a run of a model without a family; CheckpointError: a folder that is taken.
    """
    from mllm_jax.training.weights import load_run

    _, model, params, _, _ = load_run(run)
    folder = run.processor_folder
    companions = folder if folder.is_dir() else None
    save_pretrained(model, params, target, companions=companions, dtype=dtype, overwrite=overwrite)
