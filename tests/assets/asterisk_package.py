"""Asterisk's prompts and their texts, from two packages of Debian: python tests/assets/asterisk_package.py (18 MB).

No Python package has them, so they can be fetched only where apt-get works. It needs no rights if its lists of packages
are up to date; otherwise this updates them, for which it must be root.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from fetched_package import Package, whole_folder

REQUIREMENTS = Path(__file__).with_name("asterisk_package.txt")
SOUNDS = Path("usr/share/asterisk/sounds/en_US_f_Allison")
TEXTS = Path("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
CACHE = Package(REQUIREMENTS, "", "", "asterisk-core-sounds-en-1.6.1").cache


class NotFetched(Exception):
    """A reason why the packages cannot be fetched here."""


def asterisk(*, fetch: bool = False) -> Path | None:
    """Returns the folder with both packages; None without them, unless they may be fetched.

    Raises:
        NotFetched: apt-get does not exist here, or does not find these packages.
    """
    places = (Path("/"), CACHE)
    found = next((place for place in places if (place / SOUNDS).is_dir() and (place / TEXTS).is_file()), None)
    return found or (_download() if fetch else None)


def _download() -> Path:
    """Fetches and unpacks both packages. Raises NotFetched; ValueError: another hash."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise NotFetched("no apt-get here, and no Python package has Asterisk's prompts")
    wanted = [line.split() for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    names = [f"{name}={version}" for name, version, _ in wanted]
    with tempfile.TemporaryDirectory() as downloaded, whole_folder(CACHE) as temporary:
        if not _apt(["download", *names], downloaded) and not (
            _apt(["update"], downloaded) and _apt(["download", *names], downloaded)
        ):
            raise NotFetched(f"apt-get download {' '.join(names)} failed")
        for name, _, hash in wanted:
            (file,) = Path(downloaded).glob(f"{name}_*.deb")
            if hashlib.sha256(file.read_bytes()).hexdigest() != hash:
                raise ValueError(f"{file.name} does not have the hash in {REQUIREMENTS.name}")
            subprocess.run(["dpkg-deb", "-x", str(file), str(temporary)], check=True)
    return CACHE


def _apt(arguments: list[str], folder: str) -> bool:
    """Returns whether apt-get succeeded within two minutes."""
    try:
        done = subprocess.run(["apt-get", "-qq", *arguments], cwd=folder, capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


if __name__ == "__main__":
    print(asterisk(fetch=True))
