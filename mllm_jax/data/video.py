"""Reads videos from untrusted files with PyAV: sampled frames as uint8 RGB, each with its time, in bounded memory.

A frame has the time at which it is shown, in seconds after the first frame of its file: with a variable frame rate,
the real one. Rotation metadata is applied. Frames of more than MAX_FRAME_PIXELS are scaled down while they are decoded.

If a part of a file cannot be decoded, such as the end of a file that was cut off, the same number of frames is sampled
from the readable ones, and a warning says so. If no frame can be decoded, the video is refused.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from mllm_jax.data.images import MAX_PIXELS, Size
from mllm_jax.data.packages import media_package
from mllm_jax.data.pixels import MAX_CALL_PIXELS
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.files import open_regular

MAX_FRAME_PIXELS = 1920 * 1088  # of a frame that is kept; all frames of a video have at most MAX_CALL_PIXELS together
# FFmpeg's names of the containers that are opened. Others, such as playlists, would open further files or addresses.
FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif")

_MANY = 1 << 31  # frames: a header with more is not believed

Source = str | os.PathLike | bytes
Position = Literal["start", "middle", "ends"]


@dataclass(frozen=True)
class FrameSampling:
    """The choice of frames of a video's file, uniform over the file.

    Attributes:
        num_frames: the number of frames of each video; a video of fewer frames repeats some. None: `fps` decides.
        fps: the number of frames for each second, at least `min_frames`, at most `max_frames` and all frames of the
            file. None: `num_frames` decides.
        multiple: the number of frames is a multiple of it, if the file has that many.
        position: frames at the "start" or the "middle" of equal parts of the file; or at its "ends", and at equal
            distances between them.

    Raises:
        ConfigError: both or neither of `num_frames` and `fps`, numbers that are not positive, or another position.
    """

    num_frames: int | None = 5
    fps: float | None = None
    min_frames: int = 4
    max_frames: int = 768
    multiple: int = 1
    position: Position = "start"

    def __post_init__(self):
        if (self.num_frames is None) == (self.fps is None):
            raise ConfigError(f"{self}", "num_frames or fps, and the other one None", "set one of the two to None")
        numbers = (self.num_frames or 1, self.min_frames, self.max_frames, self.multiple)
        fps = 1.0 if self.fps is None else self.fps
        if min(numbers) < 1 or self.num_frames == 0 or self.min_frames > self.max_frames or not 0 < fps < math.inf:
            raise ConfigError(f"{self}", "positive numbers, and min_frames at most max_frames", "change them")
        if self.position not in get_args(Position):
            raise ConfigError(f"{self}", f"position: one of {', '.join(get_args(Position))}", "change it")

    def count(self, frames: int, fps: float) -> int:
        """Returns the number of frames to sample from `frames` at `fps` frames a second."""
        if self.num_frames is not None:
            return max(round(self.num_frames / self.multiple), 1) * self.multiple
        most = min(self.max_frames, frames)
        wanted = min(max(frames / fps * self.fps, self.min_frames), most)
        return int(wanted // self.multiple * self.multiple) or most

    def indices(self, frames: int, count: int) -> np.ndarray:
        """Returns the indices int[count] of `count` of `frames` frames."""
        if self.position == "ends":
            return np.linspace(0, frames - 1, count).round().astype(np.int64)
        parts = np.arange(count) * 2 + (self.position == "middle")
        return parts * frames // (2 * count)


FIVE_FRAMES = FrameSampling()


@dataclass(frozen=True, eq=False)
class FrameTimes:
    """The times of a video's frames.

    Attributes:
        seconds: float64[F], of each frame.
        fps: the number of frames a second, as sampled.
    """

    seconds: np.ndarray
    fps: float

    @classmethod
    def of(cls, count: int, fps: float | None, times: Sequence[float] | None) -> FrameTimes:
        """Returns the times of frames that are given with their rate, their times, or both."""
        seconds = np.arange(count) / fps if times is None else np.asarray(times, np.float64)
        if fps is None:
            span = seconds[-1] - seconds[0]
            fps = (count - 1) / span if span > 0 else 1.0  # a single frame has no rate, and nothing depends on it
        return cls(seconds, float(fps))


class VideoHeader(NamedTuple):
    """Facts of a video that need no decoding.

    Attributes:
        size: of a frame as a person sees it, after rotation.
        frames: their number; an estimate, from duration and rate, for containers that do not store it.
        fps: frames a second, on average.
    """

    size: Size
    frames: int
    fps: float

    @property
    def duration(self) -> float:
        """The duration in seconds."""
        return self.frames / self.fps


def video_header(source: Source) -> VideoHeader:
    """Reads the header of a video. Decodes the first frame alone, which carries the rotation.

    Raises:
        DataError: see `read_video`.
    """
    with _opened(source) as (container, stream, what):
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        duration = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1e6
        frames = stream.frames or round(duration * (rate or 0))
        size = _seen(_first_frame(container, stream, what))
    if 0 < frames < _MANY and rate:
        return VideoHeader(size, frames, float(rate))
    timeline = _timeline(source)
    return VideoHeader(size, len(timeline.stamps), len(timeline.stamps) / timeline.duration)


def has_sound(source: Source) -> bool:
    """Returns whether a video's file has a sound track. Raises DataError: see `read_video`."""
    with _opened(source) as (container, _, _):
        return bool(container.streams.audio)


