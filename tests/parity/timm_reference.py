"""timm, the reference for EVA-02-CLIP and NFNet. It is in no extra, because it depends on torchvision.

torchvision's wheels hold operators for one build of torch; with another build, transformers fails to import if it finds
torchvision. So both packages are in a separate folder, which only the tests that compare with timm put on the path.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fetched_package import whole_folder

PACKAGES = ("timm==1.0.31", "torchvision==0.28.0")
MISSING = f"missing asset: pip install --no-deps {' '.join(PACKAGES)}"


def _folder() -> Path:
    """Returns the folder of the packages; downloads them on CI, or if MLLM_FETCH_TIMM is set."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm_jax"
    folder = cache / "-".join(PACKAGES).replace("==", "-")
    if not folder.is_dir() and (os.environ.get("CI") == "true" or os.environ.get("MLLM_FETCH_TIMM")):
        with whole_folder(folder) as temporary:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target"]
            subprocess.run([*pip, str(temporary), *PACKAGES], check=True)
    return folder


def _declare_operators() -> None:
    """Declares operators for torchvision, which registers their meta outputs and fails if they do not exist."""
    try:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # garbage collection would remove its schemas
    except RuntimeError:  # a torchvision with its operators is loaded
        pass


_KEPT: list = []


def timm_or_skip():
    """Returns the package; skips the test file if it is missing (which fails on CI)."""
    importlib.import_module("transformers").utils.is_torchvision_available()  # cached: not there
    folder = _folder()
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    _declare_operators()
    try:
        return importlib.import_module("timm")
    except ImportError:
        pytest.skip(MISSING, allow_module_level=True)
