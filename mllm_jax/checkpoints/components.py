"""A model folder as a list of components: one with a config.json, or several in a model_index.json.

    model/config.json, model.safetensors                         one component, the folder itself

    pipeline/model_index.json                                    several, each a subfolder (diffusers' form)
    pipeline/text_encoder/config.json, model.safetensors
    pipeline/unet/config.json, diffusion_pytorch_model.safetensors
    pipeline/scheduler/scheduler_config.json                     without weights, and without a config.json

A function that reads or writes one model takes a `Component`, or the path of a folder that is one. Classes are only
names: code beside a model is never executed.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_jax.errors import CheckpointError
from mllm_jax.files import read_json

CONFIG, MODEL_INDEX = "config.json", "model_index.json"
CONFIG_BYTES = 16 << 20
# Stems of weight files: of transformers, of diffusers. Both add ".safetensors", or an index of several files.
STEM, DIFFUSERS_STEM = "model", "diffusion_pytorch_model"


@dataclass(frozen=True)
class Component:
    """One model: a config.json and its weights.

    Attributes:
        folder: the folder of both.
        stem: stem of the names of weight files.
        name: its name in model_index.json; empty if it is the only component of a folder.
        class_name: its architecture in model_index.json; without one, config.json has it.
    """

    folder: Path
    stem: str = STEM
    name: str = ""
    class_name: str = ""

    @property
    def has_config(self) -> bool:
        """Returns whether it is a model; schedulers, tokenizers and image processors have other files."""
        return os.path.isfile(self.folder / CONFIG)


def component_of(where: str | Path | Component) -> Component:
    """Returns the component of a folder. Raises CheckpointError if it has several."""
    if isinstance(where, Component):
        return where
    folder = Path(where)
    if not os.path.exists(folder / CONFIG) and os.path.isfile(folder / MODEL_INDEX):
        names = [component.name for component in components_of(folder) if component.has_config]
        raise CheckpointError(
            f"{folder} with {MODEL_INDEX}, a folder of several models",
            "a folder of one model, with its config.json",
            f"name one of its subfolders: {', '.join(names) or 'none of them has a config.json'}",
        )
    return Component(folder, _stem(folder))


def new_component(folder: str | Path, config: Mapping[str, Any]) -> Component:
    """Returns the component to be written to a folder with this config.json, with the weights' stem of its library."""
    return Component(Path(folder), DIFFUSERS_STEM if "_class_name" in config else STEM)


def components_of(folder: str | Path) -> tuple[Component, ...]:
    """Returns all components of a folder: the folder itself if it has a config.json, else those of model_index.json.

    A component with [null, null] in the index is left out.

    Raises:
        CheckpointError: an index that is not an object, an entry without a class, a name outside the folder, or missing
            subfolders; lists all.
    """
    folder = Path(folder)
    if os.path.exists(folder / CONFIG) or not os.path.exists(folder / MODEL_INDEX):
        return (component_of(folder),)
    path = folder / MODEL_INDEX
    try:
        index = read_json(path, CheckpointError, limit=CONFIG_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: {error}", "JSON", "fetch the file again") from error
    # Entries that are not lists are options of the pipeline, such as "_class_name".
    listed = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    if wrong := [line for name, entry in listed.items() if (line := _fault(name, entry))]:
        raise CheckpointError(
            f"{path}:" + "".join(f"\n    {line}" for line in wrong),
            "for each component its subfolder's name: [library, class]",
            "fetch the file again",
        )
    found = [
        Component(folder / name, _stem(folder / name), name, entry[1])
        for name, entry in listed.items()
        if entry != [None, None]
    ]
    if absent := [component.name for component in found if not os.path.isdir(component.folder)]:
        raise CheckpointError(
            f"{folder} without {', '.join(absent)}",
            f"a subfolder for each of the {len(found)} components that {MODEL_INDEX} names",
            "fetch the missing subfolders",
        )
    if not found:
        raise CheckpointError(f"{path} without a component", "one or more", "fetch the file again")
    return tuple(found)


def _fault(name: str, entry: list[Any]) -> str | None:
    """Returns the error of an entry of model_index.json, or None."""
    if not name.isprintable() or name in ("", ".", "..") or any(mark in name for mark in "/\\:"):
        return f"{name!a}, which is not the name of a subfolder"
    if entry != [None, None] and not (len(entry) == 2 and all(isinstance(word, str) and word for word in entry)):
        return f"{name}={entry!r:.100}"
    return None


def _stem(folder: Path) -> str:
    """Returns the stem of the weights in a folder: that of diffusers if only its files are there."""

    def has(stem: str, *rests: str) -> bool:
        return any(os.path.exists(folder / f"{stem}.{rest}") for rest in rests)

    usual = ("safetensors", "safetensors.index.json")
    return DIFFUSERS_STEM if has(DIFFUSERS_STEM, *usual, "bin") and not has(STEM, *usual) else STEM
