"""Questions about emoji: their answers are true, balanced, and the same on every machine."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mllm_jax.data.source import Source
from mllm_jax.datasets.openmoji import (
    OpenMojiCaptions,
    OpenMojiPairs,
    OpenMojiQuestions,
    OpenMojiScenes,
    OpenMojiText,
    evaluation_questions,
    load,
)
from mllm_jax.datasets.openmoji.catalog import BASE, Catalog, Dice, catalog, claims_of
from mllm_jax.datasets.openmoji.questions import with_article
from mllm_jax.datasets.openmoji.records import Record
from mllm_jax.datasets.openmoji.scenes import NUMBERS, PLACES, compose_scene
from mllm_jax.datasets.openmoji.turns import Turn
from mllm_jax.errors import ConfigError, DataError

SOURCES = (OpenMojiQuestions, OpenMojiScenes, OpenMojiPairs, OpenMojiCaptions, OpenMojiText)


@pytest.fixture(scope="module")
def statements(folder):
    """Returns the words of a question -> their (base, gender, tone), for every record of every split."""
    said = {}
    for rows in load("quickstart", folder).values():
        for row in rows:
            for claim in claims_of(row):
                said[with_article(claim.text)] = (claim.base, claim.gender, claim.tone)
    return said


def asked_for(question: str) -> str:
    return re.search(r"(?:show|see|find) (.*?)(?: here| anywhere)?\?$", question)[1]


def is_true(statement, row) -> bool:
    base, gender, tone = statement
    return base == row.base and gender in ("", row.gender) and tone in ("", row.skin_tone)


def spread(source, count: int) -> list[int]:
    return list(range(0, len(source), max(1, len(source) // count)))


def captioned(source, index: int) -> SimpleNamespace:
    """Returns an example of captions, each with its region for a question."""
    example = source.example(index)
    said = [
        (segment.region, example.messages[number].text) for segment in example.segments for number in segment.messages
    ]
    return SimpleNamespace(context="", turns=tuple(Turn(str(region), text, "caption") for region, text in said))


@pytest.mark.parametrize("settings", SOURCES)
def test_a_source_is_a_function_of_seed_and_index(settings, folder, read, shown):
    source = settings(data_dir=folder, augment=True).build()
    again = settings(data_dir=folder, augment=True).build()
    other = settings(data_dir=folder, augment=True, seed=1).build()
    assert isinstance(source, Source) and source.fingerprint() == again.fingerprint() != other.fingerprint()
    chosen = spread(source, 60)
    readable = captioned if settings is OpenMojiCaptions else read
    backwards = {index: readable(again, index) for index in reversed(chosen)}
    assert all(readable(source, index) == backwards[index] for index in chosen)
    for index in chosen:
        conversation, images = readable(source, index), shown(source, index)
        assert len(images) == {OpenMojiText: 0, OpenMojiPairs: len(images)}.get(settings, 1)
        assert settings is not OpenMojiPairs or len(images) == len(source.group(index).members) > 1
        assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in images)
        assert all(np.array_equal(one, two) for one, two in zip(images, shown(again, index), strict=True))
        assert conversation.turns and all(turn.answer and turn.task for turn in conversation.turns)
        assert len({turn.question for turn in conversation.turns}) == len(conversation.turns)
        assert bool(conversation.context) == (settings is OpenMojiText)
    with pytest.raises(IndexError):
        source.example(len(source))
    with pytest.raises(IndexError):
        source.example(-1)


def test_another_process_asks_the_same(folder):
    code = (
        "import sys; from mllm_jax.datasets.openmoji import OpenMojiScenes;"
        "s = OpenMojiScenes(data_dir=sys.argv[1]).build();"
        "print(s.fingerprint(), [message.text for message in s.example(123).messages])"
    )
    there = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True).stdout
    here = OpenMojiScenes(data_dir=folder).build()
    assert there.strip() == f"{here.fingerprint()} {[message.text for message in here.example(123).messages]}"


def test_the_fingerprint_follows_settings_but_not_the_folder(folder, tmp_path):
    one = OpenMojiQuestions(data_dir=folder).build().fingerprint()
    assert OpenMojiQuestions(data_dir=folder, variants=9).build().fingerprint() != one
    assert OpenMojiQuestions(data_dir=folder, split="unseen").build().fingerprint() != one
    load("quickstart", tmp_path)
    assert OpenMojiQuestions(data_dir=str(tmp_path)).build().fingerprint() == one


def test_answers_about_one_image_are_true(folder, statements, read):
    source = OpenMojiQuestions(data_dir=folder).build()
    counts = Counter()
    for index in spread(source, 3000):
        row = source.catalog.records[source.record_index(index)]
        for turn in read(source, index).turns:
            counts[turn.task, turn.answer] += 1
            if turn.task == "yes_no":
                words = asked_for(turn.question)
                assert turn.answer == ("yes" if is_true(statements[words], row) else "no"), (turn, row.name)
                if turn.answer == "no" and statements[words][0] != row.base:
                    mine, theirs = set(row.base.split()), set(statements[words][0].split())
                    assert not mine <= theirs and not theirs <= mine, f"{words} may be called true of {row.name}"
            elif turn.task == "skin_tone":
                assert turn.answer.removesuffix(" yellow") == row.skin_tone
            else:
                assert turn.answer == (row.name if turn.task == "naming" else getattr(row, turn.task))
    yes, no = counts["yes_no", "yes"], counts["yes_no", "no"]
    assert abs(yes / (yes + no) - 0.5) < 0.03
    assert {task for task, _ in counts} == {"naming", "category", "subcategory", "skin_tone", "gender", "yes_no"}


def test_wrong_claims_are_plausible(folder, statements):
    """Checks a person: some wrong claims differ only in tone or gender; most, but not all, share the category."""
    known = catalog("quickstart", "train", folder)
    category = {row.base: row.category for row in known.records}
    person = next(index for index, row in enumerate(known.records) if row.name == "woman teacher with medium skin tone")
    claims = [
        known.wrong_claim(Dice(0, number), person, (person,), known.level(Dice(1, number), 0.2))
        for number in range(2000)
    ]
    # Two in ten are drawn from the same base, except for claims of a base alone and for claims that happen to be true.
    assert 0.08 < sum(claim.base == "teacher" for claim in claims) / len(claims) < 0.2
    assert 0.7 < sum(category[claim.base] == "people and body" for claim in claims) / len(claims) < 0.95
    cat = next(index for index, row in enumerate(known.records) if row.name == "cat")
    claims = [known.wrong_claim(Dice(2, number), cat, (cat,), BASE) for number in range(2000)]
    near = sum(category[claim.base] == category["cat"] for claim in claims) / len(claims)
    assert 0.65 < near < 0.8, "seven in ten from the category, and some of the rest by chance"


def test_a_base_with_many_forms_does_not_drown_the_others(folder):
    source = OpenMojiQuestions(data_dir=folder).build()
    shown = Counter(source.catalog.records[source.record_index(index)].base for index in range(len(source)))
    assert shown["cat"] == 3 * source.settings.variants and max(shown.values()) <= 6 * shown["cat"]


@pytest.mark.parametrize(
    "settings,kinds,count",
    [
        (OpenMojiQuestions(tasks=("naming",), turns=1), {"naming"}, 1),
        (OpenMojiQuestions(tasks=("yes_no",), turns=5), {"yes_no"}, 5),
        (OpenMojiQuestions(tasks=("yes_no", "category"), turns=3), {"yes_no", "category"}, 3),
        (OpenMojiScenes(tasks=("scene_position",), turns=4), {"scene_position"}, 4),
        (OpenMojiScenes(grid=3, tasks=("scene_position",), turns=9), {"scene_position"}, 9),
        (OpenMojiScenes(tasks=("scene_count", "scene_position"), turns=3), {"scene_count", "scene_position"}, 3),
        (OpenMojiText(tasks=("naming", "category"), turns=2, scene_share=0.0), {"naming", "category"}, 2),
        (OpenMojiText(tasks=("scene_position",), turns=2, scene_share=1.0), {"scene_position"}, 2),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "build") else None,
)
def test_tasks_and_turns_restrict_the_questions(settings, kinds, count, folder, read):
    source = replace(settings, data_dir=folder).build()
    seen = Counter()
    for index in spread(source, 300):
        turns = read(source, index).turns
        assert len(turns) == count and {turn.task for turn in turns} <= kinds
        assert sum(turn.task == "scene_count" for turn in turns) <= 1
        seen.update(turn.task for turn in turns)
    assert set(seen) == kinds
    plain = replace(settings, data_dir=folder, tasks=(), turns=None).build()
    assert source.fingerprint() != plain.fingerprint()


def test_yes_and_no_are_even_where_nothing_else_is_asked(folder, statements, read):
    source = OpenMojiQuestions(tasks=("yes_no",), turns=5, variants=2, data_dir=folder).build()
    counts = Counter()
    for index in spread(source, 500):
        row = source.catalog.records[source.record_index(index)]
        for turn in read(source, index).turns:
            assert turn.answer == ("yes" if is_true(statements[asked_for(turn.question)], row) else "no")
            counts[turn.answer] += 1
    assert abs(counts["yes"] / counts.total() - 0.5) < 0.03


def test_every_place_of_a_scene_is_asked_for_once(folder, read):
    source = OpenMojiScenes(tasks=("scene_position",), turns=4, data_dir=folder).build()
    for index in range(50):
        turns = read(source, index).turns
        asked = [next(place for place in PLACES[2] if f"the {place}" in turn.question) for turn in turns]
        assert sorted(asked) == sorted(PLACES[2])


@pytest.mark.parametrize("grid", [2, 3])
def test_answers_about_scenes_are_true(grid, folder, statements, read):
    source = OpenMojiScenes(grid=grid, data_dir=folder).build()
    counts, placed = defaultdict(Counter), Counter()
    for index in spread(source, 3000):
        scene = source.scene(index)
        rows = [source.catalog.records[cell] for cell in scene.cells]
        assert len(rows) == grid * grid
        for turn in read(source, index).turns:
            if turn.task == "scene_position":
                place = re.search(r"in the (.*)\?|does the (.*) show", turn.question)
                place = PLACES[grid].index(place[1] or place[2])
                placed[place] += 1
                assert turn.answer == rows[place].name
                continue
            counts[turn.task][turn.answer] += 1
            statement = statements[asked_for(turn.question)]
            true = sum(is_true(statement, row) for row in rows)
            if turn.task == "scene_count":
                assert turn.answer == NUMBERS[true]
            else:
                assert turn.answer == ("yes" if true else "no")
    assert abs(counts["scene_exists"]["yes"] / counts["scene_exists"].total() - 0.5) < 0.03
    assert set(counts["scene_count"]) == set(NUMBERS)
    assert max(counts["scene_count"].values()) < 0.24 * counts["scene_count"].total()
    assert len(placed) == grid * grid and min(placed.values()) > 0.7 * placed.total() / grid**2


@pytest.mark.parametrize("per_base", [1, 2, 3])
def test_bases_with_few_forms_are_repeated(folder, per_base):
    shown = Counter(OpenMojiQuestions(data_dir=folder, per_base=per_base).build().schedule)
    records = OpenMojiQuestions(data_dir=folder).build().catalog.records
    forms, bases = Counter(record.base for record in records), Counter()
    for index, count in shown.items():
        bases[records[index].base] += count
        assert (count - 1) * forms[records[index].base] < per_base, "no more often than it takes"
    assert bases.keys() == forms.keys() and min(bases.values()) == per_base, "some base has one form"


def test_a_scene_shows_its_images_in_their_places(folder, shown):
    source = OpenMojiScenes(data_dir=folder).build()
    singles = OpenMojiQuestions(data_dir=folder, image_size=32).build()
    for index in range(20):
        image = shown(source, index)[0]
        for place, cell in enumerate(source.scene(index).cells):
            row, column = 32 * (place // 2), 32 * (place % 2)
            assert np.array_equal(image[row : row + 32, column : column + 32], singles.emoji_images.single(cell, 32))


def test_augmentation_moves_images_but_keeps_them_whole(folder, shown):
    plain = OpenMojiQuestions(data_dir=folder).build()
    moved = OpenMojiQuestions(data_dir=folder, augment=True).build()
    indices = spread(plain, 200)
    ratios = [(255 - shown(moved, i)[0]).sum() / (255 - shown(plain, i)[0].astype(int)).sum() for i in indices]
    assert min(ratios) > 0.65 and max(ratios) < 1.05, "area shrinks at most by 0.85 squared, and no ink is cut off"
    assert sum(not np.array_equal(shown(moved, i)[0], shown(plain, i)[0]) for i in indices) > 100
    assert len({shown(moved, i)[0].tobytes() for i in range(8)}) > 3, "variants of one image differ"


def test_answers_about_several_images_are_true(folder, statements, read):
    source = OpenMojiPairs(data_dir=folder).build()
    counts = defaultdict(Counter)
    for index in spread(source, 2000):
        rows = [source.catalog.records[member] for member in source.group(index).members]
        for turn in read(source, index).turns:
            counts[turn.task][turn.answer] += 1
            if turn.task == "pair_same":
                assert turn.answer == ("yes" if len({row.name for row in rows}) == 1 else "no")
            elif turn.task == "pair_category":
                assert turn.answer == ("yes" if len({row.category for row in rows}) == 1 else "no")
            elif turn.task == "pair_naming":
                place = ("first", "second", "third").index(re.search(r"the (\w+) picture", turn.question)[1])
                assert turn.answer == rows[place].name
            else:
                statement = statements[re.search(r"(?:shows|see) (.*?), (?:in )?the", turn.question)[1]]
                right = [
                    name
                    for name, row in zip(("first", "second", "third"), rows, strict=False)
                    if is_true(statement, row)
                ]
                assert right == [turn.answer]
    assert abs(counts["pair_same"]["yes"] / counts["pair_same"].total() - 0.5) < 0.05


def test_text_about_a_description_is_answered_by_it(folder, read):
    source = OpenMojiText(data_dir=folder, scene_share=1.0).build()
    places = ("top left", "top right", "bottom left", "bottom right")
    for index in spread(source, 300):
        conversation = read(source, index)
        match = re.fullmatch(" ".join(f"{place} (.+)" for place in places), conversation.context)
        described = dict(zip(places, match.groups(), strict=True))
        for turn in conversation.turns:
            if turn.task == "scene_position":
                place = next(place for place in described if f"the {place}" in turn.question)
                assert turn.answer == described[place]


def test_no_text_names_a_held_out_image(folder, read):
    source = OpenMojiText(data_dir=folder, variants=1).build()
    texts = set()
    for conversation in (read(source, index) for index in range(len(source))):
        texts |= {conversation.context, *(text for turn in conversation.turns for text in (turn.question, turn.answer))}
    assert {row.name for row in load("quickstart", folder)["train"]} & texts
    held = {row.name for split in ("composition", "unseen") for row in load("quickstart", folder)[split]}
    assert not held & texts, "no name of a held-out image occurs in training"


@pytest.mark.parametrize("split", ["validation", "composition", "unseen"])
def test_evaluation_is_fair(split, folder, statements):
    known = catalog("quickstart", split, folder)
    questions = evaluation_questions("quickstart", split, image_size=32, limit=100, data_dir=folder)
    again = evaluation_questions("quickstart", split, image_size=32, limit=100, data_dir=folder)
    assert [(q.task, q.question, q.answer, q.record_index) for q in questions] == [
        (q.task, q.question, q.answer, q.record_index) for q in again
    ]
    groups = defaultdict(list)
    for question in questions:
        groups[question.task].append(question)
        assert all(image.shape == (32, 32, 3) for image in question.images) and len(question.images) == 1
    assert all(2 <= len(group) <= 100 and len({one.answer for one in group}) > 1 for group in groups.values())
    scenes = {"scene2_top_left", "scene2_count", "scene2_exists", "scene3_position", "scene3_count", "scene3_exists"}
    assert set(groups) >= {"naming", "skin_tone", "gender", "yes_no"} | scenes
    for task in ("yes_no", "scene2_exists", "scene3_exists"):
        assert Counter(one.answer for one in groups[task])["yes"] * 2 == len(groups[task])
    for task in ("scene2_count", "scene3_count"):
        assert set(Counter(one.answer for one in groups[task]).values()) == {20}
    for one in groups["yes_no"]:
        row = known.records[one.record_index]
        assert one.answer == ("yes" if is_true(statements[asked_for(one.question)], row) else "no")
    for one in groups["scene2_count"]:
        target = known.claims[one.record_index][BASE]
        assert asked_for(one.question) == with_article(target.text)


def test_unseen_is_asked_with_one_form_a_base(folder):
    known = catalog("quickstart", "unseen", folder)
    questions = evaluation_questions("quickstart", "unseen", data_dir=folder)
    for task in ("naming", "category", "subcategory"):
        bases = [known.records[one.record_index].base for one in questions if one.task == task]
        assert len(bases) == len(set(bases)) == len(known.by_base)
    answers = Counter(one.answer for one in questions if one.task == "category")
    assert answers.most_common(1)[0][1] <= 0.2 * answers.total()


def test_articles():
    for words, spoken in {
        "cat": "a cat",
        "owl": "an owl",
        "unicorn": "a unicorn",
        "umbrella": "an umbrella",
        "hourglass done": "an hourglass done",
        "grapes": "grapes",
        "octopus": "an octopus",
        "dress": "a dress",
        "thumbs up": "a thumbs up",
        "clapping hands with dark skin tone": "clapping hands with dark skin tone",
        "woman with beard": "a woman with beard",
        "fire": "fire",
        "statue of liberty": "a statue of liberty",
    }.items():
        assert with_article(words) == spoken


def test_a_source_travels_to_another_process(folder, read, shown):
    source = OpenMojiQuestions(data_dir=folder).build()
    shown(source, 5)
    copy = pickle.loads(pickle.dumps(source))
    assert read(copy, 5) == read(source, 5)
    assert np.array_equal(shown(copy, 5)[0], shown(source, 5)[0])


@pytest.mark.parametrize(
    "settings",
    [
        OpenMojiQuestions(image_size=0),
        OpenMojiQuestions(variants=0),
        OpenMojiQuestions(seed=-1),
        OpenMojiScenes(grid=4),
        OpenMojiScenes(size=0),
        OpenMojiQuestions(turns=0),
        OpenMojiScenes(turns=65),
        OpenMojiCaptions(scene_share=1.5),
        OpenMojiCaptions(category_share=-0.1),
        OpenMojiText(naming_last=-1),
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        settings.build()


def test_an_unknown_split_is_refused(folder):
    with pytest.raises(DataError, match="composition"):
        OpenMojiQuestions(split="test", data_dir=folder).build()


def test_importing_needs_none_of_the_heavy_packages():
    code = (
        "import sys, mllm_jax.datasets.openmoji;"
        "print([name for name in ('tensorflow_datasets', 'tensorflow', 'emoji', 'jax') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_names_that_hold_others_are_never_refuted():
    def row(base: str, subcategory: str, category: str = "animals and nature") -> Record:
        return Record(b"", base, base, category, subcategory, "", "", base)

    rows = [
        row("bird", "bird"),
        row("duck", "bird"),
        row("dog", "mammal"),
        row("poodle", "mammal"),
        row("cat", "mammal"),
    ]
    people = "people and body"
    rows += [row("cat face", "mammal"), row("person", "person", people), row("cook", "role person", people)]
    rows += [row("thumbs up", "closed fingers", people)]
    known = Catalog(rows, "test")
    for index, record in enumerate(rows):
        claim = known.claims[index][BASE]
        doubtful = {rows[i].base for i in range(len(rows)) if not known.refutes(claim, i)}
        assert (
            doubtful
            == {
                "bird": {"bird", "duck"},
                "duck": {"bird", "duck"},
                "dog": {"dog", "poodle"},
                "poodle": {"dog", "poodle"},
                "cat": {"cat", "cat face"},
                "cat face": {"cat", "cat face"},
                "person": {"person", "cook"},
                "cook": {"person", "cook"},
                "thumbs up": {"thumbs up"},
            }[record.base]
        )


def test_a_split_of_one_base_makes_no_scene(folder):
    known = catalog("quickstart", "train", folder)
    cats = Catalog([row for row in known.records if row.base == "cat"], "openmoji/cats")
    with pytest.raises(DataError, match="openmoji/cats has too few"):
        compose_scene(cats, Dice(0), 2, cats.all)
    assert cats.wrong_claim(Dice(0), 0, (0,), BASE) is None


@pytest.mark.parametrize("split", ["train", "validation", "composition", "unseen"])
def test_the_full_set_can_be_asked_too(split, tmp_path_factory):
    folder = str(tmp_path_factory.getbasetemp() / "full")
    questions = evaluation_questions("full", split, image_size=32, limit=40, data_dir=folder)
    categories = Counter(one.answer for one in questions if one.task == "category")
    assert not categories or max(categories.values()) <= 0.3 * categories.total(), "the limit takes bases evenly"
    assert {"naming", "yes_no", "scene2_count", "scene3_exists"} <= {one.task for one in questions}
    for settings in SOURCES:
        source = settings(config="full", split=split, data_dir=folder).build()
        assert all(source.example(index).messages for index in spread(source, 300))
