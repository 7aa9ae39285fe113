"""FoxDot's sounds and their descriptions, from its source archive: python tests/assets/foxdot_package.py (38 MB)."""

from __future__ import annotations

from pathlib import Path

from package_part import PackagePart

REQUIREMENTS = Path(__file__).with_name("foxdot_package.txt")
DESCRIPTIONS = "lib/Buffers.py"
PACKAGE = PackagePart(
    REQUIREMENTS, "FoxDot", DESCRIPTIONS, "foxdot-0.9.0", ("FoxDot/snd/", f"FoxDot/{DESCRIPTIONS}", "LICENSE")
)


def foxdot(*, fetch: bool = False) -> Path | None:
    """Returns the folder `FoxDot`; None without the package, unless it may be fetched."""
    file = PACKAGE.find(fetch=fetch)
    return None if file is None else file.parents[1]


if __name__ == "__main__":
    print(foxdot(fetch=True))
