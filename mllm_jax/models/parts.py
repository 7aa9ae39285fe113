"""The parts inside a named model's config.json and among its weights: which file reads each, and its decoder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints.architectures import AMONG, Architecture, find, llms_inside, of_type
from mllm_jax.checkpoints.options import named_as
from mllm_jax.checkpoints.table import Family, Table
from mllm_jax.errors import ConfigError
from mllm_jax.llms.decoder import DecoderConfig


def family_of(part: Architecture) -> Family:
    """The family that reads and writes a part."""
    families = importlib.import_module(part.module).FAMILIES
    return next(family for family in families if part.name in family.architectures)


def read_llm(values: Mapping[str, Any], what: str) -> DecoderConfig:
    """The decoder of `text_config` or `llm_config`, every option honoured or refused by name.

    Args:
        values: that part; it says what it is by `architectures`, else by `model_type`.
        what: how to name the whole file in a message.

    Raises:
        ConfigError: a decoder that is not supported in there, or one of its options.
    """
    named, kind = named_as(values)
    part = find(named[0]) if named else of_type(kind)
    if part is None or AMONG not in part.media:
        raise ConfigError(
            f"{what}: an LLM with architectures={values.get('architectures')}, model_type={kind!r}",
            f"one of {_supported()}",
            "take a checkpoint with one of these, perhaps a conversion by others",
        )
    return family_of(part).from_hf(dict(values))


def write_llm(config: DecoderConfig, what: str) -> dict:
    """The inverse. Raises ConfigError: a decoder that is not supported in there."""
    return family_of(_llm(config, what)).to_hf(config)


def llm_table(config: DecoderConfig, what: str) -> Table:
    """Its weights, with names as in a folder of its own."""
    return family_of(_llm(config, what)).table(config)


def _llm(config: DecoderConfig, what: str) -> Architecture:
    part = find(config.family)
    if part is None or AMONG not in part.media:
        raise ConfigError(f"{what} with a {config.family}", f"one of {_supported()}", "choose another family")
    return part


def _supported() -> str:
    return ", ".join(part.name for part in llms_inside(AMONG))
