"""Assigns each form to a split by hashes, so that every machine agrees."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from mllm_jax.datasets.held_out import stable_hash
from mllm_jax.datasets.openmoji.vocabulary import Form

SPLITS = ("train", "validation", "composition", "unseen")
SIMPLE_SPLITS = ("train", "unseen")  # that hold forms where hardly any base has several
UNSEEN_SHARE = 0.12  # of the bases of each category
LARGEST_CATEGORY = 0.18  # of the bases in `unseen`
COMPOSITION_SHARE = 0.15  # of the forms of a base with genders
VALIDATION_SHARE = 0.05  # of the remaining bases with several forms: about 3 % of the remaining forms
FEWEST = 8  # forms in `validation`: fewer measure nothing, and stay in `train`
_MANY_FORMS = 6


def assign_splits(forms: Sequence[Form]) -> list[str]:
    """Returns the split of each form.

    `unseen` holds all forms of its bases. `composition` holds (gender, tone) combinations of bases whose every gender
    and every tone is in other forms of `train`; a base with one gender gives none. `validation` takes a few forms of
    bases that keep others in `train`, because a base with a single image would be one more unseen base. It
    has none if they would be fewer than FEWEST, as where each base has a single form.

    Args:
        forms: distinct forms of one configuration, in any order.

    Returns:
        One of SPLITS for each form.
    """
    by_base: dict[str, list[Form]] = defaultdict(list)
    for form in forms:
        by_base[form.base].append(form)
    unseen = _unseen_bases(by_base)
    split_of: dict[str, str] = {}
    for base, members in by_base.items():
        if base in unseen:
            split_of.update((form.codepoints, "unseen") for form in members)
            continue
        members = sorted(members, key=lambda form: _order("form", form.codepoints))
        held = _composition(members)
        remaining = len(members) - len(held)
        for form in members:
            lucky = _order("validation", form.codepoints) < VALIDATION_SHARE * 2**64
            if form.codepoints in held:
                split_of[form.codepoints] = "composition"
            elif lucky and remaining > 1:
                split_of[form.codepoints] = "validation"
                remaining -= 1
            else:
                split_of[form.codepoints] = "train"
    _return_lonely_parts(forms, split_of)
    validation = [codepoints for codepoints, split in split_of.items() if split == "validation"]
    if len(validation) < FEWEST:
        split_of.update(dict.fromkeys(validation, "train"))
    return [split_of[form.codepoints] for form in forms]


def _unseen_bases(by_base: dict[str, list[Form]]) -> set[str]:
    by_category: dict[str, list[str]] = defaultdict(list)
    for base, members in by_base.items():
        by_category[members[0].category].append(base)
    quota = {category: max(1, round(UNSEEN_SHARE * len(bases))) for category, bases in by_category.items()}
    limit = max(1, int(LARGEST_CATEGORY * sum(quota.values())))
    return {
        base
        for category, bases in by_category.items()
        for base in sorted(bases, key=lambda base: _order("base", base))[: min(quota[category], limit)]
    }


def _composition(members: list[Form]) -> set[str]:
    """Returns the codes of the forms to hold out: never the last one of a gender or of a tone."""
    genders = Counter(form.gender for form in members)
    tones = Counter(form.skin_tone for form in members)
    held: set[str] = set()
    if len(members) < _MANY_FORMS or len(genders) < 2 or len(tones) < 2:
        return held
    for form in members:
        if len(held) >= round(COMPOSITION_SHARE * len(members)):
            break
        if genders[form.gender] > 1 and tones[form.skin_tone] > 1:
            genders[form.gender] -= 1
            tones[form.skin_tone] -= 1
            held.add(form.codepoints)
    return held


def _return_lonely_parts(forms: Sequence[Form], split_of: dict[str, str]) -> None:
    """Returns a validation form to train where a held-out combination needs its gender or its tone there."""
    in_train: set[tuple[str, str]] = set()
    for form in forms:
        if split_of[form.codepoints] == "train":
            in_train |= {(form.base, form.gender), (form.base, form.skin_tone)}
    held_bases = {form.base for form in forms if split_of[form.codepoints] == "composition"}
    for form in sorted(forms, key=lambda form: form.codepoints):
        parts = {(form.base, form.gender), (form.base, form.skin_tone)}
        if split_of[form.codepoints] == "validation" and form.base in held_bases and not parts <= in_train:
            split_of[form.codepoints] = "train"
            in_train |= parts


def _order(salt: str, key: str) -> int:
    return stable_hash(f"openmoji:{salt}:{key}")
