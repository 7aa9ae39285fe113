"""Initial parameters of parts from other models' folders and stages of other runs; a source is a `Pretrained`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from mllm_jax.checkpoints.components import Component, components_of
from mllm_jax.checkpoints.leaves import flatten
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.checkpoints.training import load_snapshot
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.llms.protocol import LLMConfig
from mllm_jax.models.params import shardings_of
from mllm_jax.models.part_names import part_differences, with_inner_parts
from mllm_jax.models.pipelines import is_pipeline
from mllm_jax.models.protocol import TakesFromExperiment
from mllm_jax.models.registry import (
    abstract_init,
    abstract_params,
    family_of_config,
    from_pretrained,
    pretrained_config,
    read_pretrained,
)
from mllm_jax.models.reshape import Vocabulary, changed_leaves, fitted, reshaped

logger = logging.getLogger("mllm_jax.models")


def held_by(source: Any, experiment: Any) -> set[str]:
    """Returns the names of the parts, and of parameters outside of parts, that the source initialises.

    A part may be inside another one, such as generator_image/unet.
    """
    if source.part != "*":
        return {source.part}
    config = experiment.model_of()
    return set(abstract_init(config.make(), config.batch_spec().empty(), method="touch"))


def read_source(
    source: Any,
    experiment: Any,
    mesh: Mesh,
    wanted: dict,
    *,
    reshape: bool = True,
    vocabulary: Vocabulary | None = None,
    report: Callable[[str], None] = logger.info,
) -> dict:
    """Reads the parameters of a source for an experiment, nested; the source "*" holds all parts of its model.

    Args:
        wanted: nested ShapeDtypeStructs with shardings, of whole parts of the model.
        reshape: whether parameters of another image size or vocabulary are resized; else they are left out.
        vocabulary, report: see `mllm_jax.models.reshape.reshaped`.

    Raises:
        ConfigError: the source's model is not the part's.
        CheckpointError: weights are absent, damaged or of other shapes.
    """
    how = dict(words=brings_words(experiment, source), reshape=reshape, vocabulary=vocabulary, report=report)
    if source.part == "*":
        held = {name: wanted[name] for name in held_by(source, experiment)}
        return _from_model(source, experiment.model_of(), mesh, held, **how)
    config, part = with_inner_parts(experiment.parts)[source.part], _at(source.part, wanted)
    read = (
        _from_run(source, config, part) if source.stage is not None else _from_model(source, config, mesh, part, **how)
    )
    return _nested(source.part, read)


def brings_words(experiment: Any, source: Any) -> bool:
    """Returns whether a whole named model is read with a tokenizer other than its own."""
    folder = experiment.tokenizer.folder
    whole = source.part == "*" and experiment.model.family is not None
    return whole and folder is not None and Path(folder).resolve() != Path(source.folder).resolve()


def reshaped_paths(source: Any, experiment: Any) -> set[str]:
    """Returns the parameters that differ from the source's because of another image size or vocabulary."""
    if source.part != "*" and source.stage is not None:
        return set()
    config = experiment.model_of() if source.part == "*" else with_inner_parts(experiment.parts)[source.part]
    stored, family = read_pretrained(_folder(source))
    if (part := _part_inside(source, stored)) is not None:
        stored, family = part, family_of_config(part)
    words = set(vocabulary_axes(config)) if brings_words(experiment, source) else set()
    if not part_differences(stored, config):
        return words
    old, new = (
        {path: x.shape for path, x in flatten(nn.meta.unbox(abstract_params(c, family)))[0].items()}
        for c in (stored, config)
    )
    prefix = "" if source.part == "*" else f"{source.part}/"
    return words | {prefix + path for path in changed_leaves(old, new)}


def vocabulary_axes(config: Any) -> dict[str, int]:
    """Returns {path: axis} of the parameters that have a row for each token of the vocabulary of a model or an LLM."""
    larger = (
        replace(config, vocab_size=config.vocab_size + 1)
        if isinstance(config, LLMConfig)
        else replace(config, llm=replace(config.llm, vocab_size=config.llm.vocab_size + 1))
    )
    shapes, more = (
        {path: x.shape for path, x in flatten(nn.meta.unbox(abstract_params(c, family_of_config(c))))[0].items()}
        for c in (config, larger)
    )
    pairs = {path: list(zip(shapes[path], more[path], strict=True)) for path in shapes}
    return {path: [a == b for a, b in each].index(False) for path, each in pairs.items() if shapes[path] != more[path]}


def snapshot_of(source: Any) -> Path:
    """Returns the folder of a stage's parameters. Raises RunFolderError (no run) or ConfigError (no such stage)."""
    run = RunFolder(Path(source.folder))
    names = [stage.name for stage in run.experiment().stages]
    if source.stage not in names:
        raise ConfigError(
            f"stage {source.stage!r} of {source.folder}", f"one of {names}", f"change the source of {source.part}"
        )
    return run.snapshot(names.index(source.stage), source.stage)


