"""Reads a Q-Former's weights from torch or from a golden, through the table and the reading engine."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from safetensors.numpy import save_file

from mllm_jax.checkpoints.hf import read_weights
from mllm_jax.checkpoints.table import Table
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.projectors.qformer_hub import qformer_weights

GOLDENS = Path(__file__).parents[1] / "goldens"
LAVIS = dict(
    layers="Qformer.bert.encoder.layer",
    own="self",
    norm="Qformer.bert.embeddings.LayerNorm",
    embeddings="Qformer.bert.embeddings",
    projection="llm_proj",
)


def golden(name: str):
    """Returns (arrays, sizes) of a recorded reference."""
    return np.load(GOLDENS / f"{name}.npz"), json.loads((GOLDENS / f"{name}.json").read_text("utf-8"))["config"]


def golden_config(sizes: dict, **more) -> QFormerConfig:
    return QFormerConfig(
        feature_size=sizes["vision_width"],
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        mlp_size=sizes["intermediate_size"],
        num_queries=sizes["num_query_token"],
        cross_attention_frequency=sizes["cross_attention_freq"],
        vocab_size=sizes["vocab_size"],
        max_length=sizes["max_pos"],
        **more,
    )


def loaded(config: QFormerConfig, tensors: dict, folder: Path, **names) -> dict:
    """Returns the Q-Former's parameters; tensors under other names are left out."""
    table = Table(qformer_weights(config, path="qformer", **names))
    features, tokens = np.zeros((1, 2, config.feature_size), np.float32), np.zeros((1, 2), np.int32)
    arguments = (features, tokens) if config.reads_text else (features,)
    abstract = nn.meta.unbox(jax.eval_shape(config.make().init, jax.random.key(0), *arguments)["params"])
    prefixes = {line.name.split(".{")[0].split("{")[0] for line in table.weights}
    kept = {name: np.asarray(t) for name, t in tensors.items() if name.startswith(tuple(prefixes))}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / "model.safetensors")
    return read_weights(folder, table, {"qformer": abstract})["qformer"]
