"""Retrieval between images and texts by their unit vectors: recall at k in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllm_jax.errors import DataError

# Two similarities are equal if they differ by no more than float64 rounding.
_TIE = 1e-12


def retrieval(
    images: np.ndarray,
    texts: np.ndarray,
    text_image: np.ndarray | Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    *,
    chunk: int = 1024,
) -> dict[str, float]:
    """Computes recall at k: the share of queries with one of their own keys among the k most similar.

    A tie counts against the model: keys as similar as the own come before it. So a text that occurs word for word for
    several images is a miss for all of them; give each distinct text once.

    Args:
        images, texts: float[N, P], float[M, P], unit vectors.
        text_image: int[M], the image that each text describes; several texts may share one. None: text i describes
            image i.
        chunk: queries and keys that are compared at a time.

    Returns:
        "image_to_text_r1", ... and "text_to_image_r1", ..., each from 0 to 1.

    Raises:
        DataError: vectors that are not finite or of length 1, or images and texts that do not match.
    """
    images, texts = unit_vectors(images, "images"), unit_vectors(texts, "texts")
    owner = np.arange(len(texts)) if text_image is None else np.asarray(text_image)
    count = len(images)
    fits = owner.shape == (len(texts),) and owner.dtype.kind in "iu" and images.shape[1] == texts.shape[1]
    if not (fits and owner.min() >= 0 and set(owner.tolist()) == set(range(count))):
        raise DataError(
            f"{images.shape} images, {texts.shape} texts that describe images {_short(owner)}",
            "vectors of one width, and for each text the number of its image, each image described",
            "give text_image, and leave out images without a text",
        )
    numbers = np.arange(count)
    found = {
        "image_to_text": rank_of_own(images, texts, numbers, owner, chunk),
        "text_to_image": rank_of_own(texts, images, owner, numbers, chunk),
    }
    return {f"{way}_r{k}": float((rank < k).mean()) for way, rank in found.items() for k in ks}


def rank_of_own(queries, keys, query_group, key_group, chunk: int = 1024) -> np.ndarray:
    """Returns, for each query, the number of other groups' keys that are at least as similar as its own group's best.

    Args:
        queries, keys: float[Q, P], float[K, P].
        query_group, key_group: int[Q], int[K]; each query's group has a key.

    Returns:
        int[Q]; 0 is the first rank.
    """
    ranks = np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        query, group = queries[rows].astype(np.float64), query_group[rows, None]
        best = np.full(len(query), -np.inf)
        # Two passes over the keys: the best own key must be known before others are counted.
        for count in (False, True):
            for first in range(0, len(keys), chunk):
                columns = slice(first, first + chunk)
                similarity = query @ keys[columns].astype(np.float64).T
                own = group == key_group[None, columns]
                if count:
                    ranks[rows] += (~own & (similarity >= best[:, None] - _TIE)).sum(axis=1)
                else:
                    best = np.maximum(best, np.where(own, similarity, -np.inf).max(axis=1))
    return ranks


def unit_vectors(vectors, what: str) -> np.ndarray:
    """Returns the array itself. Raises DataError if it is not float[N, P] with N > 0 finite rows of length 1."""
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or not len(vectors) or vectors.dtype.kind not in "fV":
        raise DataError(f"{what}: {vectors.dtype}{list(vectors.shape)}", "float[N, P], N at least 1", "give vectors")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < 1e-2))  # also finds NaN
    if len(wrong):
        raise DataError(
            f"{what}: {len(wrong)} of {len(vectors)} vectors, the first of them number {wrong[0]}, of length "
            f"{lengths[wrong[0]]:.4g}",
            "unit vectors",
            "divide each by its length; vectors that are not finite come from a broken model",
        )
    return vectors


def _short(numbers: np.ndarray) -> str:
    return f"{numbers.ravel()[:5].tolist()}" + (" ..." if numbers.size > 5 else "")
