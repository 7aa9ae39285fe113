"""Encoder features kept on disk: a frozen encoder reads each image, frame or sound once, in any number of steps.

Likewise a generator's frozen text encoder reads each caption once. Its conditions are kept flat.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mllm_jax.data.batch import BatchSpec
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.models.branch import MEDIA, array_name
from mllm_jax.models.output import produced_in
from mllm_jax.sharding.logical import PartRules, use_mesh
from mllm_jax.training.config import Experiment, Stage

KEY_BYTES = 16
CHUNK = 16  # number of images or sounds that are encoded together


def stage_spec(experiment: Experiment, stage: Stage) -> BatchSpec:
    """Returns the spec of a stage's batches from its config alone: no data, tokenizer or folder is read."""
    config, mixture = experiment.model_of(stage), stage.data
    spec = config.batch_spec(mixture.rows, mixture.length, mixture.slots)
    if not stage.cache_features:
        return spec
    model = config.make()

    def encode(media, modality):
        of, method = _call(modality)
        return model.init_with_output(jax.random.key(0), media, of, method=method)[0]

    for modality in stage.modalities:
        if media := _media(spec, modality, 1):
            made = jax.eval_shape(partial(encode, modality=modality), media)
            spec = with_features(spec, made.shape[1:], str(made.dtype), modality)
    return spec


def with_features(spec: BatchSpec, shape: tuple[int, ...], dtype: str, modality: str = "image") -> BatchSpec:
    """Returns a batch's spec with features of each medium of a modality, `shape` numbers, instead of the media."""
    if not (names := _names(spec, modality)):
        return spec
    media = spec[names[0]]
    features = replace(media, shape=(*media.shape[:2], *shape), dtype=dtype)
    return spec.without(*names) | {_result(modality): features}


def _call(modality: str) -> tuple[str, str]:
    """Returns the modality and the model's method that computes its features or conditions."""
    made = produced_in(modality)
    return (modality, "encode_features") if made is None else (made, "flat_conditions")


def _result(modality: str) -> str:
    """Returns the name of features or conditions in a batch."""
    made = produced_in(modality)
    return array_name(modality, "features") if made is None else f"{made}_conditions"


def _names(batch: Iterable[str], modality: str) -> list[str]:
    """Returns the names in a batch, or in its spec, of the arrays that a branch's encoder reads, if there are any."""
    held = set(batch)
    if (made := produced_in(modality)) is not None:
        return [name for name in (f"{made}_captions",) if name in held]
    return [key for name in MEDIA if (key := array_name(modality, name)) in held]


