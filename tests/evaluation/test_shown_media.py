"""Media in the report: images, frames of videos, and sounds with a player."""

from __future__ import annotations

import base64
import io
import wave

import numpy as np
import pytest
from PIL import Image as Pillow

from mllm_jax.data.message import Audio, Image, Video
from mllm_jax.errors import DataError
from mllm_jax.evaluation.shown_media import FRAMES, IMAGES, RATE, SECONDS, SOUNDS, encoded, html


def shown() -> dict:
    greys = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.full((9, 20, 300, 3), 20, np.uint8)
    tone = 0.5 * np.sin(np.arange(12 * RATE) / 7).astype(np.float32)
    return encoded((Image(greys[1]), Video(greys, fps=3), Audio(tone, rate=RATE)))


def test_media_are_small_files():
    found = shown()
    assert {name: len(files) for name, files in found.items()} == {IMAGES: 1, FRAMES: 5, SOUNDS: 1}
    frames = [np.asarray(Pillow.open(io.BytesIO(base64.b64decode(text)))) for text in found[FRAMES]]
    assert [int(frame.mean()) for frame in frames] == [0, 40, 80, 120, 160] and frames[0].shape[1] == 128
    with wave.open(io.BytesIO(base64.b64decode(found[SOUNDS][0]))) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (RATE, SECONDS * RATE, 1)
        samples = np.frombuffer(file.readframes(5 * RATE), "<i2") / 32767
    np.testing.assert_allclose(samples, 0.5 * np.sin(np.arange(5 * RATE) / 7), atol=1e-4)


def test_the_page_has_players_and_frames():
    page = html(shown(), 0)
    assert page.count("<img alt=") == 6 and 'alt="frame 5"' in page
    assert page.count('<audio controls src="data:audio/wav;base64,') == 1


@pytest.mark.parametrize("name,what", [(IMAGES, "an image"), (FRAMES, "a frame"), (SOUNDS, "a sound")])
@pytest.mark.parametrize("text", ["nonsense", 7, base64.b64encode(b'"><script>').decode()])
def test_what_is_no_file_of_its_kind_is_refused(name, what, text):
    with pytest.raises(DataError, match=f"entry 4: {what} that is no"):
        html({name: [text]}, 4)
