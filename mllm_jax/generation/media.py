"""Images, videos and sounds that a generator made, and their files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from mllm_jax.data.message import Audio, Image, Part, Video
from mllm_jax.data.packages import media_package
from mllm_jax.errors import DataError
from mllm_jax.files import write_atomic

Kind = Literal["image", "video", "audio"]
SUFFIXES = {"image": (".png", ".jpg", ".jpeg", ".webp"), "video": (".mp4",), "audio": (".wav", ".flac")}
_SHAPES = {"image": "[H, W, 3]", "video": "[F, H, W, 3]", "audio": "[samples]"}
_RANGES = {"image": (0.0, 1.0), "video": (0.0, 1.0), "audio": (-1.0, 1.0)}
_PIXELS = ("image", "video")


@dataclass(frozen=True, eq=False)
class Media:
    """One image, video or sound that a model made.

    Attributes:
        kind: "image", "video" or "audio".
        array: float32; an image [H, W, 3] and a video [F, H, W, 3] in [0, 1], a sound [samples] in [-1, 1].
        rate: frames a second of a video, samples a second of a sound; None for an image.
        metadata: what it was made from, such as the prompt and the seed. A PNG carries it as text, and an MP4 as its
            comment, in JSON.
    """

    kind: Kind
    array: np.ndarray
    rate: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        shape = _SHAPES.get(self.kind)
        dims = shape.count(",") + 1 if shape else 0
        right = self.array.ndim == dims and (self.kind not in _PIXELS or self.array.shape[-1] == 3)
        if shape is None or not right or self.array.dtype != np.float32:
            raise DataError(
                f"a medium of kind {self.kind!r} with {self.array.dtype}{list(self.array.shape)}",
                "; ".join(f"{kind}: float32{shape}" for kind, shape in _SHAPES.items()),
                "change the array or its kind",
            )
        if (self.rate is None) != (self.kind == "image") or (self.rate is not None and not self.rate > 0):
            raise DataError(
                f"a medium of kind {self.kind!r} with rate {self.rate}",
                "None for an image, else frames or samples a second",
                "change the rate",
            )

    def part(self) -> Part:
        """Returns it as a part of a message, as the assistant's turn in a conversation that goes on."""
        if self.kind == "audio":
            return Audio(self.array, rate=round(self.rate))
        pixels = _bytes_of(np.clip(self.array, 0, 1))
        return Image(pixels) if self.kind == "image" else Video(pixels, fps=self.rate)

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all.

        Args:
            path: its suffix is the format: .png, .jpg or .webp of an image, .mp4 of a video, .wav or .flac of a sound.

        Raises:
            DataError: another suffix, samples that are not finite numbers, or a package for the format is missing.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in SUFFIXES[self.kind]:
            raise DataError(
                f"{path} for a medium of kind {self.kind!r}",
                f"a name that ends in {', '.join(SUFFIXES[self.kind])}",
                "change the suffix",
            )
        if not np.isfinite(self.array).all():
            raise DataError(f"a medium of kind {self.kind!r} with NaN or infinity", "finite numbers", "make it again")
        values = np.clip(self.array, *_RANGES[self.kind])
        encode = dict(image=self._image_bytes, video=self._video_bytes, audio=self._audio_bytes)[self.kind]
        write_atomic(path, encode(values, path.suffix.lower()))

    def _image_bytes(self, values: np.ndarray, suffix: str) -> bytes:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        how = {}
        if suffix == ".png":
            how["pnginfo"] = text = PngInfo()
            for name, value in self.metadata.items():
                text.add_itxt(name, value)
        file = io.BytesIO()
        Image.fromarray(_bytes_of(values)).save(file, Image.registered_extensions()[suffix], **how)
        return file.getvalue()

    def _video_bytes(self, values: np.ndarray, suffix: str) -> bytes:
        av = media_package("av", "writing a video")
        file, (_, height, width, _) = io.BytesIO(), values.shape
        with av.open(file, "w", format=suffix[1:]) as container:
            if self.metadata:
                container.metadata["comment"] = json.dumps(dict(self.metadata), ensure_ascii=False)
            stream = container.add_stream("libx264", rate=Fraction(float(self.rate)).limit_denominator(1001))
            stream.width, stream.height = width, height
            # Chroma at half the size needs even sides.
            stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            stream.options = {"crf": "17"}
            for frame in _bytes_of(values):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        return file.getvalue()

    def _audio_bytes(self, values: np.ndarray, suffix: str) -> bytes:
        soundfile = media_package("soundfile", "writing a sound")
        file = io.BytesIO()
        soundfile.write(file, values, round(self.rate), format=suffix[1:].upper(), subtype="PCM_16")
        return file.getvalue()


def _bytes_of(values: np.ndarray) -> np.ndarray:
    return (255 * values).round().astype(np.uint8)
