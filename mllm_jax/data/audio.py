"""Reads sound from untrusted sources as mono float32 samples from -1 to 1: whole, or block by block."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mllm_jax.data.audio_files import BLOCK, MAX_CHANNELS, RATES, Sound, open_sound
from mllm_jax.data.message import Audio
from mllm_jax.data.packages import media_package
from mllm_jax.errors import DataError

RATE = 16_000  # samples per second that encoders expect
MAX_SECONDS = 3_600  # of sound that is read at once: 230 MB at 16 kHz
MAX_MAGNITUDE = 100.0  # of a sample; sound that is not clipped exceeds 1 a little, integers by far

Source = Audio | bytes | str | os.PathLike | tuple[Any, int]


def as_audio(source: Source, rate: int = RATE) -> np.ndarray:
    """Converts sound in any common form to mono samples.

    Channels are averaged. Another sample rate is converted by soxr (HQ).

    Args:
        source: a path; the bytes of a file (WAV, FLAC, Ogg, MP3, MP4 and others; of a video its first sound track);
            (samples, rate) with samples float[n] or float[n, channels]; or an `Audio` with one of these.
        rate: samples per second of the result.

    Returns:
        float32[n], n >= 1.

    Raises:
        DataError: the sound cannot be read, ends early, is longer than MAX_SECONDS, has no samples, or samples that are
            not finite numbers of about -1 to 1; or its rate is not what was said.
    """
    rate = _require_rate(rate)
    with _opened(source) as sound:
        if sound.length is not None:
            _require_short(sound.what, sound.length / sound.rate)
        pieces, count = [], 0
        for piece in _mono_at(sound, rate):
            pieces.append(piece)
            count += len(piece)
            _require_short(sound.what, count / rate)
    return np.concatenate(pieces)


def audio_length(source: Source, rate: int = RATE) -> int:
    """Returns the number of samples of `as_audio` from the file's header.

    Sound whose header has no exact length (WebM, AAC without MP4, some MP3) is decoded block by block.

    Raises:
        DataError: see `as_audio`; damaged samples are not found, and any length is allowed.
    """
    rate = _require_rate(rate)
    with _opened(source) as sound:
        length = sound.length
        if length is None:
            length = sum(map(len, sound.blocks))
        return _length_at(sound, length, rate)


def audio_blocks(source: Source, seconds: float, rate: int = RATE) -> Iterator[np.ndarray]:
    """Reads sound of any length block by block, with one block in memory at a time.

    Args:
        source: see `as_audio`.
        seconds: the duration of a block.

    Yields:
        float32[round(seconds * rate)]; the last one may be shorter. Joined, they are the result of `as_audio`: the
        state of the resampling passes from block to block.

    Raises:
        DataError: see `as_audio`, without its bound on the length. A damaged file raises when its reading gets there.
    """
    rate = _require_rate(rate)
    if not isinstance(seconds, numbers.Real) or not 1 / rate <= seconds <= MAX_SECONDS:
        raise DataError(
            f"blocks of {seconds!r:.40} seconds", f"a number of seconds up to {MAX_SECONDS:,}", "change the duration"
        )
    return _blocks(source, round(seconds * rate), rate)


def _blocks(source: Source, size: int, rate: int) -> Iterator[np.ndarray]:
    with _opened(source) as sound:
        held, count = [], 0
        for piece in _mono_at(sound, rate):
            held.append(piece)
            count += len(piece)
            if count >= size:
                joined = np.concatenate(held)
                for start in range(0, count - size + 1, size):
                    yield joined[start : start + size].copy()
                held, count = [joined[count - count % size :]], count % size
        if count:
            yield np.concatenate(held)


@contextmanager
def _opened(source: Source) -> Iterator[Sound]:
    given, rate = (source.source, source.rate) if isinstance(source, Audio) else (source, None)
    if isinstance(given, (bytes, str, os.PathLike)):
        with open_sound(given) as sound:
            _require_same(sound.what, sound.rate, rate)
            yield sound
        return
    if isinstance(given, tuple) and len(given) == 2:
        given, own = given
        _require_same("samples", own, rate)
        rate = own
    if given is None or rate is None or isinstance(given, (bytes, str, os.PathLike)):
        raise DataError(
            f"sound given as {'nothing' if given is None else type(given).__name__}"
            f"{' without a rate' if rate is None else f' with the rate {rate!r:.40}'}",
            "a path or the bytes of a file, alone; or (samples, rate) with samples float[n] or float[n, channels]",
            "give a file without a rate, and samples with theirs, as in (samples, 16000)",
        )
    yield _of_samples(given, _require_rate(rate))


def _of_samples(given: Any, rate: int) -> Sound:
    samples = np.asarray(given)
    form = f"samples {samples.dtype}{list(samples.shape)}"
    if samples.dtype.kind in "iu":
        full = 1 << (8 * samples.dtype.itemsize - 1)
        how = f"samples / {full:,}" if samples.dtype.kind == "i" else f"(samples - {full:,}) / {full:,}"
        raise DataError(form, "floating-point samples from -1 to 1", f"scale them: {how} in float32")
    if samples.dtype.kind != "f" or samples.ndim not in (1, 2):
        raise DataError(form, "float[n] or float[n, channels] from -1 to 1", "convert them")
    if samples.ndim == 1:
        samples = samples[:, None]
    if not len(samples):
        raise _nothing("samples")
    if not 1 <= samples.shape[1] <= MAX_CHANNELS:
        raise DataError(form, f"float[n, channels] with 1 to {MAX_CHANNELS} channels", "transpose them: samples.T")
    pieces = (samples[place : place + BLOCK] for place in range(0, len(samples), BLOCK))
    return Sound("samples", rate, len(samples), pieces)


def _mono_at(sound: Sound, rate: int) -> Iterator[np.ndarray]:
    """Yields mono samples at another rate, float32[n] with any n >= 1."""
    resampler, place = None, 0
    if sound.rate != rate:
        soxr = media_package("soxr", f"{sound.what}: {sound.rate:,} samples a second instead of {rate:,}")
        resampler = soxr.ResampleStream(sound.rate, rate, 1, dtype="float32", quality="HQ")
    for block in sound.blocks:
        _require_samples(sound, block, place)
        place += len(block)
        mono = np.ascontiguousarray(block.mean(axis=1, dtype=np.float32) if block.shape[1] > 1 else block[:, 0])
        mono = mono.astype(np.float32, copy=False)
        if resampler is not None:
            mono = resampler.resample_chunk(mono)
        if len(mono):
            yield mono
    _length_at(sound, place, rate)
    if resampler is not None and len(last := resampler.resample_chunk(np.zeros(0, np.float32), last=True)):
        yield last


def _length_at(sound: Sound, length: int, rate: int) -> int:
    """Returns the number of samples after the resampling, rounded as soxr does. Raises DataError: none."""
    found = (2 * length * rate + sound.rate) // (2 * sound.rate)
    if not found:
        raise _nothing(sound.what)
    return found


def _require_samples(sound: Sound, block: np.ndarray, place: int) -> None:
    largest = np.abs(block).max()
    if largest <= MAX_MAGNITUDE:  # false for NaN
        return
    at = int(np.argmax(~(np.abs(block) <= MAX_MAGNITUDE).all(axis=1)))
    value = block[at][~(np.abs(block[at]) <= MAX_MAGNITUDE)][0]
    raise DataError(
        f"{sound.what}: sample {place + at:,} (second {(place + at) / sound.rate:.3f}) is {value}",
        "finite samples from -1 to 1",
        "scale them, as in samples / 32768 for 16 bits" if math.isfinite(value) else "repair or leave out the record",
    )


def _require_rate(rate: Any) -> int:
    whole = isinstance(rate, numbers.Real) and not isinstance(rate, bool) and rate == rate // 1
    if not whole or not RATES[0] <= rate <= RATES[1]:
        raise DataError(
            f"a rate of {rate!r:.40} samples a second", f"a whole number, {RATES[0]:,} to {RATES[1]:,}", "correct it"
        )
    return int(rate)


def _require_same(what: str, own: Any, said: Any) -> None:
    if said is not None and said != own:
        raise DataError(
            f"{what}: {own!r:.40} samples a second, with the rate {said!r:.40} said of it",
            "the rate of the sound itself",
            "leave the rate out; the result is resampled to the rate that is asked for",
        )


def _require_short(what: str, seconds: float) -> None:
    if seconds > MAX_SECONDS:
        raise DataError(
            f"{what}: {seconds:,.0f} seconds of sound",
            f"at most {MAX_SECONDS:,} seconds at once",
            "read it block by block: mllm_jax.data.audio.audio_blocks(source, seconds=30)",
        )


def _nothing(what: str) -> DataError:
    return DataError(f"{what}: sound without samples", "at least one sample", "leave the record out")
