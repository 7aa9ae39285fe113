"""Features of sound equal those of transformers' extractors, and their numbers of steps are known beforehand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from mllm_jax.data.processing.audio import (
    FRAMES,
    LogMel,
    Waveform,
    audio_processor,
    read_audio_processor,
)
from mllm_jax.errors import ConfigError, DataError

RATE = 16_000
RNG = np.random.default_rng(0)
SOUNDS = {
    "noise": 0.1 * RNG.normal(size=50_001),
    "tone": 0.5 * np.sin(2 * np.pi * 440 * np.arange(80_000) / RATE),
    "chirp": 0.3 * np.sin(2 * np.pi * 50 * (np.arange(480_000) / RATE) ** 2) * np.exp(-np.arange(480_000) / 80_000),
    "silence": np.zeros(16_000),
    "quiet": 1e-4 * RNG.normal(size=40_000),
    "10 ms": 0.1 * RNG.normal(size=160),
    "one sample": np.full(1, 0.5),
    "constant": np.full(8_000, 0.25),
    "too long": 0.1 * RNG.normal(size=500_000),
}
SOUNDS = {name: samples.astype(np.float32) for name, samples in SOUNDS.items()}


def in_numpy(extractor: WhisperFeatureExtractor, monkeypatch) -> WhisperFeatureExtractor:
    """Makes transformers compute without torch, in float64, as it does where torch is not installed."""
    monkeypatch.setattr("transformers.models.whisper.feature_extraction_whisper.is_torch_available", lambda: False)
    return extractor


def theirs(extractor, sounds, **options) -> dict[str, np.ndarray]:
    return dict(extractor(sounds, sampling_rate=RATE, return_tensors="np", **options))


def same(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray], error: float) -> None:
    assert ours.keys() == reference.keys()
    for name, values in reference.items():
        assert ours[name].dtype == (np.int32 if name == "attention_mask" else np.float32)
        assert ours[name].shape == values.shape
        np.testing.assert_allclose(ours[name], values, atol=error, rtol=0)


@pytest.mark.parametrize("mels", [80, 128])
def test_whisper_equals_transformers(mels, monkeypatch):
    extractor, ours = WhisperFeatureExtractor(feature_size=mels), LogMel(feature_size=mels)
    in_float32 = {name: theirs(extractor, [samples]) for name, samples in SOUNDS.items()}
    in_numpy(extractor, monkeypatch)
    for name, samples in SOUNDS.items():
        features = ours([samples])
        same(features, theirs(extractor, [samples]), 1e-6)
        # torch computes in float32, which is off by more in the few bins that are some 80 dB below the loudest
        same(features, in_float32[name], 1e-4)
        difference = np.abs(features["input_features"] - in_float32[name]["input_features"])
        assert (difference > 1e-5).mean() < (3e-3 if name == "chirp" else 1e-5)
    assert features["input_features"].shape == (1, mels, 3_000)


@pytest.mark.parametrize(
    ("padding", "truncation"), [("max_length", True), ("max_length", False), ("longest", True), ("longest", False)]
)
@pytest.mark.parametrize("names", [("noise",), ("noise", "10 ms", "tone"), ("too long", "silence", "one sample")])
def test_whisper_batches_with_their_mask(padding, truncation, names, monkeypatch):
    extractor = in_numpy(WhisperFeatureExtractor(feature_size=16), monkeypatch)
    sounds = [SOUNDS[name] for name in names]
    ours = LogMel(feature_size=16, padding=padding, truncation=truncation, return_attention_mask=True)
    features = ours(sounds)
    # The reference cannot pad to a length that one of several sounds exceeds; here, that one decides.
    padding = "longest" if "too long" in names and not truncation else padding
    reference = theirs(extractor, sounds, padding=padding, truncation=truncation, return_attention_mask=True)
    same(features, reference, 1e-6)
    lengths = [len(sound) for sound in sounds]
    steps = ours.steps(np.asarray(lengths), max(lengths))
    np.testing.assert_array_equal(steps, features["attention_mask"].sum(1))
    if padding == "max_length":
        assert [ours.steps(n) for n in lengths] == steps.tolist(), "a sound's steps do not depend on the others"


def test_steps_of_every_length(monkeypatch):
    """Checks the number of steps against the masks of the reference for lengths around whole frames."""
    extractor = in_numpy(WhisperFeatureExtractor(feature_size=2, chunk_length=1), monkeypatch)
    lengths = [201, 319, 320, 321, 479, 480, 481, 15_999, 16_000, 16_001, 20_000]
    for padding in ("max_length", "longest"):
        ours = LogMel(feature_size=2, chunk_length=1, padding=padding)
        for n in lengths:
            options = dict(padding=padding, return_attention_mask=True)
            mask = theirs(extractor, [SOUNDS["noise"][:n]], **options)["attention_mask"]
            assert ours.steps(n) == mask.sum() and type(ours.steps(n)) is int
            assert ours([SOUNDS["noise"][:n]])["input_features"].shape[2] == mask.shape[1]
        np.testing.assert_array_equal(ours.steps(np.asarray(lengths)), [ours.steps(n) for n in lengths])


def test_other_sizes_equal_transformers(monkeypatch):
    options = dict(feature_size=23, sampling_rate=24_000, hop_length=120, chunk_length=2, n_fft=512, padding_value=0.01)
    extractor = in_numpy(WhisperFeatureExtractor(**options), monkeypatch)
    ours = audio_processor({"feature_extractor_type": "WhisperFeatureExtractor", **options})
    sounds = [SOUNDS["noise"][:30_011], SOUNDS["10 ms"]]
    same(ours(sounds), dict(extractor(sounds, sampling_rate=24_000, return_tensors="np")), 1e-6)


def test_long_sound_is_computed_in_pieces(monkeypatch):
    """Checks that the spectra of many frames are not in memory at once, with equal results."""
    sound = SOUNDS["noise"]
    ours = LogMel(padding="longest")
    whole = ours([sound])["input_features"]
    seen = []
    real = np.fft.rfft
    monkeypatch.setattr(np.fft, "rfft", lambda frames: seen.append(len(frames)) or real(frames))
    monkeypatch.setattr("mllm_jax.data.processing.audio.FRAMES", 100)
    np.testing.assert_allclose(ours([sound])["input_features"], whole, atol=1e-6)
    assert max(seen) == 100 and sum(seen) == whole.shape[2] and FRAMES > 100


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("value", [0.0, -1.5])
def test_wav2vec2_equals_transformers(normalise, mask, value):
    extractor = Wav2Vec2FeatureExtractor(padding_value=value, do_normalize=normalise, return_attention_mask=mask)
    ours = Waveform(padding_value=value, normalise=normalise, return_attention_mask=mask)
    for names in (*((name,) for name in SOUNDS), ("noise", "10 ms", "silence", "tone"), ("constant", "one sample")):
        sounds = [SOUNDS[name] for name in names]
        features = ours(sounds)
        same(features, theirs(extractor, sounds, padding=True), 1e-5)
        if mask:
            steps = [ours.steps(len(sound)) for sound in sounds]
            np.testing.assert_array_equal(features["attention_mask"].sum(1), steps)


def test_padding_does_not_change_masked_waveforms():
    ours = Waveform(normalise=True)
    alone = ours([SOUNDS["10 ms"]])["input_values"][0]
    together = ours([SOUNDS["10 ms"], SOUNDS["noise"]])
    np.testing.assert_array_equal(together["input_values"][0, :160], alone)
    assert not together["input_values"][0, 160:].any()


def test_the_sound_itself_is_not_changed():
    sound = SOUNDS["noise"].copy()
    Waveform(normalise=True)([sound])
    LogMel(padding="longest")([sound])
    np.testing.assert_array_equal(sound, SOUNDS["noise"])


@pytest.mark.parametrize("kind", [WhisperFeatureExtractor, Wav2Vec2FeatureExtractor])
def test_folders_of_transformers(kind, tmp_path):
    options = dict(return_attention_mask=True, padding_value=0.5)
    if kind is WhisperFeatureExtractor:
        options |= dict(feature_size=24, chunk_length=3)
    extractor = kind(**options)
    extractor.save_pretrained(tmp_path)
    ours = read_audio_processor(tmp_path)
    padding = "max_length" if kind is WhisperFeatureExtractor else "longest"
    options = dict(padding=padding, return_attention_mask=True)
    sounds = [SOUNDS["noise"], SOUNDS["10 ms"]]
    same(ours(sounds), theirs(extractor, sounds, **options), 1e-5)
    assert read_audio_processor(str(tmp_path), return_attention_mask=False) == replace(
        ours, return_attention_mask=False
    )


def written(folder, **files):
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_where_a_folder_keeps_its_settings(tmp_path):
    whisper = dict(feature_extractor_type="WhisperFeatureExtractor", feature_size=128)
    both = dict(image_processor_type="Qwen2VLImageProcessor", patch_size=14, image_mean=[0.5] * 3, dither=0.0)
    written(tmp_path, preprocessor_config={**whisper, **both, "n_samples": 4_800_000, "chunk_length": 300})
    assert read_audio_processor(tmp_path) == LogMel(128, chunk_length=300)
    written(tmp_path, processor_config=dict(feature_extractor={**whisper, "feature_size": 20}, image_processor={}))
    assert read_audio_processor(tmp_path) == LogMel(20), "it has precedence"
    (tmp_path / "processor_config.json").unlink()
    written(tmp_path, preprocessor_config={"do_normalize": False}, config={"model_type": "hubert"})
    assert read_audio_processor(tmp_path) == Waveform(return_attention_mask=False)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="without preprocessor_config.json"):
        read_audio_processor(tmp_path)
    written(tmp_path, config={"architectures": ["BEATs"]})
    assert read_audio_processor(tmp_path) == Waveform()
    features = read_audio_processor(tmp_path)([SOUNDS["noise"], SOUNDS["10 ms"]])
    np.testing.assert_array_equal(features["input_values"][0], SOUNDS["noise"])
    np.testing.assert_array_equal(features["attention_mask"].sum(1), [50_001, 160])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("feature_extractor_type", "ClapFeatureExtractor"),
        ("feature_extractor_type", None),
        ("feature_size", 0),
        ("feature_size", "80"),
        ("hop_length", 0),
        ("chunk_length", 10**9),
        ("n_fft", 2.5),
        ("sampling_rate", True),
        ("padding_side", "left"),
        ("padding_value", "zero"),
        ("padding_value", float("inf")),
        ("dither", 0.001),
        ("return_attention_mask", "yes"),
        ("num_mel_bins", 64),
    ],
)
def test_options_are_honoured_or_refused_by_name(option, value, tmp_path):
    values = {"feature_extractor_type": "WhisperFeatureExtractor", option: value}
    with pytest.raises(ConfigError, match=option) as refused:
        read_audio_processor(written(tmp_path, preprocessor_config=values))
    assert "preprocessor_config.json" in str(refused.value) and refused.value.todo


def test_other_refusals_of_settings(tmp_path):
    with pytest.raises(ConfigError, match="feature_size"):
        audio_processor({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 80})
    with pytest.raises(ConfigError, match="do_normalize"):
        audio_processor({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": "no"})
    with pytest.raises(ConfigError, match="hop_length"):
        audio_processor({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "hop_length": 160})
    with pytest.raises(ConfigError, match="chunks of"):
        audio_processor(dict(feature_extractor_type="WhisperFeatureExtractor", chunk_length=3_600, sampling_rate=10**6))
    with pytest.raises(ConfigError, match="padding="):
        LogMel(padding="do_not_pad")
    (tmp_path / "preprocessor_config.json").write_text("[1")
    with pytest.raises(ConfigError, match="preprocessor_config.json"):
        read_audio_processor(tmp_path)


@pytest.mark.parametrize("processor", [LogMel(), Waveform(normalise=True)])
@pytest.mark.parametrize(
    ("sounds", "message"),
    [
        ([], "list of mono samples"),
        (np.zeros(400, np.float32), "list of mono samples"),
        ([[0.0, 0.1]], "list of mono samples"),
        ([np.zeros((400, 2), np.float32)], r"float32\[400, 2\]"),
        ([np.zeros(400, np.int16)], r"int16\[400\]"),
        ([np.zeros(0, np.float32)], "without samples"),
        ([np.zeros(400, np.float32), np.full(400, np.nan, np.float32)], "NaN"),
    ],
)
def test_wrong_sounds(processor, sounds, message):
    with pytest.raises(DataError, match=message):
        processor(sounds)


def test_sound_that_is_too_short_to_stay_alone():
    ours = LogMel(padding="longest")
    with pytest.raises(DataError, match="pad it to 'max_length'"):
        ours([SOUNDS["10 ms"]])
    assert ours([SOUNDS["10 ms"], SOUNDS["noise"]])["input_features"].shape == (2, 80, 312)
