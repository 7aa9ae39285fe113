"""Mutated config.json files of every family, read alone and, of some families, with weights and a forward pass."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing._configs import CONFIGS

# Families whose folders are read too: a decoder, learned positions, an encoder-decoder, both encoders.
WITH_WEIGHTS = ("LlamaForCausalLM", "OPTForCausalLM", "T5ForConditionalGeneration", "CLIPTextModel", "ViTModel")
ONE_IN = 40  # cases are read with weights
NESTED = json.loads("[" * 60 + "]" * 60)
# fmt: off
VALUES = (
    None, True, False, 0, 1, 2, 3, 7, -1, -(10**12), 10**6, 10**7, 10**12, 2**31 - 1, 2**31, 2**63, 2.0, 0.5, -0.5,
    1e-300, 1e308, float("nan"), float("inf"), -float("inf"), "", "4", "gelu", "llama", "default", "a\0b", "\ud800",
    "x" * 5000, [], {}, [[]], [{}], [1], [1, 2], [0, -1], ["full_attention"], {"a": 1}, {"rope_type": "yarn"},
    {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 1}, NESTED,
)
# fmt: on
TEXTS = (b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"[]", b"null", b'{"architectures": [', b"{} {}")


def mutated(rng: np.random.Generator, config: dict) -> tuple[str, dict]:
    """Returns a copy with one to three faults, and their description."""
    config, done = copy.deepcopy(config), []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        if not (places := list(_places(config))):  # everything was deleted
            break
        where, key = places[rng.integers(len(places))]
        value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        how = ("set", "set", "set", "delete", "swap", "add", "scale")[rng.integers(7)]
        if how == "delete":
            del where[key]
        elif how == "swap":
            other, second = places[rng.integers(len(places))]
            where[key], other[second] = copy.deepcopy(other[second]), copy.deepcopy(where[key])
        elif how == "add" and isinstance(where, dict):
            where[f"{key}_2" if rng.integers(2) else "rope_scaling"] = value
        elif how == "scale" and isinstance(where[key], (int, float)) and abs(where[key]) < 1e30:
            where[key] = where[key] * int(rng.choice([-1, 2, 3, 1000]))
        else:
            where[key] = value
        done.append(f"{how} {key} {value!r:.60}")
    return "; ".join(done), config


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every (container, key) in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)) and value[key] is not NESTED:
            yield from _places(value[key])


def cases(rng: np.random.Generator, n: int) -> Iterator[tuple[str, Callable[[], object]]]:
    names = list(CONFIGS)
    with tempfile.TemporaryDirectory() as temporary:
        folders: dict[str, Path] = {}
        for number in range(n):
            if number % ONE_IN == 0:
                name = WITH_WEIGHTS[number // ONE_IN % len(WITH_WEIGHTS)]
                if name not in folders:
                    folders[name] = _with_weights(Path(temporary), name)
                folder, read = folders[name], _read_and_run
            else:
                name = names[number % len(names)]
                folder, read = Path(temporary), _read
            if number % 100 == 99:
                what, text = "bytes", TEXTS[number // 100 % len(TEXTS)]
            else:
                what, values = mutated(rng, CONFIGS[name])
                text = json.dumps(values).encode()
            (folder / "config.json").write_bytes(text)
            yield f"{number} {name}: {what}", lambda folder=folder, read=read: read(folder)


def _read(folder: Path) -> object:
    from mllm_jax.models.registry import pretrained_config

    return pretrained_config(folder)


def _with_weights(parent: Path, name: str) -> Path:
    """Returns a folder of a tiny model with random weights."""
    import jax
    from flax import linen as nn

    from mllm_jax.models.registry import abstract_params, family_of, save_pretrained

    family = family_of(CONFIGS[name])
    config = family.from_hf(CONFIGS[name])
    rng = np.random.default_rng(0)
    abstract = nn.meta.unbox(abstract_params(config, family))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), abstract)
    save_pretrained(config.make(), params, parent / name)
    return parent / name


_finite: set = set()  # configs whose outputs were finite


def _read_and_run(folder: Path) -> object:
    """Reads a folder; an accepted model must give finite outputs."""
    import jax

    from mllm_jax.models.registry import family_of_config, from_pretrained

    module, params = from_pretrained(folder)
    if module.config not in _finite:
        arguments = family_of_config(module.config).sample(module.config)
        out = jax.jit(lambda params: module.apply({"params": params}, *arguments))(params)
        if not all(bool(np.isfinite(np.asarray(leaf, np.float32)).all()) for leaf in jax.tree.leaves(out)):
            raise FloatingPointError(f"accepted, and the output is not finite: {module.config}")
        _finite.add(module.config)
    return module
