"""A language model of a few layers as an experiment to plan with."""

import runpy
from pathlib import Path

from mllm_jax.sharding.mesh import MeshConfig

LANGUAGE = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "plans" / "language.py"))


def experiment(rows=16, length=128, mesh=None, remat="none", **sizes):
    """Returns LLaMA's layers: width 256, two layers of two heads, MLP of 704; every parameter trained."""
    given = dict(vocab_size=512, hidden_size=256, num_layers=2, num_heads=2, num_kv_heads=2, mlp_size=704) | sizes
    LANGUAGE["SIZES"]["tiny"] = tuple(given.values())
    return LANGUAGE["experiment"]("tiny", rows=rows, length=length, mesh=mesh or MeshConfig(1, -1), remat=remat)


def hand_counted(tokens, length, vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, mlp_size, head_dim=128):
    """Counts the FLOPs of a training step: two per weight and token, twice that backward; and those of attention."""
    attention = hidden_size * head_dim * (2 * num_heads + 2 * num_kv_heads)
    weights = num_layers * (attention + 3 * hidden_size * mlp_size) + vocab_size * hidden_size
    products = num_layers * 2 * length * num_heads * head_dim  # q k^T and p v
    return 3 * 2 * tokens * weights, 3 * 2 * tokens * products
