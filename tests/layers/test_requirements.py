"""The checks of configs: what is refused, and the messages."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mllm_jax.errors import ConfigError
from mllm_jax.layers.requirements import Requirements


@dataclass
class Config:
    hidden_size: int = 24
    num_heads: int = 3
    norm: str | None = "rms"


def test_a_requirement_that_holds_says_nothing():
    require = Requirements("toy", Config())
    require(True, "", "", "")
    require.one_of("norm", ("layer", "rms"))
    require.heads()
    require.heads(4, "pairs")
    Requirements("toy", Config(norm=None)).one_of("norm", (None, "rms"))


def test_each_refusal_names_the_model_and_what_was_given():
    with pytest.raises(ConfigError, match="toy: 3 wheels"):
        Requirements("toy", Config())(False, "3 wheels", "4", "add one")
    with pytest.raises(ConfigError, match=r"(?s)toy: norm 'rms'.*one of layer, None.*change norm"):
        Requirements("toy", Config()).one_of("norm", ("layer", None))
    with pytest.raises(ConfigError, match=r"(?s)toy: hidden_size 24 for 5 heads.*divide"):
        Requirements("toy", Config(num_heads=5)).heads()
    with pytest.raises(ConfigError, match=r"(?s)toy: hidden_size 24 for 4 heads.*multiple of 4: pairs"):
        Requirements("toy", Config(num_heads=4)).heads(4, "pairs")
