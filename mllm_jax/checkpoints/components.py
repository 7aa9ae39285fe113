"""A model folder as a list of components: one with its config.json, or several that a model_index.json names.

    model/config.json, model.safetensors                         one component, the folder itself

    pipeline/model_index.json                                    several, each a subfolder (diffusers' form)
    pipeline/text_encoder/config.json, model.safetensors
    pipeline/unet/config.json, diffusion_pytorch_model.safetensors
    pipeline/scheduler/scheduler_config.json                     without weights, and without a config.json

A function that reads or writes one model takes a `Component`, or the path of a folder that is one. Classes are names
only: code beside a model is never executed.
"""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_jax.errors import CheckpointError
from mllm_jax.files import read_json

CONFIG, MODEL_INDEX = "config.json", "model_index.json"
CONFIG_BYTES = 16 << 20
# What files of weights are called: by transformers, by diffusers. Both add ".safetensors", or an index of several.
STEM, DIFFUSERS_STEM = "model", "diffusion_pytorch_model"


@dataclass(frozen=True)
class Component:
    """One model: a config.json and its weights.

    Attributes:
        folder: where they are.
        stem: what the files of weights are called.
        name: of one among several, as model_index.json has it; the only one of a folder has none.
        class_name: which architecture model_index.json says that it is; without one, its config.json says it.
    """

    folder: Path
    stem: str = STEM
    name: str = ""
    class_name: str = ""

    @property
    def has_config(self) -> bool:
        """Whether it is a model; schedulers, tokenizers and image processors have other files."""
        return os.path.isfile(self.folder / CONFIG)


def component_of(where: str | Path | Component) -> Component:
    """The component that a folder is. Raises CheckpointError: it has several."""
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


def components_of(folder: str | Path) -> tuple[Component, ...]:
    """All components of a folder: the one that it is by its config.json, else those of its model_index.json in order.

    A component that the index has as [null, null] is left out.

    Raises:
        CheckpointError: an index that is no object, an entry that names no class, a name that leaves the folder, or
            subfolders that are missing; lists all.
    """
    folder = Path(folder)
    if os.path.exists(folder / CONFIG) or not os.path.exists(folder / MODEL_INDEX):
        return (component_of(folder),)
    path = folder / MODEL_INDEX
    try:
        index = read_json(path, CheckpointError, limit=CONFIG_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: {error}", "JSON", "fetch the file again") from error
    # Entries that are no lists are options of the whole, such as "_class_name".
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
        raise CheckpointError(f"{path} that names no component", "one or more", "fetch the file again")
    return tuple(found)


def _fault(name: str, entry: list[Any]) -> str | None:
    """What is wrong with an entry of model_index.json, or None."""
    if not name.isprintable() or name in ("", ".", "..") or any(mark in name for mark in "/\\:"):
        return f"{name!a}, which names no subfolder"
    if entry != [None, None] and not (len(entry) == 2 and all(isinstance(word, str) and word for word in entry)):
        return f"{name}={entry!r:.100}"
    return None


def _stem(folder: Path) -> str:
    """The stem of the weights in a folder; that of transformers where there are none, or both."""

    def has(stem: str) -> bool:
        return any(os.path.exists(folder / f"{stem}.safetensors{rest}") for rest in ("", ".index.json"))

    return DIFFUSERS_STEM if has(DIFFUSERS_STEM) and not has(STEM) else STEM
