"""Media that a model produces: signal or query tokens in the text of an answer, and the targets of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from mllm_jax.data.message import Part
from mllm_jax.data.processing.captions import Captions
from mllm_jax.data.processing.media import TEXT, Lazy, PreparedMedia
from mllm_jax.errors import ConfigError, DataError


@dataclass(frozen=True)
class Produced:
    """A medium of an answer, which the model produces.

    Attributes:
        learned: whether the model learns from it; False: it is part of a prompt.
    """

    part: Part
    learned: bool = True


@dataclass(frozen=True)
class SignalTokens:
    """The conversion of a medium that the model produces.

    Attributes:
        modality: "image", "video" or "audio".
        ids: of the tokens in the text: with markers the begin token, the signals, and the end token.
        markers: whether a begin token comes before the signals and an end token after them. The model then writes only
            the begin token itself; the others follow it.
        shape, dtype: of the target.
        target: returns the target of a medium.
        captions: the conversion of captions for the generator's text encoder.
    """

    modality: str
    ids: tuple[int, ...]
    markers: bool
    shape: tuple[int, ...]
    dtype: str
    target: Callable[[Part], np.ndarray]
    captions: Captions

    tokens = 0  # the LLM reads no encoder's vectors for them

    @property
    def unit(self) -> str:
        """The content of a slot, for messages."""
        return f"{self.modality} to produce"

    @property
    def blank(self) -> Mapping[str, np.ndarray]:
        """The arrays of an empty slot by their names in a batch."""
        return {
            f"{self.modality}_targets": np.zeros(self.shape, self.dtype),
            f"{self.modality}_captions": np.zeros(self.captions.length, np.int32),
        }

    @cached_property
    def empty(self) -> np.ndarray:
        """The ids int[length] of an empty caption."""
        return self.captions.padded("")

    def media(self, part: Part, token: int, learned: bool = True) -> PreparedMedia:
        """Implements `Conversion`; without `learned` there are only the tokens."""
        targets, captions = self.blank
        read = {targets: partial(self.target, part), captions: partial(self._caption, part)} if learned else {}
        count = len(self.ids)
        carried = np.ones(count, np.float32)
        carried[1:] = not self.markers
        return PreparedMedia(
            Lazy(tuple(read), lambda name: read[name]()[None]),
            np.asarray(self.ids),
            np.full(count, TEXT),
            count=int(learned),
            modality=f"{self.modality}_targets",
            carried=carried,
            signals=np.arange(count)[1:-1] if self.markers else np.arange(count),
        )

    def _caption(self, part: Part) -> np.ndarray:
        """Returns the ids int[length] of a medium's caption. Raises DataError: it has none."""
        if not (part.caption or "").strip():
            raise DataError(
                f"{self.unit} without a caption",
                f"{type(part).__name__}(source, caption=...): the generator's text encoder reads it",
                "give it one, or drop the record",
            )
        return self.captions.padded(part.caption)

    def fingerprint(self) -> str:
        """Returns a text that differs if the rows would."""
        return repr([self.modality, self.ids, self.markers, self.shape, self.captions.fingerprint()])


def signal_names(modality: str, count: int, markers: bool) -> tuple[str, ...]:
    """Returns the signal tokens of a modality as text, such as <image_0>, with their markers."""
    names = tuple(f"<{modality}_{number}>" for number in range(count))
    return (f"<begin_{modality}>", *names, f"<end_{modality}>") if markers else names


def ids_of(tokenizer: Any, names: Sequence[str], where: str) -> tuple[int, ...]:
    """Returns the ids of signal tokens.

    Raises:
        ConfigError: the tokenizer lacks one.
    """
    found = [tokenizer.id_of(name) for name in names]
    if missing := [name for name, number in zip(names, found, strict=True) if number is None]:
        raise ConfigError(
            f"{where}: a tokenizer without {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}",
            f"special tokens {names[0]} to {names[-1]}",
            "take the tokenizer of the run that trained the model, or begin a run, which adds them",
        )
    return tuple(found)
