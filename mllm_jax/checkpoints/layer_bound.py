"""A bound on the layers that a config may ask for: those of the stored tensors, before anything is made for each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mllm_jax.errors import CheckpointError

FEW_LAYERS = 100  # as many can be written out, to say which tensors are missing


def require_layers(folder: Path, config: Any, stored: Iterable[str]) -> None:
    """Refuses a config with more layers than the stored tensors can have, before anything is made for each layer.

    Args:
        stored: the names of the tensors, in which layers are numbered.

    Raises:
        CheckpointError: names the number of layers and how many the tensors have.
    """
    most = 1 + max((int(number) for name in stored for number in re.findall(r"(?<=\.)\d{1,9}(?=\.)", name)), default=-1)
    wrong = [f"{name}={count:,}" for name, count in layer_counts(config) if count > max(most, FEW_LAYERS)]
    if wrong:
        raise CheckpointError(
            f"{folder}: config.json has {', '.join(wrong)} (num_hidden_layers, num_layers or depth there), "
            f"and the stored tensors have at most {most:,} layers",
            "as many layers as are stored",
            "check that weights and config.json belong together",
        )


def layer_counts(config: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """The names and values of all fields that say how many layers a part of a model has."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from layer_counts(value, f"{path}{field.name}.")
        elif field.name.endswith("num_layers") or field.name == "num_decoder_layers":
            yield f"{path}{field.name}", value
