"""Features of long sound in windows: those of the whole sound, in bounded memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from mllm_jax.data.processing.audio import LogMel
from mllm_jax.data.processing.mel_windows import MelWindows
from mllm_jax.errors import DataError

MEL = LogMel(feature_size=8, chunk_length=1)
RATE = MEL.rate


def noise(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    level = np.repeat(10.0 ** rng.uniform(-4, -1, count // 1_000 + 1), 1_000)[:count]
    return (level * rng.normal(size=count)).astype(np.float32)


@pytest.mark.parametrize("count", [RATE + 1, 3 * RATE + 77, 40_000])
@pytest.mark.parametrize("starts", [(0, 0, 7, 100, 102, 190), (150,), (0, 1_000)])
def test_windows_of_long_sound_are_parts_of_its_features(count, starts):
    samples = noise(count)
    whole = replace(MEL, padding="longest", truncation=False)([samples])["input_features"][0]
    windows = MelWindows((samples, RATE), MEL)
    assert (windows.frames, windows.content, windows.seconds) == (whole.shape[1], count // 160, count / RATE)
    for start in starts:
        wanted = np.pad(whole[:, start : start + 100], [(0, 0), (0, 100)])[:, :100]
        np.testing.assert_allclose(windows.window(start, 100), wanted, atol=1e-6)


def test_short_sound_is_padded_with_silence():
    samples = noise(5_000)
    windows, whole = MelWindows((samples, RATE), MEL), MEL([samples])["input_features"][0]
    assert (windows.frames, windows.content, windows.seconds) == (100, 32, 0.3125)
    np.testing.assert_array_equal(windows.window(0, 100), whole)
    np.testing.assert_array_equal(windows.window(30, 100), np.pad(whole[:, 30:], [(0, 0), (0, 30)]))


def test_silence_is_not_loud():
    samples = np.concatenate([np.zeros(RATE, np.float32), 0.1 * np.sign(noise(RATE)), np.zeros(2 * RATE, np.float32)])
    windows = MelWindows((samples, RATE), MEL)
    assert not windows.loud(0, 98).any() and windows.loud(102, 95).all() and not windows.loud(203, 100).any()
    assert not MelWindows((np.zeros(RATE, np.float32), RATE), MEL).loud(0, 100).any()


def test_windows_go_forward():
    windows = MelWindows((noise(5 * RATE), RATE), MEL)
    windows.window(250, 100)
    with pytest.raises(DataError, match="from frame 10"):
        windows.window(10, 100)


def test_a_damaged_end_is_refused_at_once():
    samples = noise(4 * RATE)
    samples[-5] = np.nan
    with pytest.raises(DataError, match="nan"):
        MelWindows((samples, RATE), MEL)


def test_memory_does_not_grow_with_the_duration(tmp_path):
    path, seconds = tmp_path / "long.wav", 400
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        for _ in range(seconds):
            file.write(noise(RATE))
    tracemalloc.start()
    try:
        windows = MelWindows(path, MEL)
        for start in range(0, windows.frames, 90):
            windows.window(start, 100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert windows.frames == 100 * seconds and peak < seconds * RATE * 4 / 2
