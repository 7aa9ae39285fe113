"""Videos of six characters in five actions, such as walking, drawn from the sprites of the package arcade.

    pip install --no-deps arcade==3.3.3

The sprites are by Kenney (CC0). The package is never imported.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mllm_jax.data.images import Drawn, Size
from mllm_jax.data.message import Example, Message, Text, Video
from mllm_jax.datasets.folders import named_folder, package_folder
from mllm_jax.datasets.held_out import SPLITS, check_split
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.files import read_bytes

CHARACTERS = ("female adventurer", "female person", "male adventurer", "male person", "robot", "zombie")
POSES = {  # in the order of the frames, over and over
    "walking": tuple(f"walk{step}" for step in range(8)),
    "jumping": ("jump",),
    "falling": ("fall",),
    "standing": ("idle",),
    "climbing": ("climb0", "climb1"),
}
ACTIONS = tuple(POSES)
# Each character has one, so that training shows every character and every action, only not together.
HELD_OUT = {character: ACTIONS[number % len(ACTIONS)] for number, character in enumerate(CHARACTERS)}
QUESTIONS = {
    "character": ("Who is in the video?", "Which character do you see?", "Who is this?"),
    "action": ("What is the character doing?", "Which action do you see?", "What happens to the character?"),
    "both": ("What happens in the video?", "Who does what?", "Describe the video."),
}
FETCH = "run: pip install --no-deps arcade==3.3.3, or name the folder `arcade` of its unpacked wheel"
_VERSION = 1  # increase it whenever the questions, answers or the drawing of frames change
_BYTES = 1 << 20  # of a sprite
_HEIGHT = (0.5, 0.62)  # of a character, as a share of the frame's
_SPAN = 0.35  # way of a moving character, as a share of the frame's side


@dataclass(frozen=True)
class ArcadeSprites:
    """A video of one character's action, and questions about it; place, size, direction and colours vary.

    Attributes:
        split: "train", or "held_out": the pairs of character and action in `HELD_OUT`.
        folder: the folder `arcade`, relative to MLLM_DATA_DIR; None: that of the installed package.
        size: number of videos; the pairs take turns.
        frames, fps: number of frames of a video, at least 3 so that a jump is visible, and frames per second.
        image_size: side of a frame in pixels.
        questions: asked about each video, in random order in training: "character", "action", "both".
        seed: selects place, size, direction, colours and wordings.
    """

    split: str = "train"
    folder: str | None = None
    size: int = 4_800
    frames: int = 8
    fps: float = 8.0
    image_size: int = 64
    questions: tuple[str, ...] = tuple(QUESTIONS)
    seed: int = 0

    def __post_init__(self):
        check_split("ArcadeSprites", self.split)
        ranges = {"size": (1, 2**31), "frames": (3, 1000), "fps": (0.1, 1000), "image_size": (32, 4096)}
        for name, (least, most) in {**ranges, "seed": (0, 2**63)}.items():
            if not least <= getattr(self, name) <= most:
                given = f"ArcadeSprites: {name}={getattr(self, name)}"
                raise ConfigError(given, f"{least} to {most}", "correct it")
        if not self.questions or not set(self.questions) <= set(QUESTIONS):
            raise ConfigError(
                f"ArcadeSprites: questions {self.questions}", f"some of {', '.join(QUESTIONS)}", "correct them"
            )

    def build(self) -> ArcadeSource:
        """Finds the sprites. Raises DataError: the package is not installed, or a sprite is missing."""
        return ArcadeSource(self)


@dataclass(frozen=True)
class Scene:
    """A video to draw.

    Attributes:
        left: whether the character faces left, and walks that way.
        height: of the character, as a share of the frame's.
        x, y: position of the character and of the ground, from 0 to 1 between those where all of its way is visible.
        phase: index of the first pose.
        sky, ground: colours.
    """

    character: str
    action: str
    left: bool
    height: float
    x: float
    y: float
    phase: int
    sky: tuple[int, ...]
    ground: tuple[int, ...]


class ArcadeSource:
    """See `ArcadeSprites`."""

    name = "arcade_sprites"
    sendable = True

    def __init__(self, settings: ArcadeSprites):
        if settings.folder is None:
            folder = package_folder("arcade", expected="arcade's folder of sprites", todo=FETCH)
        else:
            folder = named_folder(settings.folder)
        self.settings = settings
        self.folder = folder / "resources" / "assets" / "images" / "animated_characters"
        self.digest = _digest(self.folder)
        held_out = settings.split == "held_out"
        self.pairs = [(who, does) for does in ACTIONS for who in CHARACTERS if (HELD_OUT[who] == does) == held_out]

    def __len__(self) -> int:
        return self.settings.size

    def fingerprint(self) -> str:
        """Returns a hash of the sprites, the settings (without the folder) and the version of the questions."""
        settings = {key: value for key, value in asdict(self.settings).items() if key != "folder"}
        content = (self.name, _VERSION, sorted(settings.items()), self.digest)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def example(self, index: int) -> Example:
        scene, rng = self._drawn(index)
        train, asked = self.settings.split == "train", list(self.settings.questions)
        if train:
            rng.shuffle(asked)
        answers = {
            "character": scene.character,
            "action": scene.action,
            "both": f"the {scene.character} is {scene.action}",
        }
        side = self.settings.image_size
        frames = [Drawn(partial(self.frame, index, n), partial(Size, side, side)) for n in range(self.settings.frames)]
        opening, messages = (Video(frames, fps=self.settings.fps),), []
        for kind in asked:
            question = QUESTIONS[kind][rng.integers(len(QUESTIONS[kind])) if train else 0]
            messages += [Message("user", (*opening, Text(question))), Message("assistant", answers[kind])]
            opening = ()
        return Example(tuple(messages), id=f"{self.settings.split}/{index}")

    def frame(self, index: int, number: int) -> np.ndarray:
        """Draws frame `number` of a video: uint8[side, side, 3]."""
        count = self.settings.frames
        return _frame(self.folder, self._drawn(index)[0], number, number / (count - 1), self.settings.image_size)

    def _drawn(self, index: int) -> tuple[Scene, np.random.Generator]:
        """Returns the scene of a video, and the random numbers for its questions."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of source {self.name}, which has {len(self)} examples")
        rng = np.random.default_rng((self.settings.seed, SPLITS.index(self.settings.split), index))
        character, action = self.pairs[index % len(self.pairs)]
        height, x, y = rng.uniform(*_HEIGHT), rng.uniform(), rng.uniform()
        sky, ground = (tuple(rng.integers(low, 256, 3).tolist()) for low in (150, 60))
        return Scene(character, action, bool(rng.integers(2)), height, x, y, int(rng.integers(8)), sky, ground), rng


