"""Fetching a part of a package: by hash, without running its set-up script."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from package_part import PackagePart

FILES = {
    "PKG-INFO": "Metadata-Version: 2.4\nName: Clips\nVersion: 1.0\n",
    "setup.py": "raise SystemExit('run')",
    "Clips/snd/a.wav": "sound",
    "Clips/lib/table.py": "raise SystemExit('run')",
    "Clips/lib/other.py": "",
}


@pytest.fixture
def part(tmp_path, monkeypatch) -> PackagePart:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = tmp_path / "index" / "clips-1.0.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        for name, content in FILES.items():
            member = tarfile.TarInfo(f"clips-1.0/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content.encode()))
    hash = hashlib.sha256(archive.read_bytes()).hexdigest()
    requirements = tmp_path / "clips.txt"
    requirements.write_text(
        f"--no-index\n--find-links {archive.parent}\n--require-hashes\nclips==1.0 --hash=sha256:{hash}\n"
    )
    return PackagePart(requirements, "Clips", "lib/table.py", "clips-1.0", ("Clips/snd/", "Clips/lib/table.py"))


def test_a_source_archive_is_unpacked_and_never_run(part):
    assert part.find() is None
    found = part.find(fetch=True)
    assert found == part.cache / "package" / "Clips" / "lib" / "table.py" == part.find()
    unpacked = {path.relative_to(part.cache / "package") for path in part.cache.rglob("*") if path.is_file()}
    assert unpacked == {Path("Clips/snd/a.wav"), Path("Clips/lib/table.py")}


def test_another_hash_is_refused(part):
    part.requirements.write_text(part.requirements.read_text().rstrip()[:-4] + "0000\n")
    with pytest.raises(subprocess.CalledProcessError):
        part.find(fetch=True)
    assert not (part.cache / "package").exists()
