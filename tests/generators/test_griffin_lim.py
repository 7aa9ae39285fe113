"""Log-mel spectrograms of generators, and their way back to sound."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from mllm_jax.data.processing.mel_magnitudes import MelMagnitudes
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generators.griffin_lim import Frames, GriffinLimConfig

RATE = 16_000


def chord(length: int) -> np.ndarray:
    """Returns a decaying chord."""
    time = np.arange(length) / RATE
    return 0.2 * sum(np.sin(2 * np.pi * pitch * time) for pitch in (220, 330, 1047, 2500)) * np.exp(-2 * time)


@pytest.mark.parametrize(("spec", "length"), [(MelMagnitudes(), 8_000), (MelMagnitudes(22_050, 512, 128, 40), 3_333)])
def test_the_spectrogram_is_that_of_the_reference(spec, length):
    sound = np.random.default_rng(0).normal(0, 0.1, length)
    filters = mel_filter_bank(spec.n_fft // 2 + 1, spec.bins, 0, 8000, spec.rate, norm="slaney", mel_scale="slaney")
    window = window_function(spec.n_fft, "hann", periodic=True)
    wanted = spectrogram(
        sound,
        window,
        spec.n_fft,
        spec.hop,
        spec.n_fft,
        power=1.0,
        mel_filters=filters,
        mel_floor=spec.floor,
        log_mel="log",
    )
    np.testing.assert_allclose(spec(sound), wanted.T, atol=1e-5)
    # A given number of frames is that of the sound with silence after it, or cut.
    longer, frames = spec(sound, 200), 20
    assert longer.shape == (200, spec.bins) and np.allclose(longer[:frames], wanted.T[:frames], atol=1e-5)
    assert np.all(longer[-frames:] == np.float32(np.log(spec.floor)))
    assert np.array_equal(spec(sound, frames), spec(sound[: frames * spec.hop], frames))


def test_a_sound_shorter_than_a_frame_and_one_without_samples():
    spec = MelMagnitudes()
    assert spec(np.ones(10)).shape == (1, 64) and np.isfinite(spec(np.ones(10))).all()
    with pytest.raises(DataError, match="without samples"):
        spec(np.zeros(0))
    with pytest.raises(ConfigError, match="hop"):
        MelMagnitudes(hop=2048)


@pytest.mark.parametrize(("size", "hop"), [(64, 16), (64, 24), (50, 25)])
def test_frames_give_back_their_sound(size, hop):
    sound = np.random.default_rng(1).normal(size=(2, 12 * hop)).astype(np.float32)
    frames = Frames(size, hop)
    spectrum = frames.spectrum(sound)
    wave = np.pad(sound, ((0, 0), (size // 2, size // 2)), mode="reflect")
    third = np.fft.rfft(wave[:, 3 * hop : 3 * hop + size] * frames.window)
    np.testing.assert_allclose(spectrum[:, 3], third, atol=1e-4)
    back = np.asarray(frames.samples(spectrum))
    assert back.shape == sound.shape
    np.testing.assert_allclose(back[:, : -size // 2], sound[:, : -size // 2], atol=2e-4)


def test_sound_returns_from_its_spectrogram():
    config = GriffinLimConfig()
    assert (config.num_mel_bins, config.rate, config.rates) == (64, RATE, (160,))
    assert not config.make().init(jax.random.key(0), np.zeros((1, 20, 64)))
    sound = chord(8_000)
    wanted = config.spectrogram(sound, 50)

    def distance(turns: int) -> float:
        made = np.asarray(GriffinLimConfig(turns=turns).make().apply({}, wanted[None]))
        assert made.shape == (1, 8_000) and made.dtype == np.float32
        found, right = (np.exp(x[:45]) for x in (config.spectrogram(made[0], 50), wanted))
        return float(np.linalg.norm(found - right) / np.linalg.norm(right))

    assert distance(32) < 0.2 < 0.5 < distance(0)


def test_what_cannot_be_inverted_is_refused():
    with pytest.raises(ConfigError, match="overlap"):
        GriffinLimConfig(MelMagnitudes(n_fft=512, hop=300))
    with pytest.raises(ConfigError, match="momentum"):
        GriffinLimConfig(momentum=1.0)
