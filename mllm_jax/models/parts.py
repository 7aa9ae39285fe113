"""The parts in a named model's config.json and weights: the families that read them, and the decoder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints.architectures import AMONG, Architecture, find, known, llms_inside, of_type
from mllm_jax.checkpoints.config_options import named_as
from mllm_jax.checkpoints.table import Family, Table
from mllm_jax.errors import ConfigError
from mllm_jax.llms.decoder import DecoderConfig


def family_of(part: Architecture) -> Family:
    """Returns the family that reads and writes a part."""
    families = importlib.import_module(part.module).FAMILIES
    return next(family for family in families if part.name in family.architectures)


def read_llm(values: Mapping[str, Any], what: str) -> DecoderConfig:
    """Reads the decoder of `text_config` or `llm_config`; each option is honoured or refused by name.

    Args:
        values: that part; its `architectures` name the decoder, or else its `model_type`.
        what: the name of the whole file in a message.

    Raises:
        ConfigError: the decoder is not supported there, or one of its options is not.
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
    """Writes the decoder's part of config.json. Raises ConfigError if the decoder is not supported there."""
    return family_of(_llm(config, what)).to_hf(config)


def llm_table(config: DecoderConfig, what: str) -> Table:
    """Returns the decoder's weights, with the names of a folder of its own."""
    return family_of(_llm(config, what)).table(config)


def family_of_part(part: Any) -> Family:
    """Returns the family that reads and writes a part with this config."""
    return family_of(known(part.family))


def part_table(part: Any) -> Table:
    """Returns a part's weights, with the names of a folder of its own."""
    return family_of_part(part).table(part)


def _llm(config: DecoderConfig, what: str) -> Architecture:
    part = find(config.family)
    if part is None or AMONG not in part.media:
        raise ConfigError(f"{what} with a {config.family}", f"one of {_supported()}", "choose another family")
    return part


def _supported() -> str:
    return ", ".join(part.name for part in llms_inside(AMONG))
