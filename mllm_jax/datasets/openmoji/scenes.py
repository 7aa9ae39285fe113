"""Scenes: grids of emoji in one image, composed for balanced questions about positions, numbers and presence."""

from __future__ import annotations

from dataclasses import dataclass

from mllm_jax.datasets.openmoji.catalog import BASE, FULL, Catalog, Claim, Dice
from mllm_jax.datasets.openmoji.questions import with_article
from mllm_jax.datasets.openmoji.turns import Turn
from mllm_jax.errors import DataError

PLACES = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: (
        *("top left", "top middle", "top right"),
        *("middle left", "middle", "middle right"),
        *("bottom left", "bottom middle", "bottom right"),
    ),
}
NUMBERS = ("zero", "one", "two", "three", "four")
ASKED = {
    "scene_position": ("What is in the {place}?", "What does the {place} show?", "What do you see in the {place}?"),
    "scene_count": ("How many of these show {x}?", "How many times do you see {x}?", "Count: how many show {x}?"),
    "scene_exists": ("Does one of these show {x}?", "Do you see {x} anywhere?", "Can you find {x} here?"),
}


@dataclass(frozen=True)
class Scene:
    """A grid x grid image: record indices in reading order, and the record whose base occurs `count` times."""

    grid: int
    cells: tuple[int, ...]
    target: int
    count: int


def compose_scene(catalog: Catalog, dice: Dice, grid: int, schedule: list[int], count: int | None = None) -> Scene:
    """Draws a scene: one base occurs 0 to 4 times, each number equally often, among others that it is not true of.

    Half of the others come from the base's own category, so that counting takes more than telling animals from food.

    Args:
        schedule: record indices to draw from; repeated records are drawn more often.
        count: how often the base occurs; drawn if None.
    """
    count = dice.below(len(NUMBERS)) if count is None else count
    for _ in range(20):  # in a small split, a base such as "person" may be true of everything: then take another
        target = dice.pick(schedule)
        base = catalog.claims[target][BASE]
        same, category = catalog.by_base[base.text], catalog.by_category[catalog.records[target].category]
        cells: list[int | None] = [dice.pick(same) for _ in range(count)]
        while len(cells) < grid * grid:
            cells.append(_other(catalog, dice, base, category if dice.chance(0.5) else schedule))
        if None not in cells:
            dice.shuffle(cells)
            return Scene(grid, tuple(cell for cell in cells if cell is not None), target, count)
    raise DataError(
        f"{catalog.where} has too few images for scenes", "two bases that differ clearly", "choose a larger split"
    )


def scene_turns(catalog: Catalog, dice: Dice, scene: Scene, count: int, only: tuple[str, ...] = ()) -> list[Turn]:
    """Returns `count` turns on a scene: mostly positions, one number, presence once or twice, in random order.

    Args:
        only: the only tasks to ask, the number still at most once; all tasks if none of them is about scenes.
    """
    tasks = ["scene_count", "scene_exists"] + ["scene_position"] * (count - 2)
    if count > 3 and dice.chance(0.5):
        tasks[-1] = "scene_exists"
    only = tuple(task for task in only if task in ASKED)
    if only:
        again = [task for task in only if task != "scene_count"]
        tasks = [task for task in only if task == "scene_count"]
        tasks += [again[n % len(again)] for n in range(count - len(tasks))] if again else []
    dice.shuffle(tasks)
    places = list(range(len(scene.cells)))
    dice.shuffle(places)
    wordings = list(ASKED["scene_exists"])
    dice.shuffle(wordings)
    turns: list[Turn] = []
    for task in tasks:
        if task == "scene_position":
            turn = position(catalog, scene, places.pop(), dice.pick(ASKED[task])) if places else None
        elif task == "scene_count":
            turn = count_of(catalog, scene, dice.pick(ASKED[task]))
        else:
            turn = exists(catalog, dice, scene, dice.chance(0.5), wordings[len(turns) % len(wordings)])
        if turn is not None:
            turns.append(turn)
    return turns


def position(catalog: Catalog, scene: Scene, cell: int, question: str) -> Turn:
    """Asks what a cell shows."""
    place = PLACES[scene.grid][cell]
    return Turn(question.format(place=place), catalog.claims[scene.cells[cell]][FULL].text, "scene_position")


def count_of(catalog: Catalog, scene: Scene, question: str) -> Turn:
    """Asks how often the scene's own base is shown."""
    words = with_article(catalog.claims[scene.target][BASE].text)
    return Turn(question.format(x=words), NUMBERS[scene.count], "scene_count")


def exists(catalog: Catalog, dice: Dice, scene: Scene, truth: bool, question: str) -> Turn | None:
    """Asks whether something is anywhere in the scene; returns None if the split has no false claim."""
    near = dice.pick(scene.cells)
    level = catalog.level(dice, base_share=0.5)
    claim = catalog.claims[near][level] if truth else catalog.wrong_claim(dice, near, scene.cells, level)
    if claim is None:
        return None
    return Turn(question.format(x=with_article(claim.text)), "yes" if truth else "no", "scene_exists")


def scene_caption(catalog: Catalog, scene: Scene) -> str:
    """Returns the scene in words: "top left red apple top right ..."."""
    pairs = zip(PLACES[scene.grid], scene.cells, strict=True)
    return " ".join(f"{place} {catalog.claims[index][FULL].text}" for place, index in pairs)


def _other(catalog: Catalog, dice: Dice, claim: Claim, pool: list[int]) -> int | None:
    """Returns a record of which the claim is false, from the pool if possible; None if there is none."""
    for _ in range(20):
        index = dice.pick(pool)
        if catalog.refutes(claim, index):
            return index
    start = dice.below(len(catalog.all))
    return next((i for i in catalog.all[start:] + catalog.all[:start] if catalog.refutes(claim, i)), None)
