"""Short videos that tests make on the spot with PyAV."""

from __future__ import annotations

import struct
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
        rotation: the angle by which a player turns the frames of an mp4 counterclockwise.
        heard: float32[n], samples of a sound track, 16,000 a second.
        header_first: the header of an mp4 comes first, so that the beginning of the file can be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{suffix}"
        _write(path, count, fps, size, codec, times, frames, key_every, header_first, heard)
        return _turned(path.read_bytes(), rotation)


def _turned(made: bytes, rotation: int) -> bytes:
    """Rotates the matrix in the header of an mp4's track."""
    if not rotation:
        return made
    cosine, sine = round(np.cos(np.deg2rad(rotation))), round(np.sin(np.deg2rad(rotation)))
    upright, turned = (
        struct.pack(">9i", *(a << 16 for a in (c, -s, 0, s, c, 0, 0, 0)), 1 << 30) for c, s in ((1, 0), (cosine, sine))
    )
    place = made.index(upright, made.index(b"tkhd"))
    return made[:place] + turned + made[place + len(turned) :]


def _write(path: Path, count, fps, size, codec, times, frames, key_every, header_first, heard) -> None:
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"} if header_first else {}) as out:
        stream = out.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = key_every
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
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


def sound(cover: bool = False, seconds: float = 0.2) -> bytes:
    """Returns the bytes of an mp4 with sound alone, or with the image of a cover, which is a stream of one frame."""
    import av
    from av.stream import Disposition

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.mp4"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("aac", rate=16_000, layout="mono")
            if cover:
                image = out.add_stream("mjpeg")
                image.height, image.width, image.pix_fmt = 32, 48, "yuvj420p"
                image.disposition = Disposition.attached_pic
            samples = np.zeros((1, int(16_000 * seconds)), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16_000
            out.mux(stream.encode(frame))
            out.mux(stream.encode())
            if cover:
                grey = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")
                out.mux(image.encode(grey.reformat(format="yuvj420p")))
                out.mux(image.encode())
        return path.read_bytes()
