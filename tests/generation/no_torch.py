"""PyTorch as transformers sees it where it is not installed."""

from __future__ import annotations

from pathlib import Path


def hide_torch(folder: Path) -> Path:
    """Writes the metadata of a torch without a version; first on PYTHONPATH, transformers takes it for none at all."""
    metadata = folder / "torch-0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: none\n")
    return folder
