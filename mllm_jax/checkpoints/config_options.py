"""Reading of a config.json: every option in it is used or refused by name, and its type is checked.

A family reads each option with a method for its type. Options that it does not read are refused, except the idle
options below.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from mllm_jax.errors import ConfigError

# Options without effect on a model's forward pass, in every family and every nested config: of training, of the
# tokenizer, of generation (`PretrainedConfig` wrote all defaults of generation into each nested config until 2024), of
# faster kernels with the same results, and pointers to code, which is never executed. A family for which one of them
# has an effect reads it.
# fmt: off
IDLE = frozenset((
    # metadata of the file, and the form of a call's result
    "_name_or_path", "_model_name_or_path", "_commit_hash", "architectures", "model_type", "torch_dtype", "dtype",
    "transformers_version", "transformers.js_config", "auto_map", "custom_pipelines", "use_cache", "output_attentions",
    "_output_attentions", "output_hidden_states", "output_past", "return_dict", "torchscript", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "use_flash_attn",
    "chunk_size_feed_forward", "pretraining_tp", "xla_device", "use_bfloat16", "tf_legacy_loss", "is_llama_config",
    "max_sequence_length", "_class_name", "_diffusers_version",
    # training
    "initializer_range", "initializer_factor", "init_std", "gradient_checkpointing", "attention_dropout",
    "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "dropout",
    "activation_dropout", "layerdrop", "dropout_rate", "classifier_dropout", "projection_dropout", "drop_path_rate",
    "problem_type", "finetuning_task", "id2label", "label2id", "num_labels", "loss_type", "adapters",
    # other kinds of model
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder",
    # the tokenizer
    "tokenizer_class", "tokenizer_type", "prefix", "sep_token_id", "unk_token_id", "task_specific_params",
    # generation
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "assistant_temperature",
    "bad_words_ids", "begin_suppress_tokens", "cache_config", "cache_implementation", "compile_config", "constraints",
    "decoder_start_token_id", "disable_compile", "diversity_penalty", "do_sample", "dola_layers", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id", "forced_decoder_ids",
    "forced_eos_token_id", "generation_kwargs", "guidance_scale", "is_assistant", "length_penalty", "low_memory",
    "max_length", "max_matching_ngram_size", "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p",
    "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_logits", "output_scores", "penalty_alpha", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits", "repetition_penalty",
    "return_dict_in_generate", "return_legacy_cache", "sequence_bias", "stop_strings", "suppress_tokens",
    "target_lookbehind", "temperature", "token_healing", "top_h", "top_k", "top_p", "typical_p",
    "use_model_defaults", "watermarking_config",
))
# fmt: on
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
# The activations of encoders, which may have one more.
ENCODER_ACTIVATIONS = ACTIVATIONS | {"tanh": "tanh"}
LARGEST = 2**31 - 1  # the largest 32-bit index
GREATEST = 1e30  # limit of a number, finite in float32 too
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 100
_shown.maxlist = _shown.maxdict = _shown.maxtuple = 8


def is_whole(value: Any) -> bool:
    """Returns whether a JSON value is an integer; true and 2.0 are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a number within the range of float32 computations."""
    return (is_whole(value) or isinstance(value, float)) and -GREATEST <= value <= GREATEST


def named_as(values: Mapping[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """Returns `architectures` and `model_type` of a config.json, or of a part of one.

    A config.json of diffusers has neither: its `_class_name` is the architecture.

    Raises:
        ConfigError: they are not strings.
    """
    options = ConfigOptions(values, "config.json")
    named, class_name = options.texts("architectures", ()), options.text("_class_name", None)
    return named or (() if class_name is None else (class_name,)), options.text("model_type", None)


class ConfigOptions:
    """A config.json (or a part of it) that records which options were read.

    Each method but `skip` and `done` takes the option's name and a default for an option that is absent or null.
    Without a default, the option is required. The default is returned unchecked. Each method raises ConfigError, with
    the option, its value and what is expected.

    Args:
        values: the dictionary.
        what: its name in messages, such as "config.json of LlamaForCausalLM".
    """

    def __init__(self, values: Mapping[str, Any], what: str):
        self._values, self._what, self._read = dict(values), what, set(IDLE)

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def size(self, name: str, default: Any = ..., most: int = LARGEST) -> Any:
        """Returns an integer from 1 to `most`."""
        return self._typed(name, default, lambda v: is_whole(v) and 1 <= v <= most, f"a whole number, 1 to {most:,}")

    def count(self, name: str, default: Any = ...) -> Any:
        """Returns an integer that may be 0."""
        return self._typed(
            name, default, lambda v: is_whole(v) and 0 <= v <= LARGEST, f"a whole number, 0 to {LARGEST:,}"
        )

    def sizes(self, name: str, default: Any = ..., most: int = LARGEST) -> Any:
        """Returns one or several integers from 1 to `most`, as a tuple."""
        return self._several(name, default, lambda v: is_whole(v) and 1 <= v <= most, f"whole numbers, 1 to {most:,}")

    def counts(self, name: str, default: Any = ...) -> Any:
        """Returns one or several integers that may be 0, as a tuple."""
        return self._several(name, default, lambda v: is_whole(v) and 0 <= v <= LARGEST, "whole numbers, 0 or more")

    def resolutions(self, name: str, default: Any = ...) -> Any:
        """Returns a list of pairs of sizes, height and width, as a tuple."""

        def fits(pair: Any) -> bool:
            return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(is_whole(v) and v > 0 for v in pair)

        return self._several(name, default, fits, "pairs of whole numbers above 0", alone=False)

    def several_sizes(self, name: str, default: Any = ..., most: int = LARGEST) -> Any:
        """Returns a list of lists of integers from 1 to `most`, as a tuple of tuples."""

        def fits(each: Any) -> bool:
            return isinstance(each, (list, tuple)) and all(is_whole(v) and 1 <= v <= most for v in each)

        value = self._several(name, default, fits, f"lists of whole numbers, 1 to {most:,}", alone=False)
        return tuple(map(tuple, value))

    def integers(self, name: str, default: Any = ...) -> Any:
        """Returns one or several integers, as a tuple, such as layer indices counted from the end."""
        return self._several(name, default, lambda v: is_whole(v) and abs(v) <= LARGEST, "whole numbers")

    def number(self, name: str, default: Any = ..., least: float = -GREATEST, most: float = GREATEST) -> Any:
        """Returns a number; 1 counts as 1.0."""
        where = f", {least:g} to {most:g}"
        return self._typed(name, default, lambda v: is_number(v) and least <= v <= most, f"a number{where}")

    def numbers(self, name: str, default: Any = ...) -> Any:
        """Returns one or several numbers, as a tuple."""
        return self._several(name, default, is_number, "numbers")

    def flag(self, name: str, default: Any = ...) -> Any:
        """Returns true or false."""
        return self._typed(name, default, lambda v: isinstance(v, bool), "true or false")

    def text(self, name: str, default: Any = ...) -> Any:
        return self._typed(name, default, lambda v: isinstance(v, str), "a string")

    def texts(self, name: str, default: Any = ...) -> Any:
        """Returns a list of strings, as a tuple."""
        return self._several(name, default, lambda v: isinstance(v, str), "strings", alone=False)

    def part(self, name: str, default: Any = ...) -> Any:
        """Returns a nested config, as a dictionary."""
        value = self._typed(name, default, lambda v: isinstance(v, Mapping), "an object")
        return dict(value) if isinstance(value, Mapping) else value

    def id(self, name: str, default: Any = None) -> Any:
        """Returns the id of a token. -1, as in files of early LLaMAs, is the same as null."""
        value = self._typed(name, default, lambda v: is_whole(v) and -1 <= v <= LARGEST, "an id, a whole number")
        return default if value == -1 else value

    def ids(self, name: str, default: Any = ()) -> Any:
        """Returns one or several ids of tokens, as a tuple."""
        return self._several(name, default, lambda v: is_whole(v) and 0 <= v <= LARGEST, "one or several ids")

    def only(self, name: str, *allowed: Any, default: Any = ...) -> Any:
        """Returns the option's value, which must be one of the allowed values."""
        value = self._value(name, allowed[0] if default is ... else default)
        for each in allowed:
            if value is each or (value == each and isinstance(value, bool) == isinstance(each, bool)):
                return each
        raise self._refusal(
            name,
            value,
            " or ".join(map(repr, allowed)) or "absent",
            "convert another checkpoint; this option is not supported",
        )

    def activation(self, name: str, known: Mapping[str, str] = ACTIVATIONS, default: str | None = None) -> str:
        """Returns the library's name of an activation in `known`; `default` is such a name too."""
        if default is not None and name not in self:
            return default
        return known[self.only(name, *known)]

    def divided(self, width: str, heads: str) -> None:
        """Raises ConfigError unless the heads divide the width; both have been read."""
        if self._values[width] % self._values[heads]:
            raise self._refusal(heads, self._values[heads], f"a divisor of {width}={self._values[width]!r}")

    def skip(self, *names: str) -> None:
        """Marks options that do not change what this module computes, such as ids for generation."""
        self._read.update(names)

    def done(self) -> None:
        """Refuses options that were not read: an option that is not known to be harmless may change the result.

        In a config.json of diffusers, names that begin with "_" are its own records of the file.

        Raises:
            ConfigError: there are such options; lists them.
        """
        self.only("pruned_heads", {})
        given = {name: value for name, value in self._values.items() if value is not None}
        if "_class_name" in given:
            given = {name: value for name, value in given.items() if not name.startswith("_")}
        unread = {name: value for name, value in given.items() if name not in self._read}
        if unread:
            listed = ", ".join(f"{name}={_shown.repr(value)}" for name, value in sorted(unread.items()))
            raise ConfigError(
                f"{self._what} with {listed}",
                "options that are supported",
                "remove those without effect on the model, else convert another checkpoint",
            )

    def _value(self, name: str, default: Any) -> Any:
        self._read.add(name)
        value = self._values.get(name)
        if value is None and default is ...:
            raise ConfigError(f"{self._what} without {name!r}", "a complete config.json", "restore it from its origin")
        return default if value is None else value

    def _typed(self, name: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        value = self._value(name, default)
        if name in self and not fits(value):
            raise self._refusal(name, value, expected)
        return value

    def _several(self, name: str, default: Any, fits: Callable[[Any], bool], expected: str, alone: bool = True) -> Any:
        value = self._value(name, default)
        if name not in self:
            return value
        listed = tuple(value) if isinstance(value, (list, tuple)) else (value,) if alone else None
        if listed is None or not all(map(fits, listed)):
            raise self._refusal(name, value, expected)
        return listed

    def _refusal(self, name: str, value: Any, expected: str, todo: str = "restore it from its origin") -> ConfigError:
        return ConfigError(f"{self._what}: {name}={_shown.repr(value)}", f"{name} to be {expected}", todo)
