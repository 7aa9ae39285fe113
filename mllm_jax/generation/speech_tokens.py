"""The special tokens and the settings of a Whisper's texts, from generation_config.json and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm_jax.data.chat_tokenizer import GENERATION, ChatTokenizer
from mllm_jax.data.processing.languages import WITHOUT_SPACES, language_code
from mllm_jax.errors import ConfigError
from mllm_jax.generation.speech_options import SpeechOptions
from mllm_jax.generation.timestamp_rules import Rules
from mllm_jax.models.whisper import WhisperConfig

TASKS = ("transcribe", "translate")


@dataclass(frozen=True)
class SpeechTokens:
    """Tokens and settings.

    Attributes:
        start: the first token of a text.
        previous: the token before the text that precedes the audio, or None.
        languages, tasks: the tokens by code of the language, such as "de", and by task; empty for English alone.
        rules: of the texts.
        heads: the (layer, head) pairs whose attention aligns a text with its audio.
        most: the most tokens of a text with its prompt.
    """

    start: int
    previous: int | None
    languages: Mapping[str, int]
    tasks: Mapping[str, int]
    rules: Rules
    heads: tuple[tuple[int, int], ...]
    most: int

    @classmethod
    def read(cls, config: WhisperConfig, tokenizer: ChatTokenizer) -> SpeechTokens:
        """Reads them.

        Raises:
            ConfigError: a setting of generation_config.json has another form, or ids that the model lacks.
        """
        given, llm = tokenizer.generation, config.llm

        def number(name: str, default: int | None) -> int | None:
            value = given.get(name)
            value = default if value is None else value
            if value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
                raise _wrong(name, value, "an integer from 0")
            return value

        def token(name: str, default: int | None) -> int | None:
            value = number(name, default)
            if value is not None and value >= llm.vocab_size:
                raise _wrong(name, value, f"an id below {llm.vocab_size}")
            return value

        def tokens(name: str, default: Any) -> tuple[int, ...]:
            value = given.get(name, default)
            value = () if value is None else value
            if not isinstance(value, (list, tuple)) or not all(type(id) is int for id in value):
                raise _wrong(name, value, "a list of ids")
            return tuple(value)

        def named(name: str) -> dict[str, int]:
            value = given.get(name) or {}
            if not isinstance(value, Mapping) or not all(type(id) is int for id in value.values()):
                raise _wrong(name, value, "ids by name")
            if strange := [id for id in value.values() if not 0 <= id < llm.vocab_size]:
                raise _wrong(name, strange[0], f"ids below {llm.vocab_size}")
            return {key.removeprefix("<|").removesuffix("|>"): id for key, id in value.items()}

        def own(text: str) -> int | None:
            found = tokenizer.id_of(text)
            return found if found is not None and found < llm.vocab_size else None

        ends = given.get("eos_token_id", llm.eos_token_id)
        ends = [ends] if type(ends) is int else list(ends or llm.eos_token_id)
        if not ends:
            raise _wrong("eos_token_id", None, "the token that ends a text")
        multilingual = given.get("is_multilingual", True)
        heads = given.get("alignment_heads") or []
        pairs = isinstance(heads, list) and all(
            isinstance(p, list) and [type(n) for n in p] == [int] * 2 for p in heads
        )
        if not pairs:
            raise _wrong("alignment_heads", heads, "a list of pairs of a layer and a head")
        rules = Rules(
            vocab_size=llm.vocab_size,
            end=ends[0],
            no_times=token("no_timestamps_token_id", own("<|notimestamps|>")),
            latest_first=number("max_initial_timestamp_index", None),
            suppressed=tokens("suppress_tokens", config.suppress_tokens),
            suppressed_first=tokens("begin_suppress_tokens", config.begin_suppress_tokens),
        )
        return cls(
            start=token("decoder_start_token_id", llm.decoder_start_token_id),
            previous=token("prev_sot_token_id", own("<|startofprev|>")),
            languages=named("lang_to_id") if multilingual else {},
            tasks=named("task_to_id") if multilingual else {},
            rules=rules,
            heads=tuple(tuple(pair) for pair in heads),
            most=min(number("max_length", None) or llm.max_position_embeddings, llm.max_position_embeddings),
        )

    @property
    def no_speech(self) -> int | None:
        """The token whose probability after `start` is that of no speech."""
        return None if self.rules.no_times is None else self.rules.no_times - 1

    def language(self, given: str | None) -> str | None:
        """Returns the code of the language of a request: None if it must be detected.

        Raises:
            ConfigError: the model does not have it.
        """
        code = None if given is None else language_code(given)
        known = self.languages or {"en": None}
        if code is not None and code not in known:
            raise ConfigError(
                f"the language {given!r:.60}",
                f"one of {', '.join(sorted(known))}",
                "take another language, or a model with it",
            )
        return code if self.languages else "en"

    def require(self, options: SpeechOptions) -> None:
        """Refuses a task, timestamps or a prompt that the model does not have."""
        task, timestamps = options.task, options.timestamps
        if (options.prompt or options.condition_on_previous) and self.previous is None:
            raise ConfigError(
                f"a prompt for a model whose {GENERATION} has no prev_sot_token_id",
                "a model with a token before earlier text",
                "fetch the file again, or leave out prompt and condition_on_previous",
            )
        if task not in TASKS or (task not in self.tasks and task != "transcribe"):
            raise ConfigError(
                f"task={task!r:.60}",
                f"one of {', '.join(map(repr, [name for name in TASKS if name in self.tasks] or TASKS[:1]))}",
                "change the task; a translation needs a multilingual model",
            )
        if timestamps not in (None, "segment", "word"):
            raise ConfigError(f"timestamps={timestamps!r:.60}", "None, 'segment' or 'word'", "change it")
        if timestamps is not None and self.rules.no_times is None:
            raise ConfigError(
                f"timestamps={timestamps!r} of a model whose {GENERATION} has no no_timestamps_token_id",
                "a model with tokens of time",
                "fetch the file again, or leave timestamps out",
            )
        if timestamps == "word" and not self.heads:
            raise ConfigError(
                f"word timestamps of a model whose {GENERATION} has no alignment_heads",
                "the (layer, head) pairs that follow the audio",
                "fetch the file again, or ask for 'segment'",
            )

    def prompt(self, language: str, task: str, timed: bool) -> tuple[int, ...]:
        """Returns the tokens with which a text begins."""
        found = [self.start]
        if self.languages:
            found.append(self.languages[language])
        if task in self.tasks:
            found.append(self.tasks[task])
        if not timed and self.rules.no_times is not None:
            found.append(self.rules.no_times)
        return tuple(found)


def has_spaces(language: str) -> bool:
    """Returns whether a language has spaces between words."""
    return language not in WITHOUT_SPACES


def _wrong(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{GENERATION} with {name}={value!r:.100}", expected, "fetch the file again")
