"""Arcade's sprites of characters, from its wheel: python tests/assets/arcade_package.py (43 MB)."""

from __future__ import annotations

from pathlib import Path

from package_part import PackagePart

REQUIREMENTS = Path(__file__).with_name("arcade_package.txt")
SPRITES = "resources/assets/images/animated_characters"
PACKAGE = PackagePart(
    REQUIREMENTS, "arcade", f"{SPRITES}/robot/robot_idle.png", "arcade-3.3.3", (f"arcade/{SPRITES}/",)
)


def arcade(*, fetch: bool = False) -> Path | None:
    """Returns the folder `arcade`; None without the package, unless it may be fetched."""
    file = PACKAGE.find(fetch=fetch)
    return None if file is None else file.parents[5]


if __name__ == "__main__":
    print(arcade(fetch=True))
