"""Requests that are answered by an image, requests about an image, and questions about words that draw nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mllm_jax.data.images import Drawn
from mllm_jax.data.message import Example, Image, Message, Part, Text
from mllm_jax.datasets.openmoji.catalog import Dice
from mllm_jax.datasets.openmoji.compositions import KINDS, Composition, compositions
from mllm_jax.datasets.openmoji.images import EmojiImages
from mllm_jax.datasets.openmoji.questions import true_answers
from mllm_jax.datasets.openmoji.scenes import NUMBERS
from mllm_jax.datasets.openmoji.sources import EmojiSource, SourceSettings
from mllm_jax.datasets.openmoji.turns import captioned
from mllm_jax.errors import ConfigError

WORDINGS = ("train", "held_out")
FORMS = ("requests", "captions")
# `{x}` is what to draw, with its article.
DRAW = {
    "train": (
        *(
            "Draw {x}.",
            "Please draw {x}.",
            "Can you draw {x}?",
            "Could you draw {x} for me?",
            "I want a drawing of {x}.",
        ),
        *(
            "Make an image of {x}.",
            "Please make a picture of {x}.",
            "Show me a picture of {x}.",
            "I want a drawing of {x}.",
        ),
        *("Create an image that shows {x}.", "An image of {x}, please.", "I would like to see {x}."),
        *("Now draw {x} and nothing else.", "Give me a drawing of {x}.", "Make a drawing that shows {x}."),
    ),
    "held_out": (
        *("Please paint {x} for me.", "Can you make an image of {x}?", "I want to see a picture of {x}."),
        *("Give me an image that shows {x}.", "Could you create a drawing of {x}?", "A picture of {x}, please."),
    ),
}
OPENINGS = ("", "", "Here is {x}.", "Here you are.", "Here it is:")  # words of an answer before the image
# `{x}` is shown, or is not: the answer describes the image.
READ = {
    "train": (
        *("Describe this image.", "What does this drawing show?", "What was drawn here?", "Name what you see."),
        *("Is this a drawing of {x}? Describe it.", "I asked for {x}. What does the image show?"),
        *("Do not draw {x}, describe this image.", "What do you see in this picture?"),
    ),
    "held_out": (
        *("Describe this drawing.", "What does this image show?", "What do you see in this drawing?"),
        *("I asked for a drawing of {x}. Describe this image.", "Do not draw. What was drawn here?"),
    ),
}
# By task; `{x}` is a composition in words.
TEXT = {
    "train": {
        "show": ("What would a drawing of {x} show?", "What would I see in an image of {x}?"),
        "say": ("Write in words: {x}.", "Do not draw {x}, only write it.", "Say {x} without a drawing."),
        "number": ("How many would a drawing of {x} show?", "I want to draw {x}: how many are these?"),
        "category": (
            *("Which category does {x} belong to?", "What category is {x}?", "Do not draw {x}, name its category."),
            "Which category would a picture of {x} belong to?",
        ),
        "skin_tone": ("What is the skin tone of {x}?", "Which skin tone would a drawing of {x} have?"),
    },
    "held_out": {
        "show": ("What would an image of {x} show?", "What would I see in a drawing of {x}?"),
        "say": ("Do not draw {x}, write it in words.", "Only say {x}."),
        "number": ("How many would an image of {x} show?",),
        "category": ("Name the category of {x}, do not draw it.", "Which category would a drawing of {x} belong to?"),
        "skin_tone": ("Which skin tone would a picture of {x} have?",),
    },
}
_OF_SINGLES = ("category", "skin_tone")  # tasks
_STREAM = 8


@dataclass(frozen=True)
class OpenMojiRequests(SourceSettings):
    """Requests of three kinds: answered by an image, about an image, and about words.

    Attributes:
        config: "tones" (things, and emoji with skin tones that have no gender), "quickstart", "study" or "full".
        split: "train" or "composition"; see `Compositions`.
        kinds: of what is drawn, some of "single", "two", "position" and "count".
        draw_share: of requests that are answered by an image with its caption.
        read_share: of requests about an image, answered by its caption. The others are about words.
        wordings: "train", or the wordings of requests that are "held_out".
        turns: requests of a conversation.
        form: "captions" gives what is shown and its caption instead, for contrastive training.
    """

    config: str = "tones"
    image_size: int = 32
    kinds: tuple[str, ...] = KINDS
    draw_share: float = 0.5
    read_share: float = 0.25
    wordings: str = "train"
    turns: int = 1
    form: str = "requests"
    size: int = 20_000

    def check(self) -> None:
        super().check()
        known = set(self.kinds) <= set(KINDS) and self.wordings in WORDINGS and self.form in FORMS
        if not known or not self.kinds or self.draw_share + self.read_share > 1:
            raise ConfigError(
                f"OpenMojiRequests: kinds {self.kinds}, wordings {self.wordings!r}, form {self.form!r}, "
                f"shares {self.draw_share} and {self.read_share}",
                f"some of {', '.join(KINDS)}; one of {', '.join(WORDINGS)}; one of {', '.join(FORMS)}; "
                "shares of at most 1 together",
                "correct the config",
            )

    def build(self) -> _Requests:
        return _Requests(self)


@dataclass(frozen=True)
class EmojiRequest:
    """One request and its answer.

    Attributes:
        task: "draw", "read" or a task of TEXT.
        shown: what is drawn, read or written about.
        answer: the text of the answer; of a drawing, the words before it.
    """

    task: str
    question: str
    shown: Composition
    answer: str


class _Requests(EmojiSource):
    name = "openmoji_requests"
    stream = _STREAM

    def __init__(self, settings: OpenMojiRequests):
        settings.check()
        self.settings = settings
        self.compositions = compositions(settings.config, settings.split, settings.data_dir)
        self.catalog = self.compositions.catalog
        self.emoji_images = EmojiImages(self.catalog)
        allowed = set(self.compositions.singles)
        # With the same number of forms of each base, hands with their tones would not outnumber things.
        self.schedule = [index for index in self.catalog.schedule(settings.per_base) if index in allowed]

    def __len__(self) -> int:
        return self.settings.size

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}-{len(self.schedule)}"

    def requests(self, index: int) -> list[EmojiRequest]:
        """Returns the requests of an example."""
        dice = self._dice(index)
        return [self._request(dice) for _ in range(self.settings.turns)]

    def _request(self, dice: Dice) -> EmojiRequest:
        s, chance = self.settings, dice.below(1 << 20) / (1 << 20)
        if chance < s.draw_share:
            shown = self._compose(dice, s.kinds)
            opening = dice.pick(OPENINGS).format(x=shown.caption)
            return EmojiRequest("draw", dice.pick(DRAW[s.wordings]).format(x=shown.caption), shown, opening)
        if chance < s.draw_share + s.read_share:
            # Two words for one image, such as "left of" and "right of", would make two right answers.
            shown = self._compose(dice, tuple(kind for kind in s.kinds if kind in ("single", "count")) or s.kinds)
            said = shown if dice.chance(0.5) else self._compose(dice, s.kinds)
            return EmojiRequest("read", dice.pick(READ[s.wordings]).format(x=said.caption), shown, shown.caption)
        task = dice.pick(tuple(TEXT[s.wordings]))
        kinds = ("single",) if task in _OF_SINGLES and "single" in s.kinds else s.kinds
        shown = self._compose(dice, kinds)
        answers = self._answers(shown)
        task = task if task in answers else "show"
        return EmojiRequest(task, dice.pick(TEXT[s.wordings][task]).format(x=shown.caption), shown, answers[task])

    def _compose(self, dice: Dice, kinds: tuple[str, ...]) -> Composition:
        return self.compositions.compose(dice, dice.pick(kinds), self.schedule)

    def _answers(self, shown: Composition) -> dict[str, str]:
        there = [cell for cell in shown.cells if cell is not None]
        answers = {"show": shown.caption, "say": shown.caption, "number": NUMBERS[len(there)]}
        if shown.kind == "single":
            of_record = true_answers(self.catalog.records[there[0]])
            answers |= {task: of_record[task] for task in _OF_SINGLES if task in of_record}
        return answers

    def example(self, index: int) -> Example:
        if self.settings.form == "captions":
            return captioned([self.requests(index)[0].shown.caption], lambda: self.images(index)[0])
        messages: list[Message] = []
        for turn, request in enumerate(self.requests(index)):
            asked: tuple[Part, ...] = (Text(request.question),)
            answer: tuple[Part, ...] = (Text(request.answer),) if request.answer else ()
            drawn = Drawn(lambda turn=turn: self.images(index)[turn])
            if request.task == "draw":
                answer += (Image(drawn, caption=request.shown.caption),)
            elif request.task == "read":
                asked = (Image(drawn), *asked)
            messages += [Message("user", asked), Message("assistant", answer)]
        return Example(tuple(messages))

    def images(self, index: int) -> list[np.ndarray]:
        """Returns what each request of an example shows, uint8 [size, size, 3], whether its image is used or not."""
        dice = self._augment(index)
        return [self.draw(request.shown, dice) for request in self.requests(index)]

    def draw(self, shown: Composition, dice: Dice | None = None) -> np.ndarray:
        """Returns a composition as uint8 [size, size, 3]."""
        return draw(self.emoji_images, shown, self.settings.image_size, dice)


def draw(images: EmojiImages, shown: Composition, size: int, dice: Dice | None = None) -> np.ndarray:
    """Returns a composition as uint8 [size, size, 3]; see `EmojiImages.grid`."""
    return images.grid(shown.cells, shown.rows, shown.columns, size, dice)
