"""ChatGLM-6B's first version in NumPy and double precision, a text at a time, for configs that the golden lacks.

It follows the paper (GLM-130B, arXiv 2210.02414, section 2) and the golden's description of the released code.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

SCALE = (2 * 28) ** 0.5  # of the input of attention and MLP in the residual sum; other models add the stream


def positions(config: Mapping, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int[S] each: the position in the context, and the position in the answer."""
    places, listed = np.arange(len(tokens)), tokens.tolist()
    bos = listed.index(config["bos_token_id"])
    marks = [listed.index(config[name]) for name in ("gmask_token_id", "mask_token_id") if config[name] in listed]
    mark = marks[0] if marks else bos - 1
    return np.where(places < bos, places, mark), np.maximum(places - bos + 1, 0)


def logits(config: Mapping, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Computes float64[S, V] of int[S]."""

    def weight(name: str) -> np.ndarray:
        return weights[f"transformer.{name}"].astype(np.float64)

    def linear(x, name):
        return x @ weight(f"{name}.weight").T + weight(f"{name}.bias")

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layernorm_epsilon"])
        return x * weight(f"{name}.weight") + weight(f"{name}.bias")

    context, answer = positions(config, tokens)
    heads = config["num_attention_heads"]
    seen = (answer == 0)[None, :] | np.tri(len(tokens), dtype=bool)
    x = weight("word_embeddings.weight")[tokens]
    for i in range(config["num_layers"]):
        layer = f"layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        fused = linear(h, f"{layer}.attention.query_key_value").reshape(len(tokens), heads, 3, -1)
        q, k, v = fused[:, :, 0], fused[:, :, 1], fused[:, :, 2]
        q, k = (np.concatenate([_turned(a, context), _turned(b, answer)], -1) for a, b in (_halves(q), _halves(k)))
        scores = np.einsum("snh,tnh->nst", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(seen, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        read = np.einsum("nst,tnh->snh", shares / shares.sum(-1, keepdims=True), v).reshape(len(tokens), -1)
        x = h * SCALE + linear(read, f"{layer}.attention.dense")
        h = norm(x, f"{layer}.post_attention_layernorm")
        wide = linear(h, f"{layer}.mlp.dense_h_to_4h")
        wide = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
        x = h * SCALE + linear(wide, f"{layer}.mlp.dense_4h_to_h")
    return norm(x, "final_layernorm") @ weights["lm_head.weight"].astype(np.float64).T


def greedy(config: Mapping, weights: Mapping[str, np.ndarray], prompt: np.ndarray, count: int) -> list[int]:
    """Returns the `count` most likely tokens after a prompt, each from a full pass over the text."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(logits(config, weights, np.array(text))[-1].argmax()))
    return text[len(prompt) :]


def random_weights(config: Mapping, seed: int) -> dict[str, np.ndarray]:
    """Returns every tensor of a folder, far from a new model's; special tokens are never likely."""
    rng, width, wide = np.random.default_rng(seed), config["hidden_size"], config["inner_hidden_size"]

    def matrix(rows, columns):
        return (rng.normal(size=(rows, columns)) * 1.5 / columns**0.5).astype(np.float32)

    def vector(size, middle=0.0):
        return (middle + 0.3 * rng.normal(size=size)).astype(np.float32)

    found = {"transformer.word_embeddings.weight": (0.7 * rng.normal(size=(config["vocab_size"], width)))}
    found["lm_head.weight"] = matrix(config["vocab_size"], width)
    for name, value in config.items():
        if name.endswith("token_id"):
            found["lm_head.weight"][value] = 0
    norms = ["final_layernorm"]
    for i in range(config["num_layers"]):
        layer = f"layers.{i}"
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        maps = {"attention.query_key_value": (3 * width, width), "attention.dense": (width, width)}
        maps |= {"mlp.dense_h_to_4h": (wide, width), "mlp.dense_4h_to_h": (width, wide)}
        for name, sizes in maps.items():
            # These outputs are added to a scaled stream: larger weights, so that answers do not repeat themselves.
            gain = 4 if name in ("attention.dense", "mlp.dense_4h_to_h") else 1
            found[f"transformer.{layer}.{name}.weight"] = gain * matrix(*sizes)
            found[f"transformer.{layer}.{name}.bias"] = vector(sizes[0])
    for name in norms:
        found |= {f"transformer.{name}.weight": vector(width, 1.0), f"transformer.{name}.bias": vector(width)}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def _halves(x: np.ndarray):
    return np.split(x, 2, axis=-1)


def _turned(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rotates [S, N, H/2]: the first half of these dimensions against the second, by half-precision frequencies."""
    size = x.shape[-1]
    frequencies = (1 / 10_000 ** (np.arange(0, size, 2) / size)).astype(np.float16).astype(np.float64)
    angles = places[:, None, None] * frequencies
    a, b = _halves(x)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)
