"""The folder that tests/assets/whisper_tiny_en.py makes: transformers opens it, and it hears words."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from asterisk_package import SOUNDS, NotFetched, asterisk
from foxdot_package import foxdot
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.modeling_whisper import sinusoids
from whisper_tiny_en import NO_TIMESTAMPS, REQUIREMENTS, whisper_tiny_en

FETCH = os.environ.get("CI") == "true"


@pytest.fixture(scope="module")
def folder(require_asset) -> Path:
    """Returns the folder, downloaded only if CI=true."""
    found = whisper_tiny_en(fetch=FETCH)
    require_asset(found, f"the package of {REQUIREMENTS.name}: python tests/assets/whisper_tiny_en.py")
    return found


@pytest.fixture(scope="module")
def transcribe(folder):
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    processor = WhisperProcessor.from_pretrained(folder)

    def transcribe(*paths: Path, **options) -> list[str]:
        heard = []
        for path in paths:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            heard.append(soxr.resample(samples.mean(axis=1), rate, 16_000))
        features = processor(heard, sampling_rate=16_000, return_tensors="pt").input_features
        said = model.generate(features, max_new_tokens=48, **options)
        shown = dict(decode_with_timestamps=True) if options else dict(skip_special_tokens=True)
        return [text.strip() for text in processor.batch_decode(said, **shown)]

    return transcribe


def test_every_tensor_has_its_name_and_none_is_missing(folder):
    model, found = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    assert sum(value.numel() for value in model.parameters()) == 37_760_256
    assert all(torch.equal(value, value.half().float()) for value in model.parameters())
    # The encoder's positions are computed, not learned: a known table in the place where transformers reads it.
    difference = model.model.encoder.embed_positions.weight - sinusoids(1500, 384)
    assert difference.abs().max() < 1e-3


def test_the_tokenizer_has_the_special_tokens_and_the_times(folder):
    tokenizer = WhisperProcessor.from_pretrained(folder).tokenizer
    assert len(tokenizer) == 51864 and tokenizer.all_special_ids[-1] == NO_TIMESTAMPS
    ids = tokenizer("Hello there").input_ids
    assert tokenizer.decode(ids) == "<|startoftranscript|><|notimestamps|>Hello there<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids(["<|0.00|>", "<|29.98|>", "<|30.00|>"]) == [50363, 51862, 51863]
    if (folder / "normalizer.json").is_file():
        assert tokenizer.normalize("Two colours, please!") == "2 colors please"


def test_it_hears_words(transcribe, require_asset):
    found = foxdot(fetch=FETCH)
    require_asset(found, "FoxDot's sounds: python tests/assets/foxdot_package.py")
    voices = found / "snd" / "_"
    assert transcribe(voices / "1" / "one1.wav", voices / "2" / "two1.wav", voices / "3" / "three1.wav") == [
        "One.",
        "Two.",
        "3",
    ]


def test_it_hears_sentences(transcribe, require_asset):
    try:
        found = asterisk(fetch=FETCH)
    except NotFetched as reason:
        pytest.skip(f"Asterisk's prompts: {reason}")
    require_asset(found, "Asterisk's prompts: python tests/assets/asterisk_package.py")
    login, toggle = (found / SOUNDS / f"{name}.wav" for name in ("agent-alreadyon", "dictate/both_help"))
    assert transcribe(login, toggle) == [
        "That agent is already logged on. Please enter your agent number followed by the pound key.",
        "Press star to toggle pause. Press pound to enter a new dictation file name.",
    ]
    (timed,) = transcribe(login, return_timestamps=True)
    times = [float(part.split("|>")[0]) for part in timed.split("<|")[1:] if part[0].isdigit()]
    assert times[0] < 0.5 and times == sorted(times) and np.isclose(times[-1], 4.9, atol=0.8)
