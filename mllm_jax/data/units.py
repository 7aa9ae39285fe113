"""The slots of media in words: images, tiles or patches, by modality."""

from __future__ import annotations

from collections.abc import Mapping


def in_words(slots: Mapping[str, int], unit: str = "slot") -> str:
    """Slots by modality as people say them: "48 image patches", "2 images and 16 video patches".

    Args:
        unit: what a slot holds: "image" (a whole medium), "tile", "patch"; or "slot", where that is not known.
    """
    said = [_counted(modality, count, unit) for modality, count in slots.items()]
    return " and ".join(said) or "no media"


def _counted(modality: str, count: int, unit: str) -> str:
    noun = modality if unit == "image" else f"{modality} {unit}"
    plural = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{plural}"
