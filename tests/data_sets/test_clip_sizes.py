"""Sizes of real clips from their headers, against the samples."""

from __future__ import annotations

import os

import pytest
from asterisk_package import NotFetched, asterisk
from foxdot_package import foxdot

from mllm_jax.data import audio
from mllm_jax.datasets.asterisk_speech import AsteriskSpeech
from mllm_jax.datasets.foxdot_sounds import FoxDotSounds

FETCH = os.environ.get("CI") == "true"


def check(*sources) -> int:
    """Checks each clip at 16 kHz, and returns the number of clips."""
    files = sorted({source.example(index).media[0].source for source in sources for index in range(len(source))})
    for file in files:
        assert audio.audio_length(file) == len(audio.as_audio(file)), file
    return len(files)


def test_sounds_of_every_rate_and_width(require_asset):
    folder = foxdot(fetch=FETCH)
    require_asset(folder, "FoxDot's sounds: python tests/assets/foxdot_package.py")
    assert check(*(FoxDotSounds(split, str(folder)).build() for split in ("train", "held_out"))) == 317


def test_telephone_speech(require_asset):
    try:
        folder = asterisk(fetch=FETCH)
    except NotFetched as reason:
        pytest.skip(f"Asterisk's prompts: {reason}")
    require_asset(folder, "Asterisk's prompts: python tests/assets/asterisk_package.py")
    sources = [AsteriskSpeech(split, str(folder), 100).build() for split in ("train", "held_out")]
    assert check(*sources) == sum(map(len, sources)) == 551
    for source in sources:
        lengths = [audio.audio_length(source.example(index).media[0]) for index in range(len(source))]
        assert lengths == [round(prompt.seconds * 16_000) for prompt in source.prompts]
