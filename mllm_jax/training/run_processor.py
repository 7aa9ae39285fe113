"""The processor of a run: kept in its folder, whoever made its tokenizer; and a folder to leave with."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.hf import copy_companions
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.data.chat import PROCESSORS_TEMPLATE
from mllm_jax.data.pipeline import training_texts
from mllm_jax.data.tokenizer import TEMPLATE, Tokenizer
from mllm_jax.errors import ConfigError
from mllm_jax.models.processor import Processor
from mllm_jax.models.registry import save_pretrained
from mllm_jax.models.run_weights import load_run
from mllm_jax.sharding.hosts import first_alone
from mllm_jax.training.config import Experiment, require_vocabulary
from mllm_jax.training.pretrained import require_words


def prepare_processor(experiment: Experiment, run: RunFolder) -> Processor:
    """The processor that the run holds, or that is made for it: read from a folder, or with a tokenizer trained here.

    Raises:
        ConfigError: a named model without a folder, or a tokenizer that the model's embeddings do not hold.
    """
    first_alone(partial(_write, experiment, run))
    processor = Processor.of_run(run, experiment)
    if processor.family is None:
        require_vocabulary(experiment, processor.tokenizer.vocab_size)
        require_words(experiment, processor.tokenizer)
    return processor


def _write(experiment: Experiment, run: RunFolder) -> None:
    if run.processor_folder.is_dir():
        return
    temporary = run.processor_folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config = experiment.tokenizer
    if config.folder is not None:
        copy_companions(Path(config.folder), temporary)
    elif Processor.family_of(experiment.model) is not None:
        raise ConfigError(
            f"a {experiment.model.family} without TokenizerConfig(folder=...)",
            "the folder that has its tokenizer, chat template and preprocessor_config.json",
            "name the checkpoint's folder there",
        )
    else:
        _tokenizer(experiment).save(temporary)
    if config.template is not None:
        # What is trained leaves with the template that it was trained with.
        (temporary / PROCESSORS_TEMPLATE).unlink(missing_ok=True)
        (temporary / TEMPLATE).write_text(config.template, "utf-8")
    temporary.rename(run.processor_folder)


def _tokenizer(experiment: Experiment) -> Tokenizer:
    """The one that the config names, or one trained on the stages' text."""
    config = experiment.tokenizer
    if config.path is not None:
        return Tokenizer.load(Path(config.path))
    sources = {repr(describe(w.source)): w.source for stage in experiment.stages for w in stage.data.sources}
    built = [source.build() for _, source in sorted(sources.items())]
    return Tokenizer.train(training_texts(built), experiment.vocab_size, config.phrases)


def export_run(run: RunFolder, target: Path, *, dtype: Any = None, overwrite: bool = False) -> None:
    """Writes a named model that a run trained as a Hugging Face folder.

    Raises:
        ConfigError: a run of a model without a family; CheckpointError: a folder that is taken.
    """
    _, model, params, _, _ = load_run(run)
    folder = run.processor_folder
    companions = folder if folder.is_dir() else None
    save_pretrained(model, params, target, companions=companions, dtype=dtype, overwrite=overwrite)
