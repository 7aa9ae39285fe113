"""What config.json files of all families share: names of activations, idle options, the check of what is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mllm_jax.checkpoints.options import Options
from mllm_jax.errors import ConfigError

Config = TypeVar("Config")

# The hub's names of activations; the first of those that share a function is written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
}
# Those of encoders, which may have one more.
ENCODER_ACTIVATIONS = ACTIVATIONS | {"tanh": "tanh"}
# Options of a tokenizer, of generation or of training that config.json files of every kind list.
# fmt: off
IDLE = (
    "tokenizer_class", "prefix", "max_length", "min_length", "do_sample", "temperature", "top_p", "top_k", "num_beams",
    "repetition_penalty", "task_specific_params", "finetuning_task", "sep_token_id", "decoder_start_token_id",
    "transformers.js_config",
)
# Further ones of generation, which configs of early versions of transformers held.
IDLE_GENERATION = (
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "initializer_factor",
    "length_penalty", "no_repeat_ngram_size", "num_beam_groups", "num_return_sequences", "output_scores",
    "remove_invalid_values", "return_dict_in_generate", "suppress_tokens", "tf_legacy_loss", "typical_p",
    "use_bfloat16",
)
# fmt: on
# How a module is started and run, which no checkpoint says.
NOT_STORED = ("mimetic_init", "dtype", "remat", "scan_unroll")


def read_activation(options: Options, name: str = "hidden_act", known: Mapping[str, str] = ACTIVATIONS) -> str:
    """Our name of an activation. Raises ConfigError: one that is not in `known`."""
    return known[options.only(name, *known)]


def write_activation(activation: str) -> str:
    """The hub's name of an activation of ours."""
    return next(theirs for theirs, ours in ENCODER_ACTIVATIONS.items() if ours == activation)


def several_ids(ids: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """The ids of an option that holds one or a list of them."""
    return (ids,) if isinstance(ids, int) else tuple(ids)


def one_or_several(ids: tuple[int, ...]) -> int | list[int]:
    """The reverse of `several_ids`."""
    return ids[0] if len(ids) == 1 else list(ids)


def stored_fields(config: Any, *without: str) -> dict[str, Any]:
    """The fields that a checkpoint has to say: all but those of running the module and those named."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in (*NOT_STORED, *without)]
    return {name: getattr(config, name) for name in names}


def check_written(
    config: Config,
    written: dict,
    read: Callable[[dict], Config],
    what: str,
    facts: Callable[[Config], Mapping[str, Any]] = stored_fields,
) -> dict:
    """`written`, if reading it gives the same config again.

    Args:
        read: the family's `from_hf`.
        what: the kind of model, such as "a decoder".
        facts: config -> {field: what it comes to}, which must be the same before and after.

    Raises:
        ConfigError: the family has no options for some of the switches; names them.
    """
    wanted, found = facts(config), facts(read(written))
    lost = [f"{name}={getattr(config, name)!r}" for name in wanted if wanted[name] != found[name]]
    if lost:
        raise ConfigError(
            f"{what} with {', '.join(lost)}, to be written as {config.family}",
            f"switches that {config.family} has",
            "choose another family, or change these",
        )
    return written
