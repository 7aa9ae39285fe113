"""Captions of emoji: what they say, and of which picture or place in it."""

from __future__ import annotations

import re

import numpy as np

from mllm_jax.datasets.openmoji import OpenMojiCaptions, OpenMojiText


def spread(source, count: int) -> list[int]:
    return list(range(0, len(source), max(1, len(source) // count)))


def test_captions_and_descriptions_say_the_same(folder):
    captions = OpenMojiCaptions(data_dir=folder, scene_share=0.3).build()
    told = [captions.conversation(index).turns for index in spread(captions, 500)]
    scenes = [turns for turns in told if len(turns) > 1]
    assert 0.2 < len(scenes) / len(told) < 0.4
    names = {row.name for row in captions.catalog.records}
    assert all([turn.place for turn in turns] == [0, 1, 2, 3] for turns in scenes), "a caption for each cell"
    assert all(turns[0].place is None for turns in told if len(turns) == 1)
    assert {turn.answer for turns in told for turn in turns} <= names
    pattern = r"top left (.+) top right (.+) bottom left (.+) bottom right (.+)"
    described = OpenMojiText(data_dir=folder).build()
    for index in spread(described, 500):
        conversation = described.conversation(index)
        assert conversation.num_images == 0 and not described.images(index)
        match = re.fullmatch(pattern, conversation.context)
        assert set(match.groups() if match else [conversation.context]) <= names


def test_captions_list_every_picture_once_a_variant_with_its_base_beside_it(folder):
    source = OpenMojiCaptions(variants=3, data_dir=folder).build()
    records = source.catalog.records
    assert len(source) == 3 * len(records)
    texts = [source.conversation(index).turns[0].answer for index in range(len(source))]
    base_of = {row.name: row.base for row in records}
    variants = [texts[start : start + len(records)] for start in range(0, len(texts), len(records))]
    assert len(base_of) == len(records)
    for variant in variants:
        assert sorted(variant) == sorted(base_of), "every picture once"
        bases = [base_of[text] for text in variant]
        runs = [base for place, base in enumerate(bases) if place == 0 or base != bases[place - 1]]
        assert len(runs) == len(set(bases)), "the forms of a base follow one another"
        assert runs != sorted(runs)
    assert len({tuple(variant) for variant in variants}) == 3, "each variant in an order of its own"
    teachers = [tuple(text for text in variant if base_of[text] == "teacher") for variant in variants]
    assert len(set(teachers)) == 3, "the forms of a base too"


def test_a_caption_names_the_picture_beside_it(folder):
    source = OpenMojiCaptions(variants=2, image_size=32, data_dir=folder).build()
    number = {row.name: index for index, row in enumerate(source.catalog.records)}
    for index in spread(source, 60):
        shown = number[source.conversation(index).turns[0].answer]
        assert np.array_equal(source.images(index)[0], source.pictures.single(shown, 32))


def test_a_caption_of_a_place_names_the_cell_that_is_there(folder):
    source = OpenMojiCaptions(variants=2, image_size=32, scene_share=1.0, data_dir=folder).build()
    number = {row.name: index for index, row in enumerate(source.catalog.records)}
    for index in spread(source, 60):
        picture = source.images(index)[0]
        for turn in source.conversation(index).turns:
            row, column = divmod(turn.place, 2)
            cell = picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert np.array_equal(cell, source.pictures.single(number[turn.answer], 16))


def test_captions_end_in_their_category_as_often_as_asked(folder):
    plain = OpenMojiCaptions(data_dir=folder, scene_share=0.3).build()
    longer = OpenMojiCaptions(data_dir=folder, scene_share=0.3, category_share=0.5).build()
    category = {row.name: row.category for row in plain.catalog.records}
    ended = []
    for index in spread(plain, 500):
        pairs = zip(plain.conversation(index).turns, longer.conversation(index).turns, strict=True)
        for short, long in pairs:
            assert long.place == short.place, "the pictures are the same"
            ended.append(long.answer != short.answer)
            assert long.answer == f"{short.answer} {category[short.answer]}" or not ended[-1]
    assert 0.45 < sum(ended) / len(ended) < 0.55
    assert plain.fingerprint() != longer.fingerprint()
