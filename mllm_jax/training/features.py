"""Encoder features kept on disk: a frozen encoder reads each image once, in any number of steps."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mllm_jax.data.batch import BatchSpec
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.sharding.logical import PartRules, use_mesh
from mllm_jax.training.config import Experiment, Stage

KEY_BYTES = 16
CHUNK = 16  # number of images that are encoded together


def stage_spec(experiment: Experiment, stage: Stage) -> BatchSpec:
    """Returns the spec of a stage's batches from its config alone: no data, tokenizer or folder is read."""
    config, mixture = experiment.model_of(stage), stage.data
    spec = config.batch_spec(mixture.rows, mixture.length, mixture.slots)
    if not stage.cache_features or "images" not in spec:
        return spec
    one = jax.ShapeDtypeStruct((1, 1, *spec["images"].shape[2:]), "uint8")
    model = config.make()

    def encode(images):
        return model.init_with_output(jax.random.key(0), {"images": images}, method="encode_images")[0]

    made = jax.eval_shape(encode, one)
    return with_features(spec, made.shape[1:], str(made.dtype))


def with_features(spec: BatchSpec, shape: tuple[int, ...], dtype: str) -> BatchSpec:
    """Returns a batch's spec with features of each image, `shape` numbers, instead of images."""
    if "images" not in spec:
        return spec
    images = spec["images"]
    return spec.without("images") | {"features": replace(images, shape=(*images.shape[:2], *shape), dtype=dtype)}


class FeatureCache:
    """A map from the bytes of images to the encoder's features; every process keeps a file of its own.

    Features are appended to `features.bin` and then their keys to `keys.bin`. After a kill, features without a key are
    ignored. A folder belongs to one encoder: name it by the encoder's fingerprint.

    Args:
        folder: holds both files; it is made.
        encode: uint8[n, H, W, 3] -> [n, P, E], for any n.
        shape, dtype: of one image's features, (P, E).

    Raises:
        CheckpointError: a folder that cannot be written.
    """

    def __init__(self, folder: Path, encode: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], dtype: str):
        self.encode, self.shape, self.dtype = encode, shape, np.dtype(dtype)
        self._size = int(np.prod(shape)) * self.dtype.itemsize
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._keys, self._features = (
                open(folder / name, "a+b")  # noqa: SIM115 - until `close`
                for name in ("keys.bin", "features.bin")
            )
        except OSError as error:
            raise CheckpointError(
                f"the cache of features in {folder}: {error}",
                "a folder that can be written",
                "choose another run folder",
            ) from error
        whole = min(
            os.path.getsize(folder / "keys.bin") // KEY_BYTES, os.path.getsize(folder / "features.bin") // self._size
        )
        self._keys.truncate(whole * KEY_BYTES)
        self._features.truncate(whole * self._size)
        self._keys.seek(0)
        stored = self._keys.read()
        self._indices = {stored[i * KEY_BYTES : (i + 1) * KEY_BYTES]: i for i in range(whole)}

    @classmethod
    def of(
        cls, folder: Path, model: nn.Module, params: dict, mesh: Mesh, parts: Sequence[PartRules] = ()
    ) -> FeatureCache:
        """Builds the cache of a composed model's encoder, which is compiled for CHUNK images at a time.

        Raises:
            ConfigError: several processes: they would have to agree on the new images.
        """
        if jax.process_count() > 1:
            raise ConfigError(
                f"cache_features on {jax.process_count()} processes", "one process", "drop it from the stage"
            )

        @jax.jit
        def encode(params, images):
            with use_mesh(mesh, parts=parts):
                return model.apply({"params": params}, {"images": images[None]}, method="encode_images")

        def encode_all(images: np.ndarray) -> np.ndarray:
            found = []
            for start in range(0, len(images), CHUNK):
                chunk = images[start : start + CHUNK]
                padded = np.pad(chunk, [(0, CHUNK - len(chunk))] + [(0, 0)] * (chunk.ndim - 1))
                found.append(np.asarray(encode(params, padded))[: len(chunk)])
            return np.concatenate(found)

        side = model.config.image_size
        one = jax.ShapeDtypeStruct((CHUNK, side, side, 3), np.uint8)
        made = jax.eval_shape(encode, params, one)
        return cls(folder, encode_all, made.shape[1:], made.dtype)

    def spec(self, spec: BatchSpec) -> BatchSpec:
        """Returns a batch's spec with features instead of images."""
        return with_features(spec, self.shape, str(self.dtype))

    def __len__(self) -> int:
        """Returns the number of images in the cache."""
        return len(self._indices)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a batch with `features` [B, M, P, E] instead of `images` uint8[B, M, H, W, 3]."""
        if "images" not in batch:
            return dict(batch)
        images = batch["images"]
        flat = images.reshape(-1, *images.shape[2:])
        keys = [hashlib.blake2b(image.tobytes(), digest_size=KEY_BYTES).digest() for image in flat]
        new = {key: i for i, key in enumerate(keys) if key not in self._indices}
        if new:
            self._add(new, np.asarray(self.encode(flat[list(new.values())])))
        features = np.stack([self._read(self._indices[key]) for key in keys])
        kept = {name: array for name, array in batch.items() if name != "images"}
        return kept | {"features": features.reshape(*images.shape[:2], *self.shape)}

    def close(self) -> None:
        self._keys.close()
        self._features.close()

    def _add(self, new: dict[bytes, int], features: np.ndarray) -> None:
        first = len(self._indices)
        self._features.write(np.ascontiguousarray(features, self.dtype).tobytes())
        self._features.flush()
        self._keys.write(b"".join(new))
        self._keys.flush()
        self._indices |= {key: first + i for i, key in enumerate(new)}

    def _read(self, index: int) -> np.ndarray:
        raw = os.pread(self._features.fileno(), self._size, index * self._size)
        return np.frombuffer(raw, self.dtype).reshape(self.shape)
