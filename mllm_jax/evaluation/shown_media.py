"""Media in the report: small PNG images, the frames of videos, and sounds with a player."""

from __future__ import annotations

import base64
import binascii
import io
import wave
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from mllm_jax.data.audio import as_audio
from mllm_jax.data.images import as_image
from mllm_jax.data.message import Audio, Image, Part, Video
from mllm_jax.data.processing.video import frames_of
from mllm_jax.data.video import FIVE_FRAMES
from mllm_jax.errors import DataError

SIDE, FRAME_SIDE = 256, 128  # largest side of an image, and of a video's frame, in pixels
RATE, SECONDS = 16_000, 10  # of a sound in the report
IMAGES, FRAMES, SOUNDS = "image_png_base64", "frame_png_base64", "sound_wav_base64"  # names in examples.json
_BEGINS = {IMAGES: (b"\x89PNG\r\n\x1a\n", "PNG"), SOUNDS: (b"RIFF", "WAV")}
_BEGINS[FRAMES] = _BEGINS[IMAGES]


def encoded(media: Iterable[Part]) -> dict[str, list[str]]:
    """Returns the files of media as base64 by kind; of a long sound its beginning, of a video up to five frames."""
    found: dict[str, list[str]] = {IMAGES: []}
    for part in media:
        if isinstance(part, Image):
            found[IMAGES].append(_png(as_image(part.source), SIDE))
        elif isinstance(part, Video):
            frames = frames_of(part, FIVE_FRAMES)[0]
            chosen = np.linspace(0, len(frames) - 1, min(len(frames), 5)).round().astype(int)
            found.setdefault(FRAMES, []).extend(_png(frames[i], FRAME_SIDE) for i in chosen)
        elif isinstance(part, Audio):
            found.setdefault(SOUNDS, []).append(_wav(as_audio(part, RATE)[: SECONDS * RATE]))
    return found


def html(example: Mapping[str, Any], number: int) -> str:
    """Returns the media of an entry of examples.json as HTML.

    Args:
        number: of the entry, for messages.

    Raises:
        DataError: a medium that is no file of its kind.
    """
    pieces = []
    for name, what in ((IMAGES, "image"), (FRAMES, "frame")):
        for place, text in enumerate(_texts(example, name), start=1):
            source = f"data:image/png;base64,{_checked(text, name, number)}"
            pieces.append(f'<img alt="{what} {place}" src="{source}">')
    for text in _texts(example, SOUNDS):
        pieces.append(f'<audio controls src="data:audio/wav;base64,{escape(_checked(text, SOUNDS, number))}"></audio>')
    return "".join(pieces)


def _texts(example: Mapping[str, Any], name: str) -> Sequence[Any]:
    return example.get(name, [])


def _checked(text: Any, name: str, number: int) -> str:
    begins, kind = _BEGINS[name]
    try:
        right = base64.b64decode(text, validate=True).startswith(begins)
    except (binascii.Error, ValueError, TypeError):
        right = False
    if not right:
        what = {IMAGES: "an image", FRAMES: "a frame", SOUNDS: "a sound"}[name]
        raise DataError(
            f"examples.json, entry {number}: {what} that is no {kind}",
            f"{kind} bytes in base64",
            "evaluate again to write the file anew",
        )
    return text


def _png(pixels: np.ndarray, side: int) -> str:
    from PIL import Image as Pillow

    image, buffer = Pillow.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))  # never enlarges
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _wav(samples: np.ndarray) -> str:
    """Encodes mono samples as 16-bit WAV."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return base64.b64encode(buffer.getvalue()).decode()
