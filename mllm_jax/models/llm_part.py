"""The decoder inside a composed model's config.json and among its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints.options import named_as
from mllm_jax.checkpoints.table import Table
from mllm_jax.errors import ConfigError
from mllm_jax.llms import llama, qwen
from mllm_jax.llms.decoder import DecoderConfig

# `model_type` of the part -> the file that knows it.
_HOMES = {"llama": llama, "mistral": llama, "qwen2": qwen, "qwen3": qwen}
_ARCHITECTURES = {name: home for home in _HOMES.values() for family in home.FAMILIES for name in family.architectures}


def read_llm(values: Mapping[str, Any], what: str) -> DecoderConfig:
    """The decoder of `text_config` or `llm_config`, every option honoured or refused by name.

    Args:
        values: that part; it says what it is by `architectures`, else by `model_type`.
        what: how to name the whole file in a message.

    Raises:
        ConfigError: a decoder that is not supported in there, or one of its options.
    """
    named, kind = named_as(values)
    home = _ARCHITECTURES.get(named[0]) if named else _HOMES.get(kind)
    if home is None:
        raise ConfigError(
            f"{what}: an LLM with architectures={values.get('architectures')}, model_type={kind!r}",
            f"one of {', '.join(_ARCHITECTURES)}",
            "take a checkpoint with one of these, perhaps a conversion by others",
        )
    return home.from_hf_config(dict(values))


def write_llm(config: DecoderConfig, what: str) -> dict:
    """The reverse. Raises ConfigError: a decoder that is not supported in there."""
    return _home(config, what).to_hf_config(config)


def llm_table(config: DecoderConfig, what: str) -> Table:
    """Its weights, with names as in a folder of its own."""
    return _home(config, what).table(config)


def _home(config: DecoderConfig, what: str):
    if config.family not in _ARCHITECTURES:
        raise ConfigError(
            f"{what} with a {config.family}", f"one of {', '.join(_ARCHITECTURES)}", "choose another family"
        )
    return _ARCHITECTURES[config.family]
