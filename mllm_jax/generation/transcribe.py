"""Transcribes recordings of any length with Whisper: many at a time, window by window."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_jax.data.audio import Source
from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.processing.audio import LogMel, read_audio_processor
from mllm_jax.data.processing.mel_windows import MelWindows
from mllm_jax.errors import ConfigError, MllmError
from mllm_jax.generation.alignment import token_positions
from mllm_jax.generation.long_form import Piece, Recording, cut
from mllm_jax.generation.program import bucket, placed
from mllm_jax.generation.rows import rows_for
from mllm_jax.generation.speech_options import Attempt, SpeechOptions
from mllm_jax.generation.speech_steps import Heard, SpeechProgram, SpeechTexts
from mllm_jax.generation.speech_tokens import SpeechTokens, has_spaces
from mllm_jax.generation.transcript import Segment, Transcript, Word
from mllm_jax.generation.words import split_words
from mllm_jax.models.registry import from_pretrained
from mllm_jax.models.whisper import Whisper
from mllm_jax.sharding.hosts import fetch

CERTAIN = 0.5  # temperature below which a text is certain enough to be part of the next prompt


class Transcriber:
    """Whisper with its tokenizer and settings.

    In float32 a recording gets the same transcript alone and among others.

    Args:
        mel: the features of the folder.
        mesh: the mesh over which params are sharded, or None.
    """

    def __init__(
        self, model: Whisper, params: dict, tokenizer: ChatTokenizer, mel: LogMel, *, mesh: Mesh | None = None
    ):
        config = model.config
        self.model, self.params, self.tokenizer, self.mesh = model, params, tokenizer, mesh
        self.mel = dataclasses.replace(mel, padding="max_length", truncation=True)
        self.frames = 2 * config.audio.max_source_positions
        made = mel.feature_size, mel.chunk_samples // mel.hop_length
        if made != (config.audio.num_mel_bins, self.frames):
            raise ConfigError(
                f"features of {made[0]} bands and {made[1]} frames",
                f"{config.audio.num_mel_bins} bands and {self.frames} frames, which the encoder reads",
                "restore preprocessor_config.json",
            )
        self.tokens = SpeechTokens.read(config, tokenizer)
        self._program = SpeechProgram(model, params, self.tokens.rules, self.tokens.heads, mesh)

    @classmethod
    def load(cls, folder: str | Path, *, mesh: Mesh | None = None, dtype: Any = None) -> Transcriber:
        """Loads a Whisper folder. Raises as `mllm_jax.from_pretrained`; DataError: it has no tokenizer."""
        tokenizer, mel = ChatTokenizer.load(folder), read_audio_processor(folder)
        model, params = from_pretrained(folder, dtype=dtype, mesh=mesh)
        return cls(model, params, tokenizer, mel, mesh=mesh)

    def with_params(self, params: dict) -> Transcriber:
        """Returns the same with other parameters; both share the compiled functions."""
        other = copy.copy(self)
        other.params, other._program = params, self._program.of(params)
        return other

    def transcribe(
        self,
        audio: Source | list[Source],
        on_segment: Callable[..., Any] | None = None,
        on_progress: Callable[[float], Any] | None = None,
        **options: Any,
    ) -> Transcript | list[Transcript]:
        """Transcribes a recording, or a list of recordings; see `Transcribes`."""
        if unknown := options.keys() - {field.name for field in dataclasses.fields(SpeechOptions)}:
            names = ", ".join(field.name for field in dataclasses.fields(SpeechOptions))
            raise ConfigError(f"transcribe({sorted(unknown)[0]}=...)", f"options among {names}", "correct the name")
        several = isinstance(audio, list)
        alone = on_segment if several or on_segment is None else lambda _, segment: on_segment(segment)
        sources = audio if several else [audio]
        found = {}
        for index, outcome in self.transcripts(sources, SpeechOptions(**options), alone, on_progress):
            if isinstance(outcome, MllmError):
                raise outcome
            found[index] = outcome
        return [found[index] for index in range(len(sources))] if several else found[0]

    def transcripts(
        self,
        sources: Iterable[Source],
        options: SpeechOptions,
        on_segment: Callable[[int, Segment], Any] | None = None,
        on_progress: Callable[[float], Any] | None = None,
    ) -> Iterator[tuple[int, Transcript | MllmError]]:
        """Transcribes recordings, and yields each when it is done.

        Args:
            sources: of which `batch_size` are open at a time.
            on_segment: called with the recording's position and each segment, in its order.
            on_progress: called with the seconds of all recordings that are done.

        Yields:
            The position of a recording, and its transcript or the error of its sound.
        """
        self.tokens.require(options)
        language = self.tokens.language(options.language)
        waiting, active, done = iter(enumerate(sources)), [], 0.0
        while True:
            while len(active) < options.batch_size and (given := next(waiting, None)) is not None:
                try:
                    recording = self._open(*given, language, options)
                except MllmError as error:
                    yield given[0], error
                    continue
                active.append(recording)
            if not active:
                return
            if options.voice_activity:
                for recording in active:
                    recording.skip_silence()
            if going := [recording for recording in active if not recording.done]:
                self._advance(going, options, on_segment)
            for recording in [recording for recording in active if recording.done]:
                active.remove(recording)
                done += recording.windows.seconds
                yield recording.index, self._transcript(recording)
            if on_progress is not None:
                on_progress(done + sum(recording.seconds_done for recording in active))

    def _open(self, index: int, source: Source, language: str | None, options: SpeechOptions) -> Recording:
        windows = MelWindows(source, self.mel)
        timed = options.timestamps is not None or windows.frames > self.frames
        if timed and self.tokens.rules.no_times is None:
            raise ConfigError(
                f"a recording of {windows.seconds:.1f} seconds for a model without tokens of time",
                f"at most {self.mel.chunk_length} seconds",
                "cut it, or take a model with them",
            )
        recording = Recording(
            index, windows, self.frames, self.mel.hop_length / self.mel.rate, timed=timed, language=language
        )
        recording.conditioned = options.condition_on_previous
        if options.prompt:
            recording.prompt = tuple(self.tokenizer.words(" " + options.prompt.strip()))
            recording.history.append(recording.prompt)
        return recording

    def _transcript(self, recording: Recording) -> Transcript:
        found = recording.language, recording.language_probability, tuple(recording.segments)
        return Transcript(self._text(recording.said), *found)

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in tokens if token < self.tokens.rules.end]).strip()

    # ---- one window of each recording

    def _advance(self, rows: list[Recording], options: SpeechOptions, on_segment) -> None:
        """Transcribes the next window of each recording."""
        width = rows_for(len(rows), options.batch_size)
        features = np.zeros((width, self.mel.feature_size, self.frames), np.float32)
        for place, row in enumerate(rows):
            features[place] = row.features
        heard = self._program.hear(self._program.params, placed(features, self.mesh))
        silent = self._listen(rows, heard, width)
        prompts = [self._before(row) + list(self.tokens.prompt(row.language, options.task, row.timed)) for row in rows]
        attempts = self._attempts(rows, prompts, heard, silent, options)
        for place, (row, attempt) in enumerate(zip(rows, attempts, strict=True)):
            if not options.is_silent(attempt, silent[place]):
                segments = self._segments(row, attempt, prompts[place], silent[place], heard, place, options)
                for segment in segments if on_segment is not None else ():
                    on_segment(row.index, segment)
            else:
                row.seek += row.frames

    def _before(self, row: Recording) -> list[int]:
        """Returns the part of a prompt that precedes the audio."""
        most = self.model.config.llm.max_position_embeddings // 2 - 1
        found = row.before(self.tokens.rules.times, most) if row.conditioned else row.prompt[-most:]
        return [self.tokens.previous, *found] if found else []

    def _listen(self, rows: list[Recording], heard: Heard, width: int) -> list[float | None]:
        """Detects missing languages, and returns the probabilities that the windows have no speech."""
        start, silence, known = self.tokens.start, self.tokens.no_speech, self.tokens.languages
        wanted = (start if silence is None else silence, *known.values())

        def probabilities(prompts: list[list[int]]) -> np.ndarray:
            batch = self._batch(prompts, [False] * len(prompts), heard, width)
            return fetch(self._program.probabilities(self._program.params, batch, wanted=wanted))

        prompts = [[*self._before(row), start] for row in rows]
        found = probabilities(prompts)
        if any(row.language is None for row in rows):
            alone = found if all(len(prompt) == 1 for prompt in prompts) else probabilities([[start]] * len(rows))
            for row, likely in zip(rows, alone[:, 1:], strict=False):
                if row.language is None:
                    row.language = list(known)[likely.argmax()]
                    row.language_probability = float(likely.max() / likely.sum())
        return [None if silence is None else float(row[0]) for row in found[: len(rows)]]

    def _batch(self, prompts: list[list[int]], timed: list[bool], heard: Heard, width: int) -> dict[str, Any]:
        most = self.model.config.llm.max_position_embeddings
        longest = bucket(max(map(len, prompts)), most, least=8)
        tokens, segments = (np.zeros((width, longest), np.int32) for _ in range(2))
        segments[:, 0] = 1  # a row without a prompt still reads one token
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], segments[row, : len(prompt)] = prompt, 1
        arrays = dict(tokens=tokens, segments=segments, timed=np.array(timed + [False] * (width - len(timed))))
        return {name: placed(array, self.mesh) for name, array in arrays.items()} | dict(heard=heard)

    # ---- texts of windows

    def _attempts(
        self, rows: list[Recording], prompts: list[list[int]], heard: Heard, silent: list, options: SpeechOptions
    ) -> list[Attempt]:
        """Writes a text for each window: those that fail a test again, at the next temperature."""
        width = rows_for(len(rows), options.batch_size)
        batch = self._batch(prompts, [row.timed for row in rows], heard, width)
        attempts: list[Any] = [None] * len(rows)
        missing, size = list(range(len(rows))), self.tokens.rules.vocab_size
        for temperature in options.temperatures:
            texts = self._texts(rows, prompts, batch, missing, temperature, options)
            tokens, counts, logprobs = (fetch(x) for x in (texts.tokens, texts.counts, texts.logprobs))
            for place in missing:
                said = tuple(tokens[place, : counts[place]].tolist())
                attempts[place] = Attempt(said, float(logprobs[place]) / max(len(said), 1), temperature)
            missing = [place for place in missing if options.fails(attempts[place], silent[place], size)]
            if not missing:
                break
        for row, attempt in zip(rows, attempts, strict=True):
            row.conditioned = options.condition_on_previous and attempt.temperature < CERTAIN
        return attempts

    def _texts(self, rows, prompts, batch, missing: list[int], temperature: float, options) -> SpeechTexts:
        """Writes the missing texts at one temperature; the others stay empty."""
        most, width = self.model.config.llm.max_position_embeddings, batch["tokens"].shape[0]
        limits, indices = (np.zeros(width, np.int32) for _ in range(2))
        for place in missing:
            length = len(prompts[place])
            limits[place] = min(self.tokens.most + min(length, most // 2 - 1), most) - length
            indices[place] = rows[place].seek
        limits, indices = placed(limits, self.mesh), placed(indices, self.mesh)
        params, sizes = self._program.params, dict(room=most, new=most)
        if temperature == 0 and options.beams > 1:
            return self._program.search(params, batch, limits, **sizes, beams=options.beams)
        seed = np.int32(options.seed + round(1_000 * temperature))
        return self._program.write(params, batch, limits, np.float32(temperature), seed, indices, **sizes)

    # ---- segments and words

    def _segments(
        self,
        row: Recording,
        attempt: Attempt,
        prompt: list[int],
        silence: float | None,
        heard: Heard,
        place: int,
        options: SpeechOptions,
    ) -> list[Segment]:
        """Adds a window's segments to its recording, and moves to the next window."""
        end, offset, step = self.tokens.rules.end, row.offset, 2 * row.frame_seconds
        said = attempt.tokens[:-1] if attempt.tokens[-1:] == (end,) else attempt.tokens
        whole = [Piece(said, 0, 0, row.frames // 2)], row.frames
        pieces, advance = cut(said, self.tokens.rules.times, row.frames) if row.timed else whole
        words = self._words(row, attempt, prompt, heard, place) if options.timestamps == "word" else None
        found = []
        for piece in pieces:
            row.history.append(piece.tokens)
            row.said += piece.tokens
            if text := self._text(piece.tokens):
                start, stop = (
                    min(offset + position * step, row.windows.seconds) for position in (piece.start, piece.end)
                )
                spoken = () if words is None else words(piece)
                found.append(Segment(start, max(start, stop), text, spoken, silence))
        row.segments += found
        row.seek += max(advance, 1)
        return found

    def _words(self, row: Recording, attempt: Attempt, prompt: list[int], heard: Heard, place: int):
        """Aligns a window's text with its audio; returns a function from a piece to its words."""
        said, offset, step = attempt.tokens, row.offset, 2 * row.frame_seconds
        most = self.model.config.llm.max_position_embeddings
        tokens = np.full((1, bucket(len(prompt) + len(said), most)), self.tokens.rules.end, np.int32)
        tokens[0, : len(prompt) + len(said)] = [*prompt, *said]
        # Layers are parts of a tuple, or the first axis.
        axis = 0 if isinstance(heard[0], tuple) else 1
        alone = jax.tree.map(lambda leaf: leaf.take(np.array([place]), axis=axis), heard)
        attention, logprobs = self._program.align(self._program.params, tokens, alone)
        spoken = slice(len(prompt), len(prompt) + len(said) - 1)
        attention = fetch(attention)[0, :, spoken, : row.positions]
        probabilities = np.exp(fetch(logprobs)[0, len(prompt) :])
        if len(said) < 2:
            return lambda piece: ()
        positions = token_positions(attention, self.model.config.median_filter_width)
        # A token begins where the one before it ends; the last one has no attention of its own.
        ends = offset + step * np.append(positions, positions[-1])
        begins = np.append(offset, ends[:-1])

        def words(piece: Piece) -> tuple[Word, ...]:
            places = [piece.first + i for i, token in enumerate(piece.tokens) if token < self.tokens.rules.end]
            groups = split_words([said[i] for i in places], self.tokenizer.decode, has_spaces(row.language))
            found = []
            for text, parts in groups:
                own = [places[part] for part in parts]
                times = (min(float(time), row.windows.seconds) for time in (begins[own[0]], ends[own[-1]]))
                found.append(Word(*times, text.strip(), float(probabilities[own].mean())))
            return tuple(word for word in found if word.text)

        return words


def no_speech(config: Any) -> ConfigError:
    """Returns the error for a model that writes down no speech."""
    name = config.family or type(config).__name__.removesuffix("Config")
    return ConfigError(f"a {name}, asked to transcribe", "a Whisper", "name the folder of another model")
