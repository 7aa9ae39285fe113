"""Decodes files of sound block by block: WAV, FLAC, Ogg and others with soundfile; MP3, MP4 and others with PyAV.

Files come from untrusted sources: nothing outside the file is opened, at most a block is in memory, and a file that
ends early is refused instead of giving fewer samples.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from mllm_jax.data.packages import media_package
from mllm_jax.errors import DataError
from mllm_jax.files import open_regular

# Formats that PyAV decodes. Others, such as playlists, would open other files or addresses.
FORMATS = (
    "mov",
    "mp4",
    "m4a",
    "3gp",
    "3g2",
    "mj2",
    "matroska",
    "webm",
    "mp3",
    "aac",
    "ogg",
    "flac",
    "wav",
    "asf",
    "avi",
)
RATES = (1_000, 1_000_000)  # samples per second of a file
MAX_CHANNELS = 32
BLOCK = 1 << 16  # samples of a channel that soundfile decodes at a time

_UNKNOWN = 1 << 61  # from here on, libsndfile's number of samples means that the header has none
_PIPED = 0x7FFF_F000  # from here on, the size of a chunk means that the file was written to a pipe
_MAX_CHUNKS = 1_000
_PADDING = 4_096  # samples at the end by which the headers and the frames of compressed sound differ
_ELSEWHERE = (1, 4)  # libsndfile's errors for a format or an encoding that it does not have


@dataclass(frozen=True)
class Sound:
    """Sound that is being read.

    Attributes:
        what: its name in messages.
        rate: samples per second.
        length: its samples in each channel; None: unknown before it is decoded.
        blocks: float32[n, channels] with any n >= 1; readable once.
    """

    what: str
    rate: int
    length: int | None
    blocks: Iterator[np.ndarray]


@contextmanager
def open_sound(source: bytes | str | os.PathLike) -> Iterator[Sound]:
    """Opens a file of sound, given by its path or its bytes.

    Raises:
        DataError: it cannot be read, is empty, ends early, or has no sound that can be decoded; or a package is
            missing. Reading the blocks raises it too.
    """
    what = "sound in bytes" if isinstance(source, bytes) else os.fspath(source)
    with ExitStack() as stack:
        file = stack.enter_context(io.BytesIO(source) if isinstance(source, bytes) else _open_file(source))
        size = file.seek(0, io.SEEK_END)
        if size == 0:
            raise DataError(f"{what}: an empty file", "a file with sound", "restore the file from its origin")
        _require_end(file, size, what)
        yield _with_soundfile(file, what, stack) or _with_av(file, what, stack)


def _open_file(path: str | os.PathLike) -> BinaryIO:
    try:
        return open_regular(path, DataError)
    except OSError as error:
        raise DataError(
            f"the sound {os.fspath(path)} cannot be read ({type(error).__name__}: {error.strerror or error})",
            "a file that exists and may be read",
            "correct the path or its permissions",
        ) from error


def _with_soundfile(file: BinaryIO, what: str, stack: ExitStack) -> Sound | None:
    """Opens a file with soundfile; returns None for what PyAV must decode."""
    file.seek(0)
    head = file.read(3)
    if head == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):
        return None  # an MP3, which soundfile's seeking after each block damages
    soundfile = media_package("soundfile", what)
    file.seek(0)
    try:
        sound = stack.enter_context(soundfile.SoundFile(file))
    except soundfile.LibsndfileError as error:
        if error.code in _ELSEWHERE:
            return None
        raise broken(what, error) from error
    except Exception as error:  # of a file object in the midst of hostile bytes
        raise broken(what, error) from error
    # Also an MP3 with something before it; without a known length, soundfile cannot seek.
    if sound.format == "MP3" or sound.frames >= _UNKNOWN:
        return None
    _require_form(what, sound.samplerate, sound.channels)
    return Sound(what, sound.samplerate, sound.frames, _exactly(_soundfile_blocks(sound, what), sound.frames, what))


def _soundfile_blocks(sound: Any, what: str) -> Iterator[np.ndarray]:
    while True:
        try:
            block = sound.read(BLOCK, dtype="float32", always_2d=True)
        except Exception as error:
            raise broken(what, error) from error
        if not len(block):
            return
        yield block


def _exactly(blocks: Iterator[np.ndarray], length: int, what: str) -> Iterator[np.ndarray]:
    """Passes blocks on. Raises DataError: they are not `length` samples."""
    count = 0
    for block in blocks:
        count += len(block)
        yield block
    if count != length:
        raise ends_early(what, f"its header declares {length:,} samples, it has {count:,}")


def _with_av(file: BinaryIO, what: str, stack: ExitStack) -> Sound:
    av = media_package("av", what)
    # Before version 19, titles in another encoding than UTF-8 are errors.
    tags = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    mp3_length = _declares_length(file)
    file.seek(0)
    try:
        container = stack.enter_context(av.open(file, options={"format_whitelist": ",".join(FORMATS)}, **tags))
        streams = container.streams.audio
        kinds = ", ".join(sorted({stream.type for stream in container.streams}))
    except Exception as error:  # PyAV raises many kinds on hostile bytes
        raise broken(what, error) from error
    if not streams:
        raise DataError(
            f"{what}: a file without sound (it has: {kinds or 'nothing'})", "a file with a sound track", "name another"
        )
    stream = streams[0]
    if stream.codec_context is None:
        raise broken(what, ValueError("FFmpeg has no decoder for its encoding"))
    try:
        stream.thread_type = "SLICE"  # threads by frame may never end if decoding stops early
        rate, channels = stream.rate, stream.codec_context.channels
    except Exception as error:
        raise broken(what, error) from error
    _require_form(what, rate, channels)
    seconds = None if not stream.duration else float(stream.duration * stream.time_base)
    exact = "mp4" in container.format.name or mp3_length  # elsewhere FFmpeg estimates it
    length = round(seconds * rate) if seconds and exact else None
    blocks = _av_blocks(av, container, stream, what)
    if length is not None:
        return Sound(what, rate, length, _about(blocks, length, what))
    least = container.duration if container.format.name.startswith("matroska") and len(container.streams) == 1 else None
    if least:
        blocks = _at_least(blocks, round(least / av.time_base * rate) - _PADDING, what)
    return Sound(what, rate, None, blocks)


def _av_blocks(av: Any, container: Any, stream: Any, what: str) -> Iterator[np.ndarray]:
    resampler, rate, channels = av.AudioResampler(format="fltp"), stream.rate, stream.codec_context.channels
    try:
        for frame in container.decode(stream):
            if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
                raise ValueError("the sample rate or the number of channels changes within the file")
            for made in resampler.resample(frame):
                yield np.ascontiguousarray(made.to_ndarray().T, np.float32)
    except Exception as error:
        raise broken(what, error) from error


def _about(blocks: Iterator[np.ndarray], length: int, what: str) -> Iterator[np.ndarray]:
    """Cuts blocks to `length` samples: those after it are the encoder's padding.

    A few that the decoder swallows are zeros, so that the length is the header's.

    Raises:
        DataError: the lengths differ by more than _PADDING.
    """
    count, channels = 0, 1
    for block in blocks:
        channels = block.shape[1]
        if len(kept := block[: max(0, length - count)]):
            yield kept
        count += len(block)
    if abs(count - length) > _PADDING:
        raise ends_early(what, f"its header declares {length:,} samples, it has {count:,}")
    if count < length:
        yield np.zeros((length - count, channels), np.float32)


def _at_least(blocks: Iterator[np.ndarray], least: int, what: str) -> Iterator[np.ndarray]:
    count = 0
    for block in blocks:
        count += len(block)
        yield block
    if count < least:
        raise ends_early(what, f"its header declares at least {least:,} samples, it has {count:,}")


def _declares_length(file: BinaryIO) -> bool:
    """Returns whether an MP3's first frame says how many frames follow."""
    file.seek(0)
    place = 0
    while len(tag := file.read(10)) == 10 and tag[:3] == b"ID3":  # text and images before the sound
        place += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        file.seek(place)
    file.seek(place)
    frame = file.read(256)
    for name in (b"Xing", b"Info"):
        at = frame.find(name)
        if at >= 0 and len(flags := frame[at + 4 : at + 8]) == 4:
            return bool(flags[3] & 1)
    return b"VBRI" in frame


