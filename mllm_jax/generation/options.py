"""The options of an answer, and the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mllm_jax.checkpoints.fields import field_value
from mllm_jax.errors import ConfigError
from mllm_jax.generation.sampling import Sampling


@dataclass(frozen=True)
class Options:
    """The length and the end of an answer, and the search for it.

    Attributes:
        max_new_tokens: an answer is cut off after this many tokens.
        stop_tokens: ids that end an answer, in addition to the model's end tokens.
        stop_strings: texts that end an answer; it is cut before them.
        ignore_eos: continue after the model's end tokens.
        num_beams: the number of beams of beam search; 1 is no beam search.
        length_penalty: a finished beam's score is its log probability / length^length_penalty.
        early_stopping: beam search ends once num_beams beams have finished. False: once the best running beam, scored
            at its current length, is below the worst of them.
        logprobs: also return each token's log probability under the model, before temperature and filters.
    """

    max_new_tokens: int = 256
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    logprobs: bool = False

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.num_beams < 1 or "" in self.stop_strings:
            raise ConfigError(
                f"{self}", "max_new_tokens and num_beams >= 1, stop_strings with text", "change the option"
            )
        if self.num_beams > 1 and (self.stop_strings or self.logprobs):
            raise ConfigError(
                f"num_beams={self.num_beams} with stop_strings={self.stop_strings}, logprobs={self.logprobs}",
                "beam search without either: it compares whole answers",
                "drop them, or set num_beams to 1",
            )

    def check(self, sampling: Sampling) -> None:
        """Refuses a sampling that contradicts these options."""
        if self.num_beams > 1 and sampling.temperature > 0:
            raise ConfigError(
                f"num_beams={self.num_beams} with temperature {sampling.temperature}",
                "beam search, or sampling",
                "set the temperature to 0, or num_beams to 1",
            )


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: the answer without its end token or stop string.
        tokens: its ids without the end token, with those that spell a stop string.
        logprobs: natural log of each token's probability, if asked for.
        reason: "stop": it ended at an end token or stop string; "length": it was cut off; "incomplete": see
            `mllm_jax.generation.produce.Producing`.
        media: what a generator made, a `Media` for each mark such as "<image 1>" in the text.
        stop_token: the end token that ended it, which is not among `tokens`; None: another reason.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    reason: str = "stop"
    media: tuple[Any, ...] = ()
    stop_token: int | None = field(default=None, compare=False, repr=False)


def longest_text(config, asked: int | None = None) -> int | None:
    """Returns the most tokens of a text with its answer: `asked`, or the LLM's training length; None is no bound.

    Raises:
        ConfigError: `asked` is more than the LLM can read.
    """
    bound = field_value(config, "longest")
    if asked is not None and bound is not None and asked > bound:
        raise ConfigError(
            f"max_length {asked} for a {config.family}", f"at most {bound}: it reads no longer text", "lower max_length"
        )
    return asked or getattr(config, "max_position_embeddings", None)


def read_options(given: Mapping[str, Any]) -> tuple[Options, Sampling]:
    """Sorts options by name; `stop` is one text or several.

    Raises:
        ConfigError: an option does not exist, or its value is refused.
    """
    given = dict(given)
    if (stop := given.pop("stop", None)) is not None:
        given["stop_strings"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if (stops := given.get("stop_tokens")) is not None:
        given["stop_tokens"] = (stops,) if isinstance(stops, int) else tuple(stops)
    names = {kind: {field.name for field in fields(kind)} for kind in (Options, Sampling)}
    if unknown := sorted(given.keys() - names[Options] - names[Sampling]):
        known = sorted(names[Options] | names[Sampling] | {"stop"} - {"stop_strings"})
        raise ConfigError(f"generation with {', '.join(unknown)}", f"some of {', '.join(known)}", "correct the name")
    options, sampling = (kind(**{n: given[n] for n in given if n in names[kind]}) for kind in (Options, Sampling))
    return options, sampling
