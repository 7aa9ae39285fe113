"""Drawn images, named by a dual encoder that was trained apart: what they show, and how far they are from real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mllm_jax.data.message import Example, Text
from mllm_jax.errors import DataError, TooFewError
from mllm_jax.evaluation.retrieval import unit_vectors
from mllm_jax.generation.options import Answer

EMPTY = "empty"  # the name of a cell that shows nothing
SHEET, GAP = 256, 4  # pixels of a contact sheet's side, and between its pairs


class Classifier(Protocol):
    """A dual encoder, such as an `Assistant`."""

    def embed(self, texts: Sequence[str] | None = None, images: Any = None) -> np.ndarray: ...


class Names:
    """The names that an image may have, of which the classifier's most similar one is the image's (top-1).

    Args:
        captions: the names.
        images: uint8[H, W, 3] each, a real image of every name, all of one size. None: an image always has a name.
            Otherwise it is EMPTY if a white image is more similar to it than any of these.
    """

    def __init__(self, classifier: Classifier, captions: Sequence[str], images: Sequence[np.ndarray] | None = None):
        self._classifier, self.captions = classifier, tuple(captions)
        self._texts = unit_vectors(classifier.embed(texts=list(captions)), "captions")
        self._images = None
        if images is not None:
            everything = [np.full_like(images[0], 255), *images]
            self._images = unit_vectors(classifier.embed(images=everything), "images of names")

    def of(self, images: Sequence[np.ndarray]) -> list[str]:
        """Returns the name of each image uint8[H, W, 3]."""
        vectors = unit_vectors(self._classifier.embed(images=list(images)), "images")
        found = [self.captions[best] for best in (vectors @ self._texts.T).argmax(axis=1)]
        if self._images is None:
            return found
        white = (vectors @ self._images.T).argmax(axis=1) == 0
        return [EMPTY if nothing else name for nothing, name in zip(white, found, strict=True)]


def frechet_distance(drawn: np.ndarray, real: np.ndarray) -> float:
    """Returns the Frechet distance of two sets of vectors, each taken as a normal distribution.

    It is |m - n|^2 + trace(C + D - 2 (C D)^(1/2)) for means m, n and covariances C, D of the sets, as the FID of
    arXiv 1706.08500 is, but with a dual encoder's unit vectors of images instead of Inception's. Few vectors make it
    larger, so only distances of equally many are comparable; and 2 is far, as unit vectors are.

    Args:
        drawn, real: float[N, P], float[M, P].

    Raises:
        DataError: fewer than two vectors, other widths, or vectors that are not finite.
    """
    drawn, real = (np.asarray(vectors, np.float64) for vectors in (drawn, real))
    shapes = drawn.ndim == real.ndim == 2 and drawn.shape[1] == real.shape[1] and min(len(drawn), len(real)) > 1
    if not shapes or not (np.isfinite(drawn).all() and np.isfinite(real).all()):
        raise DataError(
            f"the distance of vectors {list(drawn.shape)} and {list(real.shape)}",
            "two sets of at least two finite vectors of one width",
            "raise the number of images",
        )
    means = [x.mean(axis=0) for x in (drawn, real)]
    covariances = [np.cov(x, rowvar=False).reshape(x.shape[1], -1) for x in (drawn, real)]
    values, axes = np.linalg.eigh(covariances[0])
    root = (axes * np.sqrt(np.maximum(values, 0))) @ axes.T
    # C D and its symmetric form root(C) D root(C) have the same eigenvalues.
    both = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariances[1] @ root), 0)).sum()
    apart = np.square(means[0] - means[1]).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * both
    return float(max(apart, 0.0))


def pixels(answer: Answer, size: int) -> np.ndarray:
    """Returns the first image of an answer as uint8[H, W, 3]; without one, a white image of a size."""
    for medium in answer.media:
        if medium.kind == "image":
            return (255 * np.clip(np.nan_to_num(medium.array), 0, 1)).round().astype(np.uint8)
    return np.full((size, size, 3), 255, np.uint8)


def contact_sheet(drawn: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> np.ndarray:
    """Returns an image uint8[H, W, 3] of pairs, each drawn image with the real one on its right, as many as fit.

    Args:
        drawn, real: uint8[side, side, 3] each, all of one side.
    """
    side = drawn[0].shape[0]
    columns = max(1, (SHEET + GAP) // (2 * side + GAP))
    shown = min(len(drawn), columns * max(1, (SHEET + GAP) // (side + GAP)))
    rows = -(-shown // columns)
    height, width = rows * (side + GAP) - GAP, min(columns, shown) * (2 * side + GAP) - GAP
    sheet = np.full((height, width, 3), 128, np.uint8)
    for place in range(shown):
        row, column = divmod(place, columns)
        top, left = row * (side + GAP), column * (2 * side + GAP)
        sheet[top : top + side, left : left + 2 * side] = np.concatenate([drawn[place], real[place]], axis=1)
    return sheet


# --------------------------------------------------------------------------------------------------
# Metrics of a `Task` whose examples ask for a drawing or do not
# --------------------------------------------------------------------------------------------------


def asks_to_draw(example: Example) -> bool:
    """Returns whether the right answer has a medium."""
    return any(not isinstance(part, Text) for part in example.messages[-1].parts)


def draws_if_asked(answers: Sequence[Answer], examples: Sequence[Example]) -> float:
    """Returns the share of answers that have a medium where one is asked for, and none otherwise."""
    return _share(answers, examples, (True, False))


def draws_when_asked(answers: Sequence[Answer], examples: Sequence[Example]) -> float:
    """Returns the share of answers with a medium, of those to requests to draw."""
    return _share(answers, examples, (True,))


def writes_when_not_asked(answers: Sequence[Answer], examples: Sequence[Example]) -> float:
    """Returns the share of answers without a medium, of those to other questions."""
    return _share(answers, examples, (False,))


def _share(answers: Sequence[Answer], examples: Sequence[Example], of: tuple[bool, ...]) -> float:
    pairs = [(bool(answer.media), asks_to_draw(example)) for answer, example in zip(answers, examples, strict=True)]
    right = [drew == asked for drew, asked in pairs if asked in of]
    if not right:
        what = "with" if True in of else "without"
        raise TooFewError(f"{len(examples)} examples, none {what} a drawing", "at least one", "raise their number")
    return sum(right) / len(right)
