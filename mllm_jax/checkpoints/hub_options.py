"""What config.json files of all families share: activations, options without effect, the check of a written one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mllm_jax.checkpoints.options import Options
from mllm_jax.errors import ConfigError

# The hub's names of activations; the first of those that share a function is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
}
# Options of a tokenizer, of generation or of training, found in config.json files of every kind of model.
# fmt: off
IDLE = (
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "init_std", "length_penalty", "max_length", "max_new_tokens",
    "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p",
    "transformers.js_config", "typical_p", "unk_token_id", "use_bfloat16",
)
# fmt: on


def read_activation(options: Options, name: str = "hidden_act", known: Mapping[str, str] = ACTIVATIONS) -> str:
    """The activation as `mllm_jax.layers.mlp` calls it. Raises ConfigError for one that is not known."""
    return known[options.only(name, *known)]


def write_activation(activation: str, known: Mapping[str, str] = ACTIVATIONS) -> str:
    """The reverse."""
    return next(theirs for theirs, ours in known.items() if ours == activation)


def require_faithful(
    config: Any, written: dict, read: Callable[[dict], Any], facts: Callable[[Any], Mapping], what: str
) -> dict:
    """`written`, if reading it gives the same model again.

    Args:
        facts: {switch: value} of a config, for all switches that decide what it computes.
        what: "a decoder", how to call the model in a message.

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
