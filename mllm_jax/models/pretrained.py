"""The config of a model in a folder, without its weights: what a model that takes it in as a part is built from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_jax.checkpoints.hf import read_config
from mllm_jax.checkpoints.native import is_native, read_native_config
from mllm_jax.models.registry import family_of


def pretrained_config(folder: str | Path) -> Any:
    """The config of the module that `from_pretrained(folder)` gives, such as a DecoderConfig.

    Raises:
        CheckpointError: no model there.
        ConfigError: an unsupported architecture, or an option of it that is not supported.
    """
    folder = Path(folder)
    if is_native(folder):
        return read_native_config(folder)
    hf_config = read_config(folder)
    return family_of(hf_config).from_hf(hf_config)
