"""The parameters that a run begins with: made from its seed, or read part by part from other models and runs."""

from __future__ import annotations

from pathlib import Path

from flax import linen as nn
from jax.sharding import Mesh

from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import ConfigError
from mllm_jax.models.params import init_params, placed_params
from mllm_jax.models.part_sources import read_source
from mllm_jax.training.config import Experiment

_READS_TOKENS = ("llm", "text_tower", "prompter")


def initial_params(experiment: Experiment, model: nn.Module, mesh: Mesh) -> tuple[dict, dict]:
    """All parameters where they will live, those of `experiment.pretrained` read and the others made from the seed.

    Returns:
        (params, shardings): nested dicts of float32 arrays and of their NamedShardings.

    Raises:
        ConfigError: a source whose model is not the part's.
        CheckpointError: weights that are absent, damaged or of other shapes.
    """
    placed = placed_params(model, mesh, experiment.part_rules)
    parts = [source.part for source in experiment.pretrained]
    without = list(placed) if parts == ["*"] else parts
    params, shardings = init_params(model, mesh, experiment.seed, without=without, placed=placed)
    for source in experiment.pretrained:
        params |= read_source(source, experiment.model, mesh, placed)
    return params, shardings


def require_words(experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Parts that read tokens go on with the ids that they were trained on.

    Raises:
        ConfigError: a part of a run whose tokenizer gives some text another id.
    """
    ours = tokenizer.backend.get_vocab()
    for source in experiment.pretrained:
        if source.stage is None or source.part not in _READS_TOKENS:
            continue
        run = RunFolder(Path(source.folder))
        theirs = Tokenizer.load(run.processor_folder).backend.get_vocab()
        if others := sorted(word for word, number in theirs.items() if ours.get(word) != number):
            raise ConfigError(
                f"{source.part} of {source.folder} with another tokenizer: {len(others)} of its {len(theirs)} words"
                f" have other ids here, such as {others[0]!r}",
                "the tokenizer that the part was trained with",
                f"set tokenizer=TokenizerConfig(path={str(run.tokenizer_file)!r})",
            )


def describe_sources(experiment: Experiment) -> dict[str, str]:
    """{pattern of parameters: where they were read}."""
    return {
        "*"
        if source.part == "*"
        else f"{source.part}/*": f"pretrained({source.folder}{f', stage {source.stage}' if source.stage else ''})"
        for source in experiment.pretrained
    }