def measure_video(source: Source, sampling: FrameSampling, exact: bool = False) -> tuple[Size, FrameTimes]:
    """Returns the size and the times of the frames from `read_video`, without decoding them.

    Args:
        exact: read the times of all frames, so the whole file; if False, they follow from the header.

    Raises:
        DataError: see `read_video`; damaged frames are not found.
    """
    header = video_header(source)
    count = sampling.count(header.frames, header.fps)
    size = _bounded(header.size, count)
    if exact:
        timeline = _timeline(source)
        return size, timeline.times(sampling.indices(len(timeline.stamps), count))
    return size, FrameTimes(sampling.indices(header.frames, count) / header.fps, count / header.duration)


def read_video(
    source: Source, sampling: FrameSampling = FIVE_FRAMES, fit: Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[np.ndarray, FrameTimes]:
    """Reads frames of a video.

    Args:
        source: a path, or the bytes of a file.
        fit: applied to each frame uint8[h, w, 3] when it is decoded, such as a resizing.

    Returns:
        uint8[F, H, W, 3], and the frames' times.

    Raises:
        DataError: a file that cannot be read, is no video of FORMATS or has no video stream, a frame of more than
            MAX_PIXELS, or no frame can be decoded. The package PyAV is missing.
    """
    header, timeline = video_header(source), _timeline(source)
    count = sampling.count(header.frames, header.fps)
    size = _bounded(header.size, count)

    def pixels(frame: Any) -> np.ndarray:
        shown = _rgb(frame, size)
        return shown if fit is None else fit(shown)

    stamps, known = timeline.stamps, len(timeline.stamps)
    chosen = sampling.indices(known, count)
    wanted = {stamps[i] for i in chosen}
    found = _sought(source, timeline, wanted, pixels) if timeline.stamped else {}
    if wanted - found.keys():
        found, readable = _scanned(source, timeline, wanted, pixels)
        if wanted - found.keys():
            known = len(readable)
            chosen = np.asarray(readable)[sampling.indices(known, count)]
            found, _ = _scanned(source, timeline, {stamps[i] for i in chosen}, pixels)
    if known < timeline.declared:
        name = "a video" if isinstance(source, bytes) else os.fspath(source)
        text = f"{name}: only {known:,} of {timeline.declared:,} frames can be read; frames are sampled from these"
        warnings.warn(text, stacklevel=2)
    return np.stack([found[stamps[i]] for i in chosen]), timeline.times(chosen)


# ---- the file


@contextmanager
def _opened(source: Source) -> Iterator[tuple[Any, Any, str]]:
    """Opens the first video stream of a file; yields container, stream and name."""
    av = media_package("av", "a video")
    what = "a video" if isinstance(source, bytes) else os.fspath(source)
    with ExitStack() as stack:
        try:
            file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source, DataError)
        except OSError as error:
            raise DataError(
                f"the video {what} cannot be read ({type(error).__name__}: {error.strerror or error})",
                "a file that exists and may be read",
                "correct the path or its permissions",
            ) from error
        stack.enter_context(file)
        try:
            # Titles need not be UTF-8; before version 19, PyAV refuses others.
            titles = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}
            options = {"format_whitelist": ",".join(FORMATS)}
            container = stack.enter_context(av.open(file, options=options, **titles))
            # Covers of songs are streams of one frame.
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                kinds = ", ".join(sorted({s.type for s in container.streams} - {"video"})) or "nothing"
                raise DataError(f"{what} with {kinds}", "a video stream", "name a video")
            stream = streams[0]
            if stream.codec_context is None:
                raise DataError(f"{what} with a codec that FFmpeg does not know", "a usual codec", "convert the video")
            if stream.width * stream.height > MAX_PIXELS:
                raise _too_large(what, stream.height, stream.width)
            stream.thread_type = "SLICE"  # with AUTO, PyAV can wait for ever if decoding ends early
            yield container, stream, what
        except av.FFmpegError as error:
            raise DataError(
                f"{what}: cannot be opened as a video ({type(error).__name__}: {error.strerror})",
                f"a complete file of {', '.join(FORMATS)}",
                "restore the file from its origin, convert it, or leave this record out",
            ) from error


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Yields the packets of a stream; the last one, which is empty, flushes the decoder. A damaged end is no error."""
    av = media_package("av", "a video")
    try:
        yield from container.demux(stream)
    except av.FFmpegError:
        return


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Yields the frames that can be decoded, in the order in which they are shown."""
    av = media_package("av", "a video")
    for packet in _packets(container, stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        yield from (frame for frame in frames if not frame.is_corrupt)


def _first_frame(container: Any, stream: Any, what: str) -> Any:
    frame = next(_frames(container, stream), None)
    if frame is None:
        raise _unreadable(what)
    if frame.width * frame.height > MAX_PIXELS:
        raise _too_large(what, frame.height, frame.width)
    return frame


# ---- times


@dataclass(frozen=True)
class _Timeline:
    """The frames of a file, in the order in which they are shown.

    Attributes:
        stamps: when each is shown, in units of `unit` seconds.
        keys: the frames at which decoding can begin: when each is shown, and its position for a seek.
        stamped: the file has these times; if False, they are counted.
        declared: their number according to the header, if it has one.
    """

    stamps: list[int]
    keys: list[tuple[int, int]]
    unit: float
    stamped: bool
    declared: int

    @property
    def duration(self) -> float:
        """Seconds, if the last frame is shown for the mean time of the others."""
        count = len(self.stamps)
        return float((self.stamps[-1] - self.stamps[0]) * self.unit * count / max(count - 1, 1)) or float(self.unit)

    def times(self, chosen: np.ndarray) -> FrameTimes:
        """Returns the times of the frames with these indices."""
        seconds = [float((self.stamps[i] - self.stamps[0]) * self.unit) for i in chosen]
        return FrameTimes(np.asarray(seconds), len(chosen) / self.duration)


def _timeline(source: Source) -> _Timeline:
    """Reads the times of all frames without decoding any."""
    with _opened(source) as (container, stream, what):
        # Without the packets, which hold the compressed frames.
        stored = [(p.pts, p.dts, p.is_keyframe, p.is_discard) for p in _packets(container, stream) if p.size]
        found = [(shown, read, key) for shown, read, key, left_out in stored if not left_out]
        if not found:
            raise _unreadable(what)
        stamped = all(shown is not None for shown, _, _ in found)
        stamps = sorted({shown for shown, _, _ in found}) if stamped else list(range(len(found)))
        keys = [(shown, shown if read is None else read) for shown, read, key in found if key] if stamped else []
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate or 25
        alone = len(stamps) == 1 or not stamped  # a duration is known only from the rate
        unit = 1 / rate if alone else stream.time_base
        declared = max(stream.frames - len(stored), 0) + len(stamps)  # the end of a file may be missing
        return _Timeline(stamps, sorted(keys), unit, stamped, declared)


# ---- pixels


def _sought(source: Source, timeline: _Timeline, wanted: set[int], pixels: Callable) -> dict[int, np.ndarray]:
    """Decodes the wanted frames, each from the key frame before it. Those that cannot be decoded are absent."""
    found: dict[int, np.ndarray] = {}
    shown = [key for key, _ in timeline.keys]
    with _opened(source) as (container, stream, _):
        for key, group in groupby(sorted(wanted), lambda stamp: bisect_right(shown, stamp) - 1):
            if key < 0:
                continue
            left = set(group)
            container.seek(timeline.keys[key][1], stream=stream)
            for frame in _frames(container, stream):
                if frame.pts in left:
                    found[frame.pts] = pixels(frame)
                    left.remove(frame.pts)
                if not left or (frame.pts is not None and frame.pts > max(left)):
                    break
    return found


def _scanned(
    source: Source, timeline: _Timeline, wanted: set[int], pixels: Callable
) -> tuple[dict[int, np.ndarray], list[int]]:
    """Decodes the file from its beginning; returns the wanted frames, and the indices of all that can be decoded."""
    found: dict[int, np.ndarray] = {}
    readable: list[int] = []
    index = {stamp: i for i, stamp in enumerate(timeline.stamps)}
    with _opened(source) as (container, stream, what):
        for number, frame in enumerate(_frames(container, stream)):
            stamp = frame.pts if timeline.stamped else number
            if stamp not in index:
                continue
            readable.append(index[stamp])
            if stamp in wanted:
                found[stamp] = pixels(frame)
    if not readable:
        raise _unreadable(what)
    return found, sorted(set(readable))


def _turns(frame: Any) -> int:
    """Returns the number of quarter turns counterclockwise from the stored to the shown frame."""
    return round(frame.rotation / 90) % 4


def _seen(frame: Any) -> Size:
    return Size(frame.width, frame.height) if _turns(frame) % 2 else Size(frame.height, frame.width)


def _rgb(frame: Any, size: Size) -> np.ndarray:
    """Returns a decoded frame as uint8[*size, 3], turned as a person sees it."""
    turns = _turns(frame)
    height, width = size[::-1] if turns % 2 else size
    smooth = "AREA" if height * width < frame.height * frame.width else "BICUBIC"
    stored = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=smooth)
    return np.ascontiguousarray(np.rot90(stored, turns))


def _bounded(size: Size, count: int) -> Size:
    """Returns the size at which each of `count` frames is kept."""
    scale = math.sqrt(min(MAX_FRAME_PIXELS, MAX_CALL_PIXELS // count) / math.prod(size))
    return size if scale >= 1 else Size(*(max(int(side * scale), 1) for side in size))


def _too_large(what: str, height: int, width: int) -> DataError:
    return DataError(
        f"{what}: frames of {height:,} x {width:,} pixels", f"at most {MAX_PIXELS:,} pixels", "scale the video down"
    )


def _unreadable(what: str) -> DataError:
    return DataError(
        f"{what}: no frame can be decoded", "a video", "restore the file from its origin, or leave this record out"
    )
