"""Several images in one conversation, with questions that compare them."""

from __future__ import annotations

from dataclasses import dataclass

from mllm_jax.datasets.openmoji.catalog import FULL, Catalog, Dice
from mllm_jax.datasets.openmoji.questions import with_article
from mllm_jax.datasets.openmoji.turns import Turn

ORDINALS = ("first", "second", "third")
_CHOICES = {2: "the first or the second", 3: "the first, the second or the third"}
_ALL = {2: "both", 3: "all"}
ASKED = {
    "pair_which": ("Which picture shows {x}, {choices}?", "Where do you see {x}, in {choices}?"),
    "pair_same": ("Do {all} pictures show the same thing?", "Is the same thing in {all} pictures?"),
    "pair_naming": ("What does the {place} picture show?", "What is in the {place} picture?"),
    "pair_category": ("Do {all} pictures belong to one category?", "Are {all} pictures of one category?"),
}


@dataclass(frozen=True)
class Group:
    """The record indices of two or three images, in order."""

    members: tuple[int, ...]


def compose_group(catalog: Catalog, dice: Dice, schedule: list[int]) -> Group:
    """Draws two or three images: half of the groups show one thing; half of the others come from one category."""
    count = 2 + dice.below(2)
    first = dice.pick(schedule)
    if dice.chance(0.5):
        return Group((first,) * count)
    pool = catalog.by_category[catalog.records[first].category] if dice.chance(0.5) else schedule
    members = [first]
    for _ in range(40):
        other = dice.pick(pool)
        if all(clearly_different(catalog, other, member) for member in members):
            members.append(other)
        if len(members) == count:
            dice.shuffle(members)
            return Group(tuple(members))
    return Group((first,) * count)  # the split is too small for different images


def group_turns(catalog: Catalog, dice: Dice, group: Group) -> list[Turn]:
    """Returns two to four turns in random order; "which" is asked only if exactly one image is right."""
    count = len(group.members)
    records = [catalog.records[index] for index in group.members]
    same = len(set(group.members)) == 1
    turns = [_ask(dice, "pair_same", "yes" if same else "no", count)]
    place = dice.below(count)
    turns.append(_ask(dice, "pair_naming", records[place].name, count, place=ORDINALS[place]))
    one_category = len({record.category for record in records}) == 1
    if dice.chance(0.5):
        turns.append(_ask(dice, "pair_category", "yes" if one_category else "no", count))
    if not same:
        place = dice.below(count)
        words = with_article(catalog.claims[group.members[place]][FULL].text)
        turns.append(_ask(dice, "pair_which", ORDINALS[place], count, x=words))
    dice.shuffle(turns)
    return turns


def _ask(dice: Dice, task: str, answer: str, count: int, **words: str) -> Turn:
    question = dice.pick(ASKED[task]).format(choices=_CHOICES[count], all=_ALL[count], **words)
    return Turn(question, answer, task)


def clearly_different(catalog: Catalog, one: int, other: int) -> bool:
    """Returns whether neither record could go by the other's name."""
    return catalog.refutes(catalog.claims[one][FULL], other) and catalog.refutes(catalog.claims[other][FULL], one)
