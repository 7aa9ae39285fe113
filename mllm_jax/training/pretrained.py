"""The parameters that a run begins with: drawn with its seed, or read part by part from other models and runs."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.data.tokenizer import Tokenizer, tokenizer_in
from mllm_jax.errors import ConfigError
from mllm_jax.models.params import init_params, placed_together, shardings_of
from mllm_jax.models.part_sources import held_by, read_source
from mllm_jax.sharding.hosts import is_first
from mllm_jax.training.config import Experiment
from mllm_jax.training.own_tokenizer import vocabulary_of
from mllm_jax.training.partition import join

_READS_TOKENS = ("llm", "encoder_text", "prompter")


def initial_params(experiment: Experiment, mesh: Mesh) -> tuple[dict, dict]:
    """Reads the parameters of `experiment.pretrained` and draws all others with the seed, on their devices.

    Returns:
        (params, shardings): nested dicts of float32 arrays and of their NamedShardings.

    Raises:
        ConfigError: a source that holds another model than the part's.
        CheckpointError: weights that are absent, damaged or of other shapes.
    """
    placed = placed_together(experiment.compositions, mesh, experiment.part_rules)
    params: dict = {}
    made: set[str] = set()  # names of parts, and of parts inside them
    for source in experiment.pretrained:
        vocabulary = vocabulary_of(experiment, source)
        params = join(params, read_source(source, experiment, mesh, placed, vocabulary=vocabulary, report=_say))
        made |= held_by(source, experiment)
    for config in experiment.compositions:
        rules = experiment.part_rules
        drawn, shardings = init_params(config.make(), mesh, experiment.seed, without=sorted(made), parts=rules)
        params = join(params, drawn)
        made |= shardings.keys()
    return params, shardings_of(placed)


def _say(line: str) -> None:
    """Prints a line about how a part differs from its source, once for all processes."""
    if is_first():
        print(line, flush=True)


def require_words(experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Checks that parts that read tokens get the ids that they were trained on.

    Raises:
        ConfigError: a part of a run whose tokenizer has another id for some text.
    """
    ours = tokenizer.backend.get_vocab()
    for source in experiment.pretrained:
        if source.stage is None or not _reads_tokens(source.part, experiment):
            continue
        run = RunFolder(Path(source.folder))
        made = tokenizer_in(run.processor_folder)
        theirs = made.backend.get_vocab()
        if others := sorted(word for word, number in theirs.items() if ours.get(word) != number):
            trained = isinstance(made, Tokenizer)
            wanted = f"path={str(run.tokenizer_file)!r}" if trained else f"folder={str(run.processor_folder)!r}"
            raise ConfigError(
                f"{source.part} of {source.folder} with another tokenizer: {len(others)} of its {len(theirs)} words"
                f" have other ids here, such as {others[0]!r}",
                "the tokenizer that the part was trained with",
                f"set tokenizer=TokenizerConfig({wanted})",
            )


def _reads_tokens(part: str, experiment: Experiment) -> bool:
    """Returns whether a part reads ids of the experiment's tokenizer, as a generator's text encoder may."""
    outputs, modality = getattr(experiment.model, "outputs", {}), part.removeprefix("generator_")
    modality = modality.removesuffix("/text_encoder")
    return part in _READS_TOKENS or (part != modality and modality in outputs and outputs[modality].tokenizer is None)


def describe_sources(experiment: Experiment) -> dict[str, str]:
    """Returns {pattern of parameters: their source}."""
    return {
        "*"
        if source.part == "*"
        else f"{source.part}/*": f"pretrained({source.folder}{f', stage {source.stage}' if source.stage else ''})"
        for source in experiment.pretrained
    }
