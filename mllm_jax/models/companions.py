"""The files beside a model's weights: its tokenizer, and its processor's settings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm_jax.checkpoints.components import CONFIG
from mllm_jax.checkpoints.hf import copy_companions
from mllm_jax.data.image_settings import has_settings, resize_settings


def copy_for(config: Any, source: Path, target: Path) -> None:
    """Copies the files beside a model's weights, and adapts the processor's settings to the config's image size."""
    copy_companions(source, target)
    if sizes := _sizes(config, source):
        resize_settings(target, source, *sizes, tokens=getattr(config, "media_tokens", None))


@contextmanager
def fitting(config: Any, source: Path | None) -> Iterator[Path | None]:
    """Yields the folder, or a temporary copy of its companion files whose settings fit the config."""
    if source is None or _sizes(config, source) is None:
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        copy_for(config, source, Path(folder))
        yield Path(folder)


def _sizes(config: Any, source: Path) -> tuple[int, int] | None:
    """Returns the image sizes of the model in a folder and of a config; None if they are equal or unknown."""
    from mllm_jax.models.registry import pretrained_config

    size = getattr(config, "image_size", None)
    if not size or config.family is None or not (source / CONFIG).is_file() or not has_settings(source):
        return None
    stored = getattr(pretrained_config(source), "image_size", None)
    return (stored, size) if stored and stored != size else None
