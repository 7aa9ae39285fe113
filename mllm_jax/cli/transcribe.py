"""`mllm transcribe`: the speech of recordings as text, subtitles or JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mllm_jax.cli.caches import keep_compiled_programs
from mllm_jax.cli.progress import Count
from mllm_jax.errors import ConfigError, MllmError
from mllm_jax.generation.speech_options import TEMPERATURES, SpeechOptions

if TYPE_CHECKING:
    from mllm_jax.generation.transcript import Segment, Transcript

# Names of the files that are taken from a folder.
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".mp4", ".mov", ".mkv", ".webm", ".aiff")


@dataclass(frozen=True)
class Transcribe:
    """Writes down the speech of recordings of any length, with Whisper.

    Without --out the transcript is printed: as text, segment by segment.

    Attributes:
        recordings: files of sound or video, folders of such files, or - for a file on standard input.
        model: a Whisper folder of Hugging Face.
        language: name or code, such as german or de; default: detected.
        task: write down what is said, or translate it into English.
        format: of the transcript; srt and vtt are subtitles.
        timestamps: times of segments, or also of words; default: segment, except for txt.
        beams: number of beams of beam search.
        temperatures: of the attempts at a text; the next one is made if a text repeats itself or is improbable.
        batch_size: number of recordings that are transcribed together.
        prompt: a text that precedes the recording, for its spelling and names.
        condition_on_previous: read the text of the windows before.
        voice_activity: pass over silence.
        out: the folder for the transcripts, a file each; required for several recordings, except as txt.
        overwrite: replace existing transcripts.
        dtype: of the computation; default: as in the folder.
    """

    recordings: tyro.conf.Positional[tuple[str, ...]]
    model: Path
    language: str | None = None
    task: Literal["transcribe", "translate"] = "transcribe"
    format: Literal["txt", "srt", "vtt", "json"] = "txt"
    timestamps: Literal["segment", "word"] | None = None
    beams: int = 1
    temperatures: tuple[float, ...] = TEMPERATURES
    batch_size: int = 8
    prompt: str | None = None
    condition_on_previous: bool = False
    voice_activity: bool = False
    out: Path | None = None
    overwrite: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @property
    def speech(self) -> SpeechOptions:
        """The options of the library's call."""
        shared = {field.name for field in fields(SpeechOptions)} & {field.name for field in fields(self)}
        given = {name: getattr(self, name) for name in shared}
        given["timestamps"] = self.timestamps or (None if self.format == "txt" else "segment")
        return SpeechOptions(**given)


@dataclass(frozen=True)
class Given:
    """A recording that is given, and the file for its transcript, if there is one; a path of None is standard input."""

    path: Path | None
    out: Path | None

    @property
    def name(self) -> str:
        return "standard input" if self.path is None else str(self.path)


def run(arguments: list[str]) -> int:
    options = tyro.cli(Transcribe, args=arguments, prog="mllm transcribe")
    speech = options.speech
    recordings = list(_recordings(options))
    _check(options, recordings)
    keep_compiled_programs()

    from mllm_jax.data.audio import audio_length
    from mllm_jax.generation.transcribe import Transcriber, no_speech
    from mllm_jax.models.registry import pretrained_config
    from mllm_jax.models.whisper import WhisperConfig

    sources = [sys.stdin.buffer.read() if recording.path is None else recording.path for recording in recordings]
    config = pretrained_config(options.model)
    if not isinstance(config, WhisperConfig):  # checked before the weights are read
        raise no_speech(config)
    transcriber = Transcriber.load(options.model, dtype=options.dtype)
    rate, seconds = transcriber.mel.rate, 0.0
    for source in sources:
        try:
            seconds += audio_length(source, rate) / rate
        except MllmError:  # reported when the recording's turn comes
            continue
    streamed = options.out is None and len(recordings) == 1 and options.format == "txt"
    failed = 0
    with Count("seconds", max(round(seconds), 1)) as progress:
        found = transcriber.transcripts(
            sources, speech, _print if streamed else None, lambda done: progress.update(round(done))
        )
        for index, outcome in found:
            if isinstance(outcome, MllmError):
                failed += 1
                progress.message(f"{recordings[index].name}: {outcome}")
            elif not streamed:
                _write(options, recordings[index], outcome, len(recordings) > 1)
    return 1 if failed else 0


def _recordings(options: Transcribe) -> Iterator[Given]:
    for name in options.recordings:
        path = Path(name)
        if name == "-":
            yield Given(None, _out(options, Path("stdin")))
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not files:
                wanted = f"files ending in {', '.join(SUFFIXES)}"
                raise ConfigError(f"{path} without files of sound", wanted, "name the files themselves")
            for file in files:
                yield Given(file, _out(options, file.relative_to(path)))
        elif not path.exists():
            raise ConfigError(f"{path}, which does not exist", "a file, a folder or -", "check the path")
        else:
            yield Given(path, _out(options, Path(path.name)))


def _out(options: Transcribe, name: Path) -> Path | None:
    return None if options.out is None else options.out / name.with_suffix(f".{options.format}")


def _check(options: Transcribe, recordings: list[Given]) -> None:
    """Refuses transcripts that would be lost or mixed, before anything is loaded."""
    if not recordings:
        raise ConfigError("mllm transcribe without a recording", "files, folders or -", "name them")
    if [recording.path for recording in recordings].count(None) > 1:
        raise ConfigError("standard input twice", "- once", "name the recordings")
    if options.out is None:
        if len(recordings) > 1 and options.format != "txt":
            raise ConfigError(
                f"{len(recordings)} recordings as {options.format} without --out", "a folder for them", "add --out DIR"
            )
        return
    outs = [recording.out for recording in recordings]
    if twice := [out for out in outs if outs.count(out) > 1]:
        raise ConfigError(f"two recordings with the transcript {twice[0]}", "a transcript each", "rename one of them")
    existing = [out for out in outs if out is not None and out.exists()]
    if existing and not options.overwrite:
        raise ConfigError(
            f"{existing[0]}, which exists" + (f", and {len(existing) - 1} more" if len(existing) > 1 else ""),
            "a folder without these transcripts",
            "name another with --out, or add --overwrite",
        )


def _print(_: int, segment: Segment) -> None:
    print(segment.text, flush=True)


def _write(options: Transcribe, recording: Given, transcript: Transcript, several: bool) -> None:
    """Writes a transcript to its file, or prints it."""
    from mllm_jax.files import write_atomic
    from mllm_jax.generation.transcript import formatted

    text = formatted(transcript, options.format)
    if recording.out is None:
        print(f"{recording.name}\n{text}" if several else text, end="\n" if several else "", flush=True)
        return
    recording.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(recording.out, text.encode())