def _from_model(
    source: Any,
    config: Any,
    mesh: Mesh,
    wanted: dict,
    *,
    words: bool,
    reshape: bool,
    vocabulary: Vocabulary | None,
    report: Callable[[str], None],
) -> dict:
    folder = _folder(source)
    stored = pretrained_config(folder)
    part = _part_inside(source, stored)
    theirs = fitted(stored if part is None else part, config, vocabulary=words)
    grown = grows(source, theirs, config)
    _require_same(source, config, replace(theirs, vocab_size=config.vocab_size) if grown else theirs)
    # float32 like all trained parameters; a stage may hold frozen ones in less.
    _, params = from_pretrained(folder, dtype="float32", mesh=mesh)
    params = params if part is None else _at(source.part, params)
    if reshape:
        params = reshaped(params, wanted, config, vocabulary=vocabulary, report=report)
        return jax.device_put(params, shardings_of(wanted))
    leaves, targets = flatten_dict(params), flatten_dict(wanted)
    same = {path: leaf for path, leaf in leaves.items() if path in targets and leaf.shape == targets[path].shape}
    return unflatten_dict({path: jax.device_put(leaf, targets[path].sharding) for path, leaf in same.items()})


def _part_inside(source: Any, stored: Any) -> Any:
    """Returns the config of the source's part inside a folder's whole model; None: the folder holds what is asked."""
    return None if source.part == "*" else with_inner_parts(getattr(stored, "parts", {})).get(source.part)


def stored_part(source: Any) -> Any:
    """Returns the config of what a source's folder has for its part; reads no weights."""
    stored = pretrained_config(_folder(source))
    part = _part_inside(source, stored)
    return stored if part is None else part


def grows(source: Any, stored: Any, config: Any) -> bool:
    """Returns whether a language model is read into one with more tokens, as of signal tokens."""
    alike = source.part == "llm" and type(stored) is type(config) and None not in (stored.vocab_size, config.vocab_size)
    return alike and stored.vocab_size < config.vocab_size


def _folder(source: Any) -> str | Component:
    """Returns the source's folder, or for a part inside a generator that part's component of a pipeline's folder.

    Raises:
        ConfigError: the pipeline has no such part.
    """
    _, slash, inner = source.part.partition("/")
    if not slash or not is_pipeline(source.folder):
        return source.folder
    found = {component.name: component for component in components_of(source.folder) if component.has_config}
    if inner not in found:
        raise ConfigError(
            f"{source.folder} as {source.part}, a pipeline without a part {inner!r}",
            f"one of its parts {sorted(found)}",
            "name another folder, or the folder of this part alone",
        )
    return found[inner]


def _at(part: str, tree: dict) -> dict:
    """Returns the tree's branch with the name of a part, such as generator_image/unet."""
    for name in part.split("/"):
        tree = tree[name]
    return tree


def _nested(part: str, tree: dict) -> dict:
    """Returns a tree whose only branch is the part's."""
    for name in reversed(part.split("/")):
        tree = {name: tree}
    return tree


def _from_run(source: Any, config: Any, wanted: dict) -> dict:
    parts = with_inner_parts(RunFolder(Path(source.folder)).experiment().parts)
    _require_same(source, config, parts.get(source.part))
    snapshot = snapshot_of(source)
    if not snapshot.is_dir():
        raise CheckpointError(
            f"{source.folder}: stage {source.stage} has not ended", "its parameters", "train that run further first"
        )
    return _at(source.part, load_snapshot(snapshot, _nested(source.part, wanted), whole=False)[0])


def _require_same(source: Any, ours: Any, theirs: Any) -> None:
    if isinstance(theirs, TakesFromExperiment):  # fills the open fields of the folder's model, as in ours
        theirs = theirs.beside(theirs, 0)
    if changed := _differences(source, theirs, ours):
        shown = "".join(f"\n  {line}" for line in changed[:10])
        name = "model" if source.part == "*" else f"model.{source.part}"
        raise ConfigError(
            f"{source.folder} as {name}, which is another model:{shown}",
            "the config that the weights were trained with",
            f"build {name} from it: mllm_jax.pretrained_config(folder), or the run's own config",
        )


def _differences(source: Any, theirs: Any, ours: Any) -> list[str]:
    """Returns the differences that concern parameters; of a generator those of its parts, not of its sampler."""
    inner = [getattr(each, "parts", None) for each in (theirs, ours)]
    if source.part == "*" or not all(inner):
        return part_differences(theirs, ours)
    names = dict.fromkeys([*inner[1], *inner[0]])
    pairs = {name: [parts.get(name) for parts in inner] for name in names}
    return [f"{name}.{line}" for name, pair in pairs.items() for line in part_differences(*pair)]
