"""The processor of a run, kept in its folder; and the export of a run as a Hugging Face folder."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.data.chat_tokenizer import PROCESSORS_TEMPLATE, ChatTokenizer
from mllm_jax.data.image_settings import SETTINGS, has_settings
from mllm_jax.data.pipeline import training_texts
from mllm_jax.data.tokenizer import TEMPLATE, Tokenizer
from mllm_jax.errors import ConfigError
from mllm_jax.models.companions import copy_for
from mllm_jax.models.output import captions_folder, names_of_signals
from mllm_jax.models.processor import Processor
from mllm_jax.models.protocol import produced
from mllm_jax.models.registry import save_pretrained
from mllm_jax.models.run_weights import load_run
from mllm_jax.models.vocabulary import check_placeholder, placeholder_fields
from mllm_jax.sharding.hosts import first_alone
from mllm_jax.training.config import Experiment, require_vocabulary
from mllm_jax.training.own_tokenizer import own_tokenizer_of, words_source
from mllm_jax.training.pretrained import require_words


def prepare_processor(experiment: Experiment, run: RunFolder) -> Processor:
    """Reads the run's processor, or makes it: from a model's folder, or with a tokenizer trained here.

    Raises:
        ConfigError: a named model without a folder, or a tokenizer with more ids than the model's embeddings.
    """
    first_alone(partial(_write, experiment, run))
    processor = Processor.of_run(run, experiment)
    for name in placeholder_fields(experiment.model):
        token = getattr(experiment.model, name)
        kind = name.removesuffix("_token_id")
        check_placeholder(processor.tokenizer, kind, token, str(experiment.tokenizer.folder))
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
    config, model = experiment.tokenizer, experiment.model
    named = Processor.family_of(model) is not None
    if config.folder is None and named:
        raise ConfigError(
            f"a {model.family} without TokenizerConfig(folder=...)",
            "the folder that has its tokenizer, chat template and preprocessor_config.json",
            "name the checkpoint's folder there",
        )
    if config.folder is None:
        _tokenizer(experiment).save(temporary)
    elif (source := words_source(experiment)) is not None:
        copy_for(model, Path(source.folder), temporary)
        for path in temporary.iterdir():
            if path.name not in SETTINGS:
                path.unlink() if path.is_file() else shutil.rmtree(path)
        own_tokenizer_of(experiment, source).save(temporary)
    else:
        copy_for(model, Path(config.folder), temporary)
        if signals := _signals(experiment):
            tokenizer = ChatTokenizer.load(temporary)
            tokenizer.backend.add_special_tokens({"additional_special_tokens": list(signals)}, False)
            tokenizer.save(temporary)
        if named and not has_settings(temporary):
            _require_no_settings(model, temporary, config.folder)
    if config.template is not None:
        # The exported model has the template that it was trained with.
        (temporary / PROCESSORS_TEMPLATE).unlink(missing_ok=True)
        (temporary / TEMPLATE).write_text(config.template, "utf-8")
    _copy_caption_tokenizers(experiment, temporary)
    temporary.rename(run.processor_folder)


def _require_no_settings(model: Any, folder: Path, named: str) -> None:
    """Refuses a folder without the settings of an image processor, if the model's layout reads them."""
    try:
        Processor.of(model, folder)
    except ConfigError as error:
        raise ConfigError(
            f"the tokenizer of {named} for a {model.family}, and no settings of an image processor there",
            "a folder with both, or a whole model to begin with, whose settings are then taken",
            "set tokenizer.folder to the model's folder, or begin with Pretrained('*', FOLDER) of such a model",
        ) from error


def _tokenizer(experiment: Experiment) -> Tokenizer:
    """Returns the tokenizer that the config names, or one trained on the stages' text."""
    config = experiment.tokenizer
    if config.path is not None:
        return Tokenizer.load(Path(config.path))
    sources = {repr(describe(w.source)): w.source for stage in experiment.stages for w in stage.data.sources}
    built = [source.build() for _, source in sorted(sources.items())]
    return Tokenizer.train(training_texts(built), experiment.vocab_size, config.phrases, _signals(experiment))


def _signals(experiment: Experiment) -> tuple[str, ...]:
    """Returns the special tokens of the media that the experiment's model produces."""
    return tuple(name for names in names_of_signals(experiment.model_of()).values() for name in names)


def _copy_caption_tokenizers(experiment: Experiment, target: Path) -> None:
    """Copies the tokenizers of generators' text encoders into the folder of the run's own."""
    model = experiment.model_of()
    for modality in produced(model):
        output = model.output(modality)
        if output.tokenizer is not None:
            for name in output.generator.tokenizers:
                ChatTokenizer.load(Path(output.tokenizer) / name).save(captions_folder(target, modality) / name)


def export_run(run: RunFolder, target: Path, *, dtype: Any = None, overwrite: bool = False) -> None:
    """Writes a named model that a run trained as a Hugging Face folder.

    Raises:
        ConfigError: a run of a model without a family; CheckpointError: a target that exists.
    """
    _, model, params, _, _ = load_run(run)
    folder = run.processor_folder
    companions = folder if folder.is_dir() else None
    save_pretrained(model, params, target, companions=companions, dtype=dtype, overwrite=overwrite)
