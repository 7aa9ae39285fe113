"""A toy model's table and its weights made by hand in both forms: an oracle that shares no code with the engine."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from mllm_jax.checkpoints.table import Table, Weight

LAYERS = 3
QKV = "(n h) e -> e n h"
MIXED = "(n p h) e -> p e n h"  # q, k and v of a head are together
TABLE = Table(
    weights=(
        Weight("model.embed.weight", "embed/embedding"),
        Weight("model.layers.{layer}.qkv.weight", "layers/q/kernel", QKV, {"h": 4}, rows=(0, 16)),
        Weight("model.layers.{layer}.qkv.weight", "layers/k/kernel", QKV, {"h": 4}, rows=(16, 24)),
        Weight("model.layers.{layer}.qkv.weight", "layers/v/kernel", QKV, {"h": 4}, rows=(24, 32)),
        *(
            Weight("model.layers.{layer}.mixed.weight", f"layers/{path}/kernel", MIXED, {"n": 4, "p": 3}, part=part)
            for part, path in enumerate(("a", "b", "c"))
        ),
        Weight("model.layers.{layer}.norm.weight", "layers/norm/scale"),
        Weight("model.patch.weight", "patch/kernel", "o c y x -> (y x c) o", {"y": 2, "x": 2, "c": 3}),
        Weight("model.patch.bias", "patch/bias"),
        Weight("head.weight", "head/kernel", "v e -> e v"),
    ),
    spellings=((r"^transformer\.", "model."), (r"\.gamma$", ".weight")),
    ignored=("model.layers.{layer}.inv_freq", "tied.weight"),
)
NAMES = {
    "embed/embedding": ("vocab", "embed"),
    "layers/q/kernel": ("layers", "embed", "heads", "head_dim"),
    "layers/k/kernel": ("layers", "embed", "kv_heads", "head_dim"),
    "layers/v/kernel": ("layers", "embed", "kv_heads", "head_dim"),
    "layers/a/kernel": ("layers", "embed", "heads", "head_dim"),
    "layers/b/kernel": ("layers", "embed", "heads", "head_dim"),
    "layers/c/kernel": ("layers", "embed", "heads", "head_dim"),
    "layers/norm/scale": ("layers", "embed"),
    "patch/kernel": ("patches", "embed"),
    "patch/bias": ("embed",),
    "head/kernel": ("embed", "vocab"),
}
SHAPES = {
    "embed/embedding": (16, 8),
    "layers/q/kernel": (LAYERS, 8, 4, 4),
    "layers/k/kernel": (LAYERS, 8, 2, 4),
    "layers/v/kernel": (LAYERS, 8, 2, 4),
    "layers/a/kernel": (LAYERS, 8, 4, 2),
    "layers/b/kernel": (LAYERS, 8, 4, 2),
    "layers/c/kernel": (LAYERS, 8, 4, 2),
    "layers/norm/scale": (LAYERS, 8),
    "patch/kernel": (12, 8),
    "patch/bias": (8,),
    "head/kernel": (8, 16),
}


def nest(leaves: dict) -> dict:
    tree: dict = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree


def abstract() -> dict:
    """Returns the result of `jax.eval_shape` of an init: shapes with logical names."""
    return nest(
        {
            path: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, np.float32), names=NAMES[path])
            for path, shape in SHAPES.items()
        }
    )


def parameters(dtype=np.float32) -> dict:
    rng = np.random.default_rng(0)
    return {path: rng.normal(0, 1, shape).astype(dtype) for path, shape in SHAPES.items()}


def by_hand(p: dict) -> dict:
    """Returns the stored tensors, assembled index by index."""
    stored = {
        "model.embed.weight": p["embed/embedding"],
        "head.weight": p["head/kernel"].T,
        "model.patch.bias": p["patch/bias"],
    }
    patch = np.empty((8, 3, 2, 2), p["patch/kernel"].dtype)
    for o, c, y, x in np.ndindex(patch.shape):
        patch[o, c, y, x] = p["patch/kernel"][y * 6 + x * 3 + c, o]
    stored["model.patch.weight"] = patch
    for layer in range(LAYERS):
        rows = [
            p[f"layers/{name}/kernel"][layer, :, n, h]
            for name, heads in zip("qkv", (4, 2, 2), strict=True)
            for n in range(heads)
            for h in range(4)
        ]
        stored[f"model.layers.{layer}.qkv.weight"] = np.stack(rows)
        rows = [p[f"layers/{name}/kernel"][layer, :, n, h] for n in range(4) for name in "abc" for h in range(2)]
        stored[f"model.layers.{layer}.mixed.weight"] = np.stack(rows)
        stored[f"model.layers.{layer}.norm.weight"] = p["layers/norm/scale"][layer]
    return stored


def write_raw(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> None:
    """Writes a safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