def _frame(folder: Path, scene: Scene, number: int, time: float, side: int) -> np.ndarray:
    """Draws the frame at `time`, 0 for a video's first and 1 for its last frame."""
    from PIL import Image

    poses = POSES[scene.action]
    height = round(scene.height * side)
    sprite = _sprite(folder, scene.character, poses[(scene.phase + number) % len(poses)], height, scene.left)
    room, way = side - sprite.width, round(_SPAN * side)
    x, bottom = scene.x * room, way + scene.y * (side - height - way)
    # The ground has the same range for every action, so that it does not give the action away.
    canvas = Image.new("RGB", (side, side), scene.sky)
    canvas.paste(scene.ground, (0, height + round(bottom), side, side))
    if scene.action == "walking":
        x = scene.x * (room - way) + way * (1 - time if scene.left else time)
    up = {"jumping": math.sin(math.pi * time), "climbing": time, "falling": 1 - time**2}.get(scene.action, 0)
    y = bottom - way * up
    canvas.paste(sprite, (round(x), round(y)), sprite)
    return np.asarray(canvas)


@functools.lru_cache(maxsize=4096)
def _sprite(folder: Path, character: str, pose: str, height: int, left: bool):
    """Returns a sprite of a height as a Pillow image with transparency."""
    from PIL import Image, ImageOps

    path = folder / _file(character, pose)
    try:
        with Image.open(path, formats=("PNG",)) as file:
            image = file.convert("RGBA")
    except Exception as error:  # Pillow's plugins raise many kinds on damaged files
        raise _unreadable(path, error) from error
    image = image.resize((round(height * image.width / image.height), height), Image.Resampling.LANCZOS)
    return ImageOps.mirror(image) if left else image


def _file(character: str, pose: str) -> str:
    """Returns the file of a pose: "female_adventurer/femaleAdventurer_walk0.png"."""
    first, *rest = character.split()
    return f"{character.replace(' ', '_')}/{first}{''.join(map(str.capitalize, rest))}_{pose}.png"


def _digest(folder: Path) -> str:
    """Returns a hash of all sprites. Raises DataError: one is missing."""
    digest = hashlib.sha256()
    for character in CHARACTERS:
        for pose in (pose for poses in POSES.values() for pose in poses):
            path = folder / _file(character, pose)
            try:
                digest.update(hashlib.sha256(read_bytes(path, _BYTES, DataError)).digest())
            except OSError as error:
                raise _unreadable(path, error) from error
    return digest.hexdigest()


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read ({error})", "a sprite of arcade 3.3.3", FETCH)
