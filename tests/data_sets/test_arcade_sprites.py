"""Videos of Arcade's sprites: pairs, drawing, questions and answers, and what is refused."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from arcade_package import REQUIREMENTS, arcade

from mllm_jax.data.images import image_size
from mllm_jax.data.message import Text, Video
from mllm_jax.datasets.arcade_sprites import ACTIONS, CHARACTERS, HELD_OUT, QUESTIONS, ArcadeSprites
from mllm_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder(require_asset) -> str:
    """Returns Arcade's folder, downloaded only if CI=true."""
    found = arcade(fetch=os.environ.get("CI") == "true")
    require_asset(found, f"the package of {REQUIREMENTS.name}: python tests/assets/arcade_package.py")
    return str(found)


def frames_of(source, index: int) -> np.ndarray:
    (video,) = source.example(index).media
    return np.stack([np.asarray(frame) for frame in video.source])


def pair_of(example) -> tuple[str, str]:
    """Returns the character and the action of an example with one question about both."""
    character, _, action = example.messages[-1].text.removeprefix("the ").partition(" is ")
    return character, action


def test_pairs_of_character_and_action_are_held_out(folder):
    train, held_out = (
        Counter(pair_of(source.example(index)) for index in range(240))
        for source in (
            ArcadeSprites(split, folder, size=240, questions=("both",)).build() for split in ("train", "held_out")
        )
    )
    assert not set(train) & set(held_out) and len(train) == 24 and len(held_out) == 6
    assert set(train) | set(held_out) == {(who, does) for who in CHARACTERS for does in ACTIONS}
    assert set(train.values()) == {10} and set(held_out.values()) == {40}
    assert dict(held_out.keys()) == HELD_OUT
    assert {who for who, _ in train} == set(CHARACTERS) and {does for _, does in train} == set(ACTIONS)


def test_an_example_asks_each_question_once(folder):
    source = ArcadeSprites(folder=folder, size=200).build()
    orders, wordings = set(), set()
    for index in range(200):
        example = source.example(index)
        kinds = []
        for asked, answer in zip(example.messages[::2], example.messages[1::2], strict=True):
            (kind,) = (kind for kind, texts in QUESTIONS.items() if asked.text in texts)
            kinds.append((kind, answer.text))
            wordings.add(asked.text)
        orders.add(tuple(kind for kind, _ in kinds))
        said = dict(kinds)
        assert said["both"] == f"the {said['character']} is {said['action']}"
        first, *others = example.messages
        assert isinstance(first.parts[0], Video) and isinstance(first.parts[1], Text) and first.parts[0].fps == 8
        assert len(example.media) == 1 and all(len(message.parts) == 1 for message in others)
    assert len(orders) == 6 and len(wordings) == 9
    held_out = ArcadeSprites("held_out", folder, questions=("action",)).build()
    for index, action in enumerate(action for _, action in held_out.pairs):
        assert [message.text for message in held_out.example(index).messages] == [QUESTIONS["action"][0], action]


@pytest.mark.parametrize(("side", "frames"), [(32, 3), (64, 8), (97, 5)])
def test_frames_have_the_declared_size_and_move(folder, side, frames):
    source = ArcadeSprites(folder=folder, size=30, image_size=side, frames=frames).build()
    for index in range(30):
        video = source.example(index).media[0]
        drawn = frames_of(source, index)
        assert drawn.shape == (frames, side, side, 3) and drawn.dtype == np.uint8
        assert {image_size(frame) for frame in video.source} == {(side, side)}
        assert np.array_equal(drawn, frames_of(source, index))
        still = (drawn == drawn[0]).all()
        assert still == (source.pairs[index % 24][1] == "standing")


def test_motion_belongs_to_the_action(folder):
    """Checks where the character is: the centre of the pixels that differ from sky and ground."""
    source = ArcadeSprites(folder=folder, size=24 * 3, image_size=96).build()
    seen = Counter()
    for index in range(len(source)):
        scene, _ = source._drawn(index)
        drawn = frames_of(source, index).astype(int)
        other = [(np.abs(drawn - np.array(colour)).sum(-1) > 30) for colour in (scene.sky, scene.ground)]
        rows, columns = ([np.argwhere(mask)[:, axis].mean() for mask in other[0] & other[1]] for axis in (0, 1))
        down, right = rows[-1] - rows[0], columns[-1] - columns[0]
        middle_up = (rows[0] + rows[-1]) / 2 - min(rows)
        if scene.action == "walking":
            assert (right < -20) == scene.left and (right > 20) != scene.left and abs(down) < 5
        elif scene.action == "jumping":
            assert middle_up > 20 and abs(down) < 5
        else:
            expected = {"falling": 33, "climbing": -33, "standing": 0}[scene.action]
            assert abs(down - expected) < 6 and abs(right) < 4
        seen[scene.action] += 1
    assert len(seen) == 5


def test_drawings_are_the_same_on_every_machine(folder):
    source = ArcadeSprites("held_out", folder).build()
    scene, _ = source._drawn(4)
    assert (scene.character, scene.action, scene.left, scene.sky) == ("male person", "standing", False, (228, 205, 164))
    assert hashlib.sha256(repr(source._drawn(11)[0]).encode()).hexdigest()[:16] == "181e01d71bdb32ab"


def test_sources_are_pickled_and_their_fingerprints_differ(folder, tmp_path):
    source = ArcadeSprites(folder=folder).build()
    sent = pickle.dumps(source)
    again = pickle.loads(sent)
    assert len(sent) < 5_000 and np.array_equal(frames_of(again, 3), frames_of(source, 3))
    link = tmp_path / "linked"
    link.symlink_to(folder)
    same = ArcadeSprites(folder=str(link)).build()
    changed = [dict(seed=1), dict(fps=4.0), dict(frames=4), dict(split="held_out"), dict(questions=("both",))]
    found = {ArcadeSprites(**{"folder": folder} | change).build().fingerprint() for change in changed}
    assert same.fingerprint() == again.fingerprint() == source.fingerprint() not in found and len(found) == 5
    assert not np.array_equal(frames_of(ArcadeSprites(folder=folder, seed=1).build(), 3), frames_of(source, 3))
    with pytest.raises(IndexError, match="index 4800"):
        source.example(4800)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(split="test"), "split 'test'"),
        (dict(frames=2), "frames=2"),
        (dict(fps=float("nan")), "fps=nan"),
        (dict(image_size=8), "image_size=8"),
        (dict(questions=()), r"questions \(\)"),
        (dict(questions=("who",)), "questions .'who',."),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ArcadeSprites(**settings)


def test_absence_is_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="walk0.png cannot be read.*\n.*\n.*pip install --no-deps arcade==3.3.3"):
        ArcadeSprites(folder=str(tmp_path)).build()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="`arcade`, which is not installed"):
        ArcadeSprites().build()


def test_a_damaged_sprite_is_refused(folder, tmp_path):
    images = "resources/assets/images/animated_characters"
    for path in Path(folder, images).rglob("*.png"):
        copy = tmp_path / images / path.relative_to(Path(folder, images))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"no image" if path.name == "robot_idle.png" else path.read_bytes())
    source = ArcadeSprites(folder=str(tmp_path)).build()
    index = source.pairs.index(("robot", "standing"))
    with pytest.raises(DataError, match="robot_idle.png"):
        frames_of(source, index)
