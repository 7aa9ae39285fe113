"""A folder of several models as one model: diffusers' pipelines.

    pipeline/model_index.json                    its class, and the class of each part
    pipeline/text_encoder/, unet/, vae/          parts with weights
    pipeline/scheduler/scheduler_config.json     the sampler
    pipeline/tokenizer/, safety_checker/, ...    CARRIED: no part of the model, but copied when it is saved

The function `from_hf` of a pipeline's family takes the configs of its parts and its scheduler by their names.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from flax import linen as nn

from mllm_jax.checkpoints.architectures import DIFFUSERS_VERSION, find, known
from mllm_jax.checkpoints.components import CONFIG, CONFIG_BYTES, MODEL_INDEX, Component, components_of
from mllm_jax.checkpoints.folder import new_folder
from mllm_jax.checkpoints.hf import copy_companions, float_dtype, read_config, read_weights, write_config
from mllm_jax.checkpoints.leaves import PyTree
from mllm_jax.checkpoints.safetensors_files import has_weights
from mllm_jax.checkpoints.table import Family
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.files import read_json
from mllm_jax.generators import schedulers
from mllm_jax.models.parts import family_of, part_table

logger = logging.getLogger("mllm_jax.models")

SCHEDULER = "scheduler"
# Subfolders that are no part of the model: the files and options that give the class, and its library.
CARRIED = {
    "tokenizer": ("tokenizer_config.json", ("tokenizer_class",), "transformers"),
    "tokenizer_2": ("tokenizer_config.json", ("tokenizer_class",), "transformers"),
    "feature_extractor": (
        "preprocessor_config.json",
        ("image_processor_type", "feature_extractor_type"),
        "transformers",
    ),
    "image_encoder": (CONFIG, ("architectures",), "transformers"),
    "safety_checker": (CONFIG, ("architectures",), "stable_diffusion"),
}
# Options that a class of pipelines reads in a part's config.json, and that the part itself does not have.
_ADDED = {("AudioLDM2Pipeline", "language_model"): {"max_new_tokens": 8}}
# Options of a model_index.json beside its parts.
OPTIONS = ("_class_name", "_diffusers_version", "_name_or_path", "requires_safety_checker")


@runtime_checkable
class PipelineConfig(Protocol):
    """The config of a model whose folder is a pipeline's.

    Attributes:
        family: the class of the pipeline.
        scheduler: see `mllm_jax.generators.schedulers`.
        carried: names of CARRIED that the pipeline takes.
    """

    family: str
    scheduler: Any
    carried: tuple[str, ...]

    @property
    def parts(self) -> Mapping[str, Any]:
        """Each part's config by the name of its parameters and of its folder."""
        ...

    def make(self) -> nn.Module:
        """Returns the module, whose field `companions` is the folder of what is only carried along, or None."""
        ...


def is_pipeline(folder: Any) -> bool:
    """Returns whether a path is a folder with a model_index.json, and none of one model."""
    if isinstance(folder, Component):
        return False
    return os.path.isfile(Path(folder) / MODEL_INDEX) and not os.path.exists(Path(folder) / CONFIG)


def read_pipeline(folder: Path, read: Callable[[Component], tuple[Any, Family]]) -> tuple[Any, Family]:
    """Returns the config and the family of a pipeline's folder; reads no weights.

    Args:
        read: returns a part's config and family.

    Raises:
        CheckpointError: files are absent or damaged, or the pipeline is not supported.
        ConfigError: a part, the scheduler, or an option of one of these is not supported.
    """
    components = components_of(folder)
    index = read_json(folder / MODEL_INDEX, CheckpointError, limit=CONFIG_BYTES)
    name = index.get("_class_name")
    if not isinstance(name, str) or not name.endswith("Pipeline") or find(name) is None:
        raise CheckpointError(
            f"{folder} of class {name!r:.100}, a folder of several models",
            "a pipeline that `mllm models` lists, or a folder of one model",
            f"name one of its subfolders: {', '.join(c.name for c in components if c.has_config)}",
        )
    family = family_of(known(name))
    strange = sorted(k for k, v in index.items() if not isinstance(v, list) and k not in OPTIONS)
    if strange:
        listed = ", ".join(f"{k}={index[k]!r:.60}" for k in strange)
        raise ConfigError(f"{folder / MODEL_INDEX}: {listed}", f"only {', '.join(OPTIONS)}", "take another folder")
    parts = {}
    for component in components:
        if component.name == SCHEDULER:
            parts[SCHEDULER] = schedulers.from_folder(component.folder)
        elif component.name not in CARRIED:
            parts[component.name] = read(component)[0]
    return family.from_hf(parts), family


def read_parts(
    folder: Path, config: PipelineConfig, abstract: PyTree, *, mesh: jax.sharding.Mesh | None, dtype: Any, report: Any
) -> PyTree:
    """Reads the parameters of a pipeline's parts onto the devices; takes and raises the same as `read_weights`."""
    components = {component.name: component for component in components_of(folder)}
    return {
        name: read_weights(components[name], part_table(part), abstract[name], mesh=mesh, dtype=dtype, report=report)
        for name, part in config.parts.items()
    }


def write_pipeline(
    folder: Path,
    config: PipelineConfig,
    params: PyTree,
    save: Callable[..., None],
    *,
    companions: Path | None,
    dtype: Any,
    overwrite: bool,
    **how: Any,
) -> None:
    """Writes a pipeline's folder, whole or not at all; takes and raises the same as `save_pretrained`.

    Args:
        save: `save_pretrained`, for each part.
    """
    size = None if dtype is None else float_dtype(dtype).itemsize
    needed = sum(leaf.size * (size or leaf.dtype.itemsize) for leaf in jax.tree.leaves(params))
    if companions is not None and not companions.is_dir():
        raise CheckpointError(
            f"no {companions}, from which the tokenizer is copied", "the model's folder", "name it: companions=..."
        )
    with new_folder(folder, needed, overwrite=overwrite) as temporary:
        index: dict[str, Any] = {"_class_name": config.family, "_diffusers_version": DIFFUSERS_VERSION}
        for name, part in config.parts.items():
            save(part.make(), params[name], temporary / name, dtype=dtype, **how)
            if added := _ADDED.get((config.family, name)):
                write_config(temporary / name, read_config(Component(temporary / name)) | added)
            index[name] = ["diffusers" if known(part.family).diffusers else "transformers", part.family]
        config.scheduler.save(temporary / SCHEDULER)
        index[SCHEDULER] = ["diffusers", config.scheduler.class_name]
        if companions is not None:
            copy_companions(companions, temporary)
        index |= {name: _carried(temporary / name, *CARRIED[name]) for name in config.carried}
        if "safety_checker" in index:
            index["requires_safety_checker"] = index["safety_checker"] != [None, None]
        (temporary / MODEL_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _carried(folder: Path, file: str, options: tuple[str, ...], library: str) -> list[str | None]:
    """Returns the entry of a copied subfolder in model_index.json; removes one that could not be opened again."""
    if not folder.is_dir():
        return [None, None]
    try:
        values = read_json(folder / file, CheckpointError, limit=CONFIG_BYTES)
    except FileNotFoundError:
        values = {}
    found = next((values[name] for name in options if values.get(name)), None)
    name = found[0] if isinstance(found, list) else found
    if not isinstance(name, str) or (file == CONFIG and not has_weights(Component(folder))):
        logger.warning("%s is left out: it has no class in %s, or no safetensors", folder.name, file)
        shutil.rmtree(folder)
        return [None, None]
    return [library, name]
