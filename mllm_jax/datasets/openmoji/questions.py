"""Questions about one image: their wordings and their true answers."""

from __future__ import annotations

import re

from mllm_jax.datasets.openmoji.catalog import FULL, Catalog, Dice
from mllm_jax.datasets.openmoji.records import Record
from mllm_jax.datasets.openmoji.turns import Turn

# `{x}` is a claim with its article. No verb follows it, because it may be singular or plural.
ASKED = {
    "naming": (
        "What does this picture show?",
        "What is this?",
        "What do you see here?",
        "What is shown here?",
        "Name what you see.",
        "What is in the picture?",
    ),
    "category": ("Which category does it belong to?", "What category is this?", "What kind of thing is this?"),
    "subcategory": ("Which group does it belong to?", "What group is this, more closely?"),
    "skin_tone": ("What skin tone is shown?", "What is the skin tone?", "Which skin tone do you see?"),
    "gender": ("Is it a woman, a man or a person?", "Which gender is shown: woman, man or person?"),
    "yes_no": ("Does this picture show {x}?", "Do you see {x} here?", "Can you see {x}?"),
}
_PLURAL_OR_MASS = frozenset(
    """
    bread, bacon, popcorn, sushi, garlic, broccoli, butter, salt, rice, spaghetti, curry rice, cooked rice,
    ginger root, sheaf of rice, soft ice cream, ice cream, shaved ice, ice, soap, fire, dna, fog, wood, coral,
    tennis, bowling, badminton, ping pong, lacrosse, ice hockey, field hockey, money, nail polish, sake, mate,
    fondue, herb, mount fuji, breast-feeding, horse racing, baseball, basketball, volleyball, american football,
    rugby football, softball, thread, yarn
    """.replace("\n    ", " ")
    .strip()
    .split(", ")
)
_SINGULAR_WITH_S = frozenset(
    ["bus", "minibus", "trolleybus", "octopus", "rhinoceros", "hippopotamus", "cactus", "lotus", "abacus"]
)
_SPOKEN_VOWEL = re.compile(r"(?!uni|one|eu|ewe)[aeiou]|hour")


def with_article(words: str) -> str:
    """Returns the words as a noun phrase: "a cat", "an owl", "grapes"."""
    head = words.partition(" with ")[0].partition(" of ")[0].split(" ")[-1]
    plural = head.endswith("s") and not head.endswith("ss") and head not in _SINGULAR_WITH_S
    if plural or words.partition(" with ")[0] in _PLURAL_OR_MASS:
        return words
    return f"an {words}" if _SPOKEN_VOWEL.match(words) else f"a {words}"


def true_answers(record: Record) -> dict[str, str]:
    """Returns task -> answer for the tasks that apply to a record (without `yes_no`)."""
    answers = {"naming": record.name, "category": record.category, "subcategory": record.subcategory}
    if record.skin_tone:
        answers["skin_tone"] = "default yellow" if record.skin_tone == "default" else record.skin_tone
    if record.gender:
        answers["gender"] = record.gender
    return answers


def yes_no(catalog: Catalog, dice: Dice, index: int, truth: bool, question: str) -> Turn | None:
    """Asks whether image `index` shows something; returns None if the split has no false claim."""
    level = catalog.level(dice)
    claim = catalog.claims[index][level] if truth else catalog.wrong_claim(dice, index, (index,), level)
    if claim is None:
        return None
    return Turn(question.format(x=with_article(claim.text)), "yes" if truth else "no", "yes_no")


def image_turns(
    catalog: Catalog, dice: Dice, index: int, count: int, naming_last: float = 0.5, only: tuple[str, ...] = ()
) -> list[Turn]:
    """Returns about `count` turns of different tasks on image `index`; yes_no may occur more than once.

    Args:
        naming_last: share of the conversations that ask for the name last, so that it does not give away the other
            answers.
        only: the only tasks to ask; naming is then not added. Empty: all.
    """
    answers = true_answers(catalog.records[index])
    if only:
        tasks = [task for task in only if task in answers]
        tasks += ["yes_no"] * (count - len(tasks)) if "yes_no" in only else []
        dice.shuffle(tasks)
        tasks = tasks[:count]
    else:
        tasks = [task for task in answers if task not in ("naming", "subcategory")] + ["yes_no", "yes_no"]
        if dice.chance(0.3):
            tasks.append("subcategory")
        dice.shuffle(tasks)
        tasks = tasks[: count - 1]
        tasks.insert(len(tasks) if dice.chance(naming_last) else dice.below(len(tasks) + 1), "naming")
    turns = []
    wordings = list(ASKED["yes_no"])
    dice.shuffle(wordings)  # in turn: dropping a repeated question would drop more "yes" than "no"
    for task in tasks:
        if task == "yes_no":
            wordings.append(wordings.pop(0))
            turn = yes_no(catalog, dice, index, dice.chance(0.5), wordings[-1])
        else:
            turn = Turn(dice.pick(ASKED[task]), answers[task], task)
        if turn is not None:
            turns.append(turn)
    return turns


def caption(catalog: Catalog, index: int) -> str:
    """Returns image `index` in words."""
    return catalog.claims[index][FULL].text
