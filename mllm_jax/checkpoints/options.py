"""Reading a config.json so that every option in it is honoured or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_jax.errors import ConfigError

# Options that say nothing about what a model computes when it is applied.
# fmt: off
_NEUTRAL = frozenset((
    "_name_or_path", "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "initializer_range", "output_attentions", "output_hidden_states", "return_dict", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "attention_dropout", "hidden_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "dropout", "activation_dropout",
    "layerdrop", "dropout_rate", "classifier_dropout", "chunk_size_feed_forward", "pretraining_tp", "problem_type",
    "id2label", "label2id", "is_encoder_decoder", "is_decoder", "add_cross_attention", "cross_attention_hidden_size",
    "tie_encoder_decoder", "torchscript", "gradient_checkpointing", "_model_name_or_path",
))
# fmt: on


class Options:
    """A config.json (or a part of it) that remembers what was asked of it.

    Args:
        values: the dictionary.
        what: how to name it in a message, such as "config.json of LlamaForCausalLM".
    """

    def __init__(self, values: Mapping[str, Any], what: str):
        self._values, self._what, self._read = dict(values), what, set(_NEUTRAL)

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def __call__(self, name: str, default: Any = ...) -> Any:
        """The option's value; the default where it is absent or null.

        Raises:
            ConfigError: it is absent and there is no default.
        """
        self._read.add(name)
        value = self._values.get(name)
        if value is None and default is ...:
            raise ConfigError(f"{self._what} without {name!r}", "a complete config.json", "restore it from its origin")
        return default if value is None else value

    def only(self, name: str, *allowed: Any, default: Any = ...) -> Any:
        """The option's value, which must be one of those that are implemented.

        Raises:
            ConfigError: another value; names the option, the value and what is supported.
        """
        value = self(name, allowed[0] if default is ... else default)
        if value not in allowed:
            raise ConfigError(
                f"{self._what}: {name}={value!r}",
                f"{name} to be " + (" or ".join(map(repr, allowed)) or "absent"),
                "convert another checkpoint; this option is not supported",
            )
        return value

    def skip(self, *names: str) -> None:
        """Marks options that do not change what the module computes, such as ids for generation."""
        self._read.update(names)

    def done(self) -> None:
        """Refuses options that nobody has read: what is not known to be harmless may change the result.

        Raises:
            ConfigError: lists them.
        """
        unread = {name: value for name, value in self._values.items() if name not in self._read and value is not None}
        if unread:
            listed = ", ".join(f"{name}={value!r}" for name, value in sorted(unread.items()))
            raise ConfigError(
                f"{self._what} with {listed}",
                "options that are supported",
                "remove those that have no effect on the model, else convert another checkpoint",
            )
