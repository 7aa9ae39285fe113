"""Short videos that tests make on the spot with PyAV."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np


def shade(index: int) -> int:
    """Returns the grey value of a clip's frame, from which a test reads its index: steps of 16 survive compression."""
    return 8 + 16 * (index % 15)


def shades(frames: np.ndarray) -> list[int]:
    """Returns the indices (modulo 15) of the frames of a clip, from the grey of their centres."""
    centre = frames[:, frames.shape[1] // 2, frames.shape[2] // 2].astype(float).mean(axis=-1)
    return [round((value - 8) / 16) for value in centre]


def clip(
    count: int,
    fps: float = 4,
    size: tuple[int, int] = (32, 48),
    *,
    codec: str = "libx264",
    suffix: str = "mp4",
    times: Sequence[float] | None = None,
    frames: np.ndarray | None = None,
    rotation: int = 0,
    key_every: int = 4,
    header_first: bool = False,
    heard: np.ndarray | None = None,
) -> bytes:
    """Returns the bytes of a video.

    Args:
        size: height and width.
        suffix: of the file's name, which decides on the container.
        times: of each frame in seconds, for a variable frame rate.
        frames: uint8[count, h, w, 3]; None: grey ones of `shade`.
        rotation: the angle by which a player turns the frames counterclockwise.
        heard: float32[n], samples of a sound track, 16,000 a second.
        header_first: the header of an mp4 comes first, so that the beginning of the file can be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{suffix}"
        _write(path, count, fps, size, codec, times, frames, rotation, key_every, header_first, heard)
        return path.read_bytes()


def _write(path: Path, count, fps, size, codec, times, frames, rotation, key_every, header_first, heard) -> None:
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"} if header_first else {}) as out:
        stream = out.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = key_every
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        track = None if heard is None else out.add_stream("aac", rate=16_000, layout="mono")
        for index in range(count):
            pixels = np.full((*size, 3), shade(index), np.uint8) if frames is None else frames[index]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[index]), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if track is not None:
            frame = av.AudioFrame.from_ndarray(heard[None], format="fltp", layout="mono")
            frame.sample_rate = 16_000
            out.mux(track.encode(frame))
            out.mux(track.encode())


def sound(seconds: float = 0.2) -> bytes:
    """Returns the bytes of an mp4 without a video stream."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16_000, layout="mono")
        samples = np.zeros((1, int(16_000 * seconds)), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()
