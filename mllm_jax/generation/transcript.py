"""A transcript and its parts, and the same as text, subtitles or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Word:
    """A word with its punctuation.

    Attributes:
        start, end: seconds.
        probability: mean probability of its tokens.
    """

    start: float
    end: float
    text: str
    probability: float


@dataclass(frozen=True)
class Segment:
    """A stretch of speech, such as a sentence.

    Attributes:
        start, end: seconds.
        words: if they were asked for; else empty.
        no_speech_probability: that its window of audio has no speech.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...] = ()
    no_speech_probability: float | None = None


@dataclass(frozen=True)
class Transcript:
    """A text of audio.

    Attributes:
        language: code such as "en", as given or detected.
        language_probability: of the detected language; None if it was given or the model has one language.
    """

    text: str
    language: str
    language_probability: float | None
    segments: tuple[Segment, ...]


def formatted(transcript: Transcript, form: str) -> str:
    """Returns a transcript as "txt" (a segment a line), "srt", "vtt" or "json"; a text ends with a new line."""
    return FORMATS[form](transcript)


def _txt(transcript: Transcript) -> str:
    return "".join(f"{segment.text}\n" for segment in transcript.segments)


def _srt(transcript: Transcript) -> str:
    cues = (f"{i}\n{cue}" for i, cue in enumerate(_cues(transcript, ","), start=1))
    return "\n".join(cues)


def _vtt(transcript: Transcript) -> str:
    return "\n".join(["WEBVTT\n", *_cues(transcript, ".")])


def _json(transcript: Transcript) -> str:
    return json.dumps(asdict(transcript), ensure_ascii=False, indent=2) + "\n"


FORMATS = {"txt": _txt, "srt": _srt, "vtt": _vtt, "json": _json}


def _cues(transcript: Transcript, point: str) -> Iterator[str]:
    """Yields a cue for each segment, or for each word if there are words."""
    for segment in transcript.segments:
        for part in segment.words or (segment,):
            text = part.text.strip().replace("-->", "->")
            yield f"{clock(part.start, point)} --> {clock(part.end, point)}\n{text}\n"


def clock(seconds: float, point: str = ".") -> str:
    """Returns hours:minutes:seconds.milliseconds."""
    minutes, milliseconds = divmod(round(seconds * 1_000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1_000:02}{point}{milliseconds % 1_000:03}"
