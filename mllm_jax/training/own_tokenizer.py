"""Experiments that begin with a whole named model and have another tokenizer than that model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.models.part_sources import brings_words, grows, stored_part, vocabulary_axes
from mllm_jax.models.registry import pretrained_config
from mllm_jax.models.reshape import Vocabulary
from mllm_jax.models.vocabulary import own_tokenizer, rows_of, with_ids_of, with_vocabulary
from mllm_jax.training.config import Experiment, Pretrained


def words_source(experiment: Experiment) -> Pretrained | None:
    """Returns the source of a whole model that gets another tokenizer; None: there is none."""
    return next((source for source in experiment.pretrained if brings_words(experiment, source)), None)


def with_own_tokenizer(experiment: Experiment) -> Experiment:
    """Gives the experiment's model the vocabulary of its own tokenizer; most experiments are returned as they are.

    Raises:
        ConfigError: a model that can have no other tokenizer, or special tokens that clash.
    """
    if (source := words_source(experiment)) is None:
        return experiment
    ours, theirs = own_tokenizer_of(experiment, source), ChatTokenizer.load(source.folder)
    wanted = with_vocabulary(pretrained_config(source.folder), ours, theirs)
    return replace(experiment, model=with_ids_of(experiment.model, wanted))


def own_tokenizer_of(experiment: Experiment, source: Pretrained) -> ChatTokenizer:
    """Builds the experiment's tokenizer with the special tokens of the model's media; see `own_tokenizer`."""
    config = experiment.tokenizer
    return own_tokenizer(pretrained_config(source.folder), config.folder, source.folder, config.template)


def vocabulary_of(experiment: Experiment, source: Pretrained) -> Vocabulary | None:
    """Maps the tokens of an experiment to stored rows; None: the vocabulary is the stored one, or that of a run."""
    if not brings_words(experiment, source):
        return None if source.stage is not None or source.part != "llm" else _grown(experiment, source)
    ours, theirs = own_tokenizer_of(experiment, source), ChatTokenizer.load(source.folder)
    held = pretrained_config(source.folder).llm.vocab_size
    return Vocabulary(rows_of(ours, theirs, held), vocabulary_axes(experiment.model), held)


def _grown(experiment: Experiment, source: Pretrained) -> Vocabulary | None:
    """Maps the tokens of a larger vocabulary to the rows of a stored LLM; None: the vocabulary is not larger."""
    stored, config = stored_part(source), experiment.parts[source.part]
    if not grows(source, stored, config):
        return None
    held, new = stored.vocab_size, config.vocab_size - stored.vocab_size
    rows = np.concatenate([np.arange(held), np.full(new, -1)])
    return Vocabulary(rows, vocabulary_axes(config), held, seed=experiment.seed)