def _media(spec: BatchSpec, modality: str, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of these arrays for a batch of one row with `count` media."""
    return {
        name: jax.ShapeDtypeStruct((1, count, *spec[name].shape[2:]), spec[name].dtype)
        for name in _names(spec, modality)
    }


class FeatureCache:
    """A map from the bytes of media to the encoder's features; every process keeps a file of its own.

    Features are appended to `features.bin` and then their keys to `keys.bin`. After a kill, features without a key are
    ignored. A folder belongs to one branch of one model: name it by the modality and by the encoder's fingerprint.

    Args:
        folder: holds both files; it is made.
        encode: maps the arrays of n media to [n, P, E], for any n: uint8[n, H, W, 3], or sounds and their masks.
        shape, dtype: of one medium's features, (P, E).
        modality: the branch, or the slots of media that the model produces, whose captions are the media here.

    Raises:
        CheckpointError: a folder that cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        encode: Callable[..., np.ndarray],
        shape: tuple[int, ...],
        dtype: str,
        modality: str = "image",
    ):
        self.encode, self.shape, self.dtype, self.modality = encode, shape, np.dtype(dtype), modality
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
        cls,
        folder: Path,
        modality: str,
        spec: BatchSpec,
        model: nn.Module,
        params: dict,
        mesh: Mesh,
        parts: Sequence[PartRules] = (),
    ) -> FeatureCache:
        """Builds the cache of a branch of a composed model, whose encoder is compiled for CHUNK media at a time.

        Args:
            spec: of the model's batches with media of this modality.
        """

        of, method = _call(modality)

        @jax.jit
        def encode(params, batch):
            with use_mesh(mesh, parts=parts):
                return model.apply({"params": params}, batch, of, method=method)

        example = _media(spec, modality, CHUNK)

        def encode_all(*media: np.ndarray) -> np.ndarray:
            found = []
            for start in range(0, len(media[0]), CHUNK):
                chunks = [array[start : start + CHUNK] for array in media]
                count = len(chunks[0])
                padded = [np.pad(x, [(0, CHUNK - count)] + [(0, 0)] * (x.ndim - 1))[None] for x in chunks]
                found.append(np.asarray(encode(params, dict(zip(example, padded, strict=True))))[:count])
            return np.concatenate(found)

        made = jax.eval_shape(encode, params, example)
        return cls(folder, encode_all, made.shape[1:], made.dtype, modality)

    def spec(self, spec: BatchSpec) -> BatchSpec:
        """Returns a batch's spec with features instead of media."""
        return with_features(spec, self.shape, str(self.dtype), self.modality)

    def __len__(self) -> int:
        """Returns the number of media in the cache."""
        return len(self._indices)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a batch with features [B, M, P, E] instead of media [B, M, ...]; unchanged if it has none.

        The key of a medium is a hash of all that the encoder reads of it: a sound's mask too.
        """
        if not (names := _names(batch, self.modality)):
            return dict(batch)
        rows, slots = batch[names[0]].shape[:2]
        media = [batch[name].reshape(-1, *batch[name].shape[2:]) for name in names]
        keys = [_key(*arrays) for arrays in zip(*media, strict=True)]
        new = {key: i for i, key in enumerate(keys) if key not in self._indices}
        if new:
            self._add(new, np.asarray(self.encode(*(array[list(new.values())] for array in media))))
        features = np.stack([self._read(self._indices[key]) for key in keys])
        others = {name: array for name, array in batch.items() if name not in names}
        return others | {_result(self.modality): features.reshape(rows, slots, *self.shape)}

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


def _key(*arrays: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for array in arrays:
        digest.update(array.tobytes())
    return digest.digest()


class FeatureCaches:
    """The caches of the branches whose media a stage's batches hold, each in a folder of its own."""

    def __init__(self, caches: Sequence[FeatureCache] = ()):
        self.caches = tuple(caches)

    @classmethod
    def of(
        cls,
        folder: Path,
        key: str,
        stage: Stage,
        model: nn.Module,
        params: dict,
        mesh: Mesh,
        parts: Sequence[PartRules] = (),
    ) -> FeatureCaches:
        """Opens the caches of a stage.

        Args:
            folder: holds their folders.
            key: of the model and of its frozen parameters; the names of the folders depend on it.

        Raises:
            ConfigError: several processes: they would have to agree on the new media.
        """
        if jax.process_count() > 1:
            raise ConfigError(
                f"cache_features on {jax.process_count()} processes", "one process", "drop it from the stage"
            )
        spec = model.config.batch_spec(slots=dict.fromkeys(stage.modalities, 1))

        def named(modality: str) -> Path:
            return folder / hashlib.sha256(repr([key, modality]).encode()).hexdigest()[:16]

        return cls([FeatureCache.of(named(m), m, spec, model, params, mesh, parts) for m in stage.modalities])

    def spec(self, spec: BatchSpec) -> BatchSpec:
        """Returns a batch's spec with features instead of media."""
        for cache in self.caches:
            spec = cache.spec(spec)
        return spec

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a batch with features instead of media."""
        for cache in self.caches:
            batch = cache(batch)
        return dict(batch)

    def close(self) -> None:
        for cache in self.caches:
            cache.close()