def _require_end(file: BinaryIO, size: int, what: str) -> None:
    """Refuses a WAV, AIFF or Ogg file that was cut off, which decoders read as a shorter one."""
    file.seek(0)
    head = file.read(12)
    if head[:4] in (b"RIFF", b"RIFX", b"FORM") and head[8:] in (b"WAVE", b"AIFF", b"AIFC"):
        order, place = "little" if head[:4] == b"RIFF" else "big", 12
        for _ in range(_MAX_CHUNKS):
            file.seek(place)
            if len(chunk := file.read(8)) < 8:
                return
            length = int.from_bytes(chunk[4:], order)
            if chunk[:4] in (b"data", b"SSND"):
                if place + 8 + length > size and length < _PIPED:
                    raise ends_early(what, f"its header declares {length:,} bytes, it has {size - place - 8:,}")
                return
            place += 8 + length + length % 2
    elif head[:4] == b"OggS":
        start = file.seek(max(0, size - (1 << 17)))  # the largest page has 65,307 bytes
        tail = file.read()
        at = tail.rfind(b"OggS")
        page = tail[at:] if at >= 0 else b""
        sizes = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if len(page) < 27 or len(page) < 27 + page[26] + sum(sizes):
            raise ends_early(what, f"its last page, at byte {start + max(at, 0):,}, is incomplete")


def _require_form(what: str, rate: int, channels: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise DataError(
            f"{what}: sound of {rate:,} samples a second",
            f"{RATES[0]:,} to {RATES[1]:,}",
            "correct the file's header",
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise DataError(f"{what}: sound with {channels} channels", f"1 to {MAX_CHANNELS}", "mix the channels down")


def ends_early(what: str, reason: str) -> DataError:
    """Returns the refusal of a file that is cut off or whose header is wrong."""
    return DataError(f"{what}: the file is cut off ({reason})", "a complete file", "restore the file from its origin")


def broken(what: str, error: Exception) -> DataError:
    """Returns the refusal of a file that cannot be decoded."""
    reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return DataError(
        f"{what}: cannot be decoded ({type(error).__name__}: {reason.strip()})",
        "a complete file with sound: WAV, FLAC, Ogg, MP3, MP4, WebM or AIFF",
        "restore the file from its origin, or leave this record out",
    )
