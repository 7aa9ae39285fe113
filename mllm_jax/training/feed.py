"""The batches of a mixture on the devices of a mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_jax.data.pipeline import Pipeline
from mllm_jax.training.features import FeatureCaches
from mllm_jax.training.step import local_rows, place_batch


class Feed:
    """A pipeline's batches on the devices; each process places its own rows, with precomputed features if any.

    Attributes:
        spec: spec of a global batch.
    """

    def __init__(self, data: Pipeline, mesh: Mesh, features: FeatureCaches | None = None):
        self.data, self.mesh, self.features = data, mesh, features
        self.rows = local_rows(mesh, data.mixture.rows)
        self.spec = data.spec if features is None else features.spec(data.spec)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """Returns the batch of one step."""
        return self._place(self.data.batch(step, self.rows))

    def iterate(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Yields the batches of steps start..stop-1, read ahead, each with its number of tokens over all processes."""
        for local in self.data.iterate(start, stop, self.rows):
            tokens = int((local["segments"] > 0).sum()) * self.data.mixture.rows // len(self.rows)
            yield tokens, self._place(local)

    def _place(self, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        local = local if self.features is None else self.features(local)
        return place_batch(local, self.mesh, self.spec, self.rows)
