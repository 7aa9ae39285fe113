"""Shared parts of all families' config.json files: names of activations, ids, and the check of a written config."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mllm_jax.checkpoints.config_json import check_written, one_or_several, write_activation
from mllm_jax.checkpoints.config_options import ACTIVATIONS, ENCODER_ACTIVATIONS, ConfigOptions
from mllm_jax.errors import ConfigError
from mllm_jax.layers import mlp
from mllm_jax.layers.compute import Compute
from mllm_jax.llms import llama
from mllm_jax.llms.decoder import DecoderConfig


def test_every_activation_is_read_as_it_was_written():
    assert set(ENCODER_ACTIVATIONS.values()) == set(mlp.ACTIVATIONS)
    for name in mlp.ACTIVATIONS:
        options = ConfigOptions({"hidden_act": write_activation(name)}, "config.json")
        assert options.activation("hidden_act", ENCODER_ACTIVATIONS) == name


def test_decoders_have_no_tanh():
    assert ENCODER_ACTIVATIONS.keys() - ACTIVATIONS.keys() == {"tanh"}
    with pytest.raises(ConfigError, match="hidden_act='tanh'"):
        ConfigOptions({"hidden_act": "tanh"}, "config.json").activation("hidden_act")
    with pytest.raises(ConfigError, match="hidden_act='tanh'"):
        llama.to_hf_config(DecoderConfig(vocab_size=8, activation="tanh"))


def test_ids_are_written_as_they_were_read():
    for stored, ids in ((0, (0,)), ([3, 0], (3, 0)), ([], ())):
        assert ConfigOptions({"eos_token_id": stored}, "config.json").ids("eos_token_id") == ids
        assert one_or_several(ids) == stored


@dataclass(frozen=True)
class Config:
    size: int = 1
    depth: int = 2
    compute: Compute = Compute()
    family: str = "ToyModel"


def test_what_a_file_does_not_say_is_named():
    written, config = {"size": 3}, Config(size=3, compute=Compute("bfloat16"))
    assert check_written(config, written, lambda values: Config(**values), "a toy") is written
    with pytest.raises(ConfigError, match="a toy with depth=5, to be written as ToyModel"):
        check_written(Config(size=3, depth=5), written, lambda values: Config(**values), "a toy")
    halves = dict(facts=lambda config: {"depth": config.depth // 2})
    assert check_written(Config(size=4, depth=3), written, lambda values: Config(**values), "a toy", **halves)
