"""Captions of emoji: their content, and the image or cell that they describe."""

from __future__ import annotations

import re

import numpy as np

from mllm_jax.datasets.openmoji import OpenMojiCaptions, OpenMojiText


def spread(source, count: int) -> list[int]:
    return list(range(0, len(source), max(1, len(source) // count)))


def said(source, index: int) -> list[tuple[str, int | None]]:
    """Returns (caption, region) of an example, which has one image."""
    example = source.example(index)
    assert len(example.media) == 1
    return [(example.messages[number].text, s.region) for s in example.segments for number in s.messages]


def image(source, index: int) -> np.ndarray:
    (part,) = source.example(index).media
    return np.asarray(part.source)


def test_captions_and_descriptions_say_the_same(folder):
    captions = OpenMojiCaptions(data_dir=folder, scene_share=0.3).build()
    described = [said(captions, index) for index in spread(captions, 500)]
    scenes = [captions for captions in described if len(captions) > 1]
    assert 0.2 < len(scenes) / len(described) < 0.4
    names = {row.name for row in captions.catalog.records}
    assert all([region for _, region in captions] == [0, 1, 2, 3] for captions in scenes), "a caption for each cell"
    assert all(captions[0][1] is None for captions in described if len(captions) == 1)
    assert {text for captions in described for text, _ in captions} <= names
    pattern = r"top left (.+) top right (.+) bottom left (.+) bottom right (.+)"
    described = OpenMojiText(data_dir=folder).build()
    for index in spread(described, 500):
        example = described.example(index)
        assert not example.media
        context, _ = [part.text for part in example.messages[0].parts]
        match = re.fullmatch(pattern, context)
        assert set(match.groups() if match else [context]) <= names


def test_captions_list_every_image_once_a_variant_with_its_base_beside_it(folder):
    source = OpenMojiCaptions(variants=3, data_dir=folder).build()
    records = source.catalog.records
    assert len(source) == 3 * len(records)
    texts = [said(source, index)[0][0] for index in range(len(source))]
    base_of = {row.name: row.base for row in records}
    variants = [texts[start : start + len(records)] for start in range(0, len(texts), len(records))]
    assert len(base_of) == len(records)
    for variant in variants:
        assert sorted(variant) == sorted(base_of), "every image once"
        bases = [base_of[text] for text in variant]
        runs = [base for place, base in enumerate(bases) if place == 0 or base != bases[place - 1]]
        assert len(runs) == len(set(bases)), "the forms of a base are next to each other"
        assert runs != sorted(runs)
    assert len({tuple(variant) for variant in variants}) == 3, "each variant in its own order"
    teachers = [tuple(text for text in variant if base_of[text] == "teacher") for variant in variants]
    assert len(set(teachers)) == 3, "the forms of a base too"


def test_a_caption_names_the_image_beside_it(folder):
    source = OpenMojiCaptions(variants=2, image_size=32, data_dir=folder).build()
    number = {row.name: index for index, row in enumerate(source.catalog.records)}
    for index in spread(source, 60):
        shown = number[said(source, index)[0][0]]
        assert np.array_equal(image(source, index), source.emoji_images.single(shown, 32))


def test_a_caption_of_a_place_names_the_cell_that_is_there(folder):
    source = OpenMojiCaptions(variants=2, image_size=32, scene_share=1.0, data_dir=folder).build()
    number = {row.name: index for index, row in enumerate(source.catalog.records)}
    for index in spread(source, 60):
        scene = image(source, index)
        for text, region in said(source, index):
            row, column = divmod(region, 2)
            cell = scene[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert np.array_equal(cell, source.emoji_images.single(number[text], 16))


def test_captions_end_in_their_category_as_often_as_asked(folder):
    plain = OpenMojiCaptions(data_dir=folder, scene_share=0.3).build()
    longer = OpenMojiCaptions(data_dir=folder, scene_share=0.3, category_share=0.5).build()
    category = {row.name: row.category for row in plain.catalog.records}
    ended = []
    for index in spread(plain, 500):
        pairs = zip(said(plain, index), said(longer, index), strict=True)
        for (short, region), (long, its_region) in pairs:
            assert its_region == region, "the images are the same"
            ended.append(long != short)
            assert long == f"{short} {category[short]}" or not ended[-1]
    assert 0.45 < sum(ended) / len(ended) < 0.55
    assert plain.fingerprint() != longer.fingerprint()
