"""A linear probe on the features that configs/sounds_foxdot.py's projector reads: what a linear map of them can name.

    python benchmarks/sound_probe.py

A sound's features are the mean and the standard deviation of the encoder's vectors. Ridge regression on the training
sounds, with the classes as targets, names the held-out ones. Its strength is the best of 5-fold cross-validation on the
training sounds, so the held-out ones decide nothing.
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import jax
import numpy as np

from mllm_jax.data.audio import as_audio
from mllm_jax.datasets.foxdot_sounds import FoxDotSounds
from mllm_jax.models.registry import from_pretrained

CONFIG = Path(__file__).parents[1] / "configs" / "sounds_foxdot.py"
STRENGTHS = (1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)
FOLDS = 5


def features(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32[N, 2 E] of the sounds of a split, and their classes as texts [N]."""
    names = runpy.run_path(str(CONFIG))
    branch = names["config"]().model.branch("audio")
    params = from_pretrained(names["WHISPER"])[1]["encoder_audio"]
    module, (layer,), processor = (
        branch.encoder.make(),
        branch.connection.layers,
        branch.encoder.processor(branch.seconds),
    )

    @jax.jit
    def encode(sound, mask):
        return module.apply({"params": params}, sound, mask, output_hidden_states=True).hidden_states[layer]

    source, found = FoxDotSounds(split).build(), []
    for sound in source.sounds:
        samples = as_audio(str(source.folder / sound.file), processor.rate)
        made = processor([samples])
        mask = made["attention_mask"]
        vectors = encode(made[processor.name], mask)[0, : branch.encoder.frames(int(mask.sum()))]
        found.append(np.concatenate([vectors.mean(axis=0), vectors.std(axis=0)]))
    return np.stack(found), np.array([sound.description for sound in source.sounds])


def named(train: np.ndarray, classes: np.ndarray, asked: np.ndarray, strength: float) -> np.ndarray:
    """Returns the classes that ridge regression on some sounds gives to others."""
    known, targets = np.unique(classes, return_inverse=True)
    mean, spread = train.mean(axis=0), train.std(axis=0) + 1e-6
    x, y = (train - mean) / spread, np.eye(len(known))[targets]
    # The dual form: fewer sounds than features.
    weights = np.linalg.solve(x @ x.T + strength * np.eye(len(x)), y - y.mean(axis=0))
    return known[(((asked - mean) / spread) @ x.T @ weights + y.mean(axis=0)).argmax(axis=1)]


def validated(x: np.ndarray, classes: np.ndarray, strength: float) -> float:
    """Returns the share of training sounds that the other folds name."""
    fold = np.random.default_rng(0).permutation(len(x)) % FOLDS
    right = [
        named(x[fold != k], classes[fold != k], x[fold == k], strength) == classes[fold == k] for k in range(FOLDS)
    ]
    return float(np.concatenate(right).mean())


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    (train, classes), (held_out, wanted) = features("train"), features("held_out")
    strength = max(STRENGTHS, key=lambda each: validated(train, classes, each))
    right = named(train, classes, held_out, strength) == wanted
    share = validated(train, classes, strength)
    print(f"{len(train)} training sounds, strength {strength:g}: {share:.1%} in {FOLDS} folds")
    print(f"{len(held_out)} held-out sounds: top-1 {right.mean():.1%}")


if __name__ == "__main__":
    main()
