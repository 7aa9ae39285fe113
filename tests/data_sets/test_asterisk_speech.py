"""Asterisk's prompts: texts, splits, headers, and what is refused. Most tests make a small folder of the same form."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from asterisk_package import NotFetched, asterisk

from mllm_jax.datasets.asterisk_speech import HELD_OUT_SHARE, QUESTION, AsteriskSource, AsteriskSpeech, spoken
from mllm_jax.errors import ConfigError, DataError

DEBIAN = ("usr/share/asterisk/sounds/en_US_f_Allison", "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
TEXTS = """; Core Asterisk Sounds in English

activated: Activated.
beep: [this is a simple beep tone]
digits/1: one
dictate/help: press * to toggle:  press #
long: A long one
silence/1: (1 second of silence)
gone: No recording has this text.
"""


def write_wav(path: Path, samples: int = 800) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.arange(samples, dtype="<i2").tobytes())


def make(folder: Path, texts: str = TEXTS, debian: bool = True) -> Path:
    sounds, file = (folder / DEBIAN[0], folder / DEBIAN[1]) if debian else (folder, folder / "core-sounds-en.txt")
    for name in re.findall(r"(?m)^([\w/]+):", texts):
        if name != "gone":
            write_wav(sounds / f"{name}.wav", 8000 * 31 if name == "long" else 800)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(texts.encode()) if debian else texts.encode())
    return folder


def both(folder: Path, **settings) -> tuple[AsteriskSource, AsteriskSource]:
    train, held_out = (AsteriskSpeech(split, str(folder), **settings).build() for split in ("train", "held_out"))
    return train, held_out


@pytest.mark.parametrize(
    ("original", "text"),
    [
        ("That conference is full.  Try again.", "That conference is full. Try again."),
        ("dot [.]", "dot"),
        ('IAX (note: does not say "2")', "IAX"),
        ("press * to stop, or just #", "press star to stop, or just pound"),
        ("[sound of monkeys screaming]", ""),
        ("<beep ascending>", ""),
        ("(10 seconds of silence)", ""),
    ],
)
def test_what_is_spoken(original, text):
    assert spoken(original) == text


@pytest.mark.parametrize("debian", [True, False], ids=["Debian's packages", "Asterisk's archive"])
def test_a_folder_of_recordings_and_texts(tmp_path, debian):
    sources = both(make(tmp_path, debian=debian), max_seconds=60)
    found = {prompt.name: prompt for source in sources for prompt in source.prompts}
    assert sum(map(len, sources)) == len(found)
    assert {name: prompt.text for name, prompt in found.items()} == {
        "activated": "Activated.",
        "dictate/help": "press star to toggle: press pound",
        "digits/1": "one",
        "long": "A long one",
    }
    assert found["dictate/help"].original == "press * to toggle:  press #"
    assert found["long"].seconds == 31 and found["digits/1"].seconds == 0.1
    assert "long" not in {prompt.name for source in both(tmp_path) for prompt in source.prompts}
    source = next(source for source in sources if len(source))
    example = source.example(0)
    question, answer = example.messages
    assert question.text == QUESTION and answer.text == found[example.id].text
    assert soundfile.info(example.media[0].source).samplerate == 8000


def test_splits_depend_on_the_words_alone(tmp_path):
    names = [f"p{n}" for n in range(400)]
    first = "".join(f"{name}: Press {number} now.\n" for number, name in enumerate(names))
    again = "".join(f"q{name}: press  {number}, now\n" for number, name in enumerate(names))
    (small, small_held), (large, large_held) = (
        both(make(tmp_path / "a", first)),
        both(make(tmp_path / "b", first + again)),
    )
    held = {prompt.name for prompt in small_held.prompts}
    assert 0.5 * HELD_OUT_SHARE < len(held) / 400 < 1.5 * HELD_OUT_SHARE
    assert {prompt.name for prompt in small.prompts} == set(names) - held
    # More prompts do not move the others, and a prompt with the words of another is on its side.
    assert {prompt.name for prompt in large_held.prompts} == held | {f"q{name}" for name in held}
    assert len(large) + len(large_held) == 800
    assert len({source.fingerprint() for source in (small, small_held, large, large_held)}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / DEBIAN[1]).unlink(), "without usr/share"),
        (lambda folder: (folder / DEBIAN[0]).rename(folder / "elsewhere"), "without usr/share"),
        (lambda folder: (folder / DEBIAN[1]).write_bytes(b"activated: Activated."), "cannot be read .*gzip"),
        (lambda folder: (folder / DEBIAN[1]).write_bytes(gzip.compress(b"x" * 999)[:-9]), "cannot be read"),
        (lambda folder: (folder / DEBIAN[1]).write_bytes(gzip.compress(b"activated: \xff")), "cannot be read .*utf-8"),
        (lambda folder: (folder / DEBIAN[1]).write_bytes(gzip.compress(b"other: Text")), "no recording of"),
        (lambda folder: (folder / DEBIAN[0] / "activated.wav").write_text("a text"), "activated.wav is no recording"),
        (lambda folder: (folder / DEBIAN[0] / "activated.wav").write_text(""), "activated.wav is no recording"),
    ],
)
def test_another_folder_is_refused(tmp_path, change, message):
    change(make(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        AsteriskSpeech(folder=str(tmp_path)).build()
    assert "Debian's packages" in str(caught.value)


def test_settings_are_refused():
    with pytest.raises(ConfigError, match="split 'validation'"):
        AsteriskSpeech("validation")
    with pytest.raises(ConfigError, match="max_seconds=0"):
        AsteriskSpeech(max_seconds=0)


# ---- the real recordings


@pytest.fixture(scope="module")
def real(require_asset) -> Path:
    """Returns the folder of Debian's packages, fetched only if CI=true; skips where apt-get does not find them."""
    try:
        found = asterisk(fetch=os.environ.get("CI") == "true")
    except NotFetched as reason:
        pytest.skip(f"Asterisk's prompts: {reason}")
    require_asset(found, "Asterisk's prompts: python tests/assets/asterisk_package.py")
    return found


def test_the_real_splits(real):
    train, held_out = both(real)
    assert (len(train), len(held_out)) == (489, 59)
    words = [{re.sub(r"\W+", " ", prompt.text.lower()).strip() for prompt in s.prompts} for s in (train, held_out)]
    assert not words[0] & words[1]
    names = [prompt.name for prompt in held_out.prompts]
    assert names[:3] == ["activated", "call-fwd-no-ans", "conf-adminmenu-18"]
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == "70b0a8955ef76382"
    assert not any(re.search(r"[][<>()*#]", prompt.text) for s in (train, held_out) for prompt in s.prompts)
    assert 19 < sum(prompt.seconds for prompt in train.prompts) / 60 < 20


def test_real_headers_have_the_sizes_of_the_samples(real):
    for source in both(real, max_seconds=100):
        for index, prompt in enumerate(source.prompts):
            samples, rate = soundfile.read(source.example(index).media[0].source, dtype="float32")
            assert rate == 8000 and prompt.seconds == len(samples) / rate
        again = pickle.loads(pickle.dumps(source))
        assert again.fingerprint() == source.fingerprint() and again.prompts == source.prompts
