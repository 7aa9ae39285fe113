"""An environment in which transformers finds no PyTorch."""

from __future__ import annotations

from pathlib import Path


def hide_torch(folder: Path) -> Path:
    """Writes the metadata of a torch without a version; if it is first on PYTHONPATH, transformers finds no torch."""
    metadata = folder / "torch-0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: none\n")
    return folder
