"""Zero-shot classification: a class is the mean of its name's vectors in some sentences (arXiv 2103.00020, 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from einops import rearrange

from mllm_jax.errors import ConfigError, DataError
from mllm_jax.evaluation.retrieval import rank_of_own, unit_vectors


def class_vectors(
    embed: Callable[[Sequence[str]], np.ndarray], names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
) -> np.ndarray:
    """One unit vector a class: the mean over the templates' unit vectors, made a unit vector again.

    Args:
        embed: texts -> float[N, P], unit vectors.
        names: what the classes are called.
        templates: sentences in each of which "{}" stands for the name.

    Returns:
        float32[classes, P].

    Raises:
        ConfigError: no name, no template, or a template without exactly one "{}".
        DataError: vectors that are not of length 1, or that cancel each other.
    """
    wrong = [template for template in templates if template.count("{}") != 1]
    if not names or not templates or wrong:
        raise ConfigError(
            f"{len(names)} class names and {len(templates)} templates" + (f", of them {wrong[0]!r}" if wrong else ""),
            "at least one of each, and '{}' once in every template",
            "write templates such as 'a photo of a {}.'",
        )
    texts = [template.replace("{}", name) for name in names for template in templates]
    vectors = unit_vectors(embed(texts), "texts of the classes").astype(np.float64)
    means = rearrange(vectors, "(c t) p -> c t p", c=len(names)).mean(axis=1)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    if lengths.min() < 1e-6:
        name = names[int(lengths.argmin())]
        raise DataError(f"class {name!r}: vectors whose mean is 0", "sentences that are alike", "change the templates")
    return (means / lengths).astype(np.float32)


def zero_shot(
    images: np.ndarray,
    classes: np.ndarray,
    labels: np.ndarray | Sequence[int],
    ks: Sequence[int] = (1, 5),
    *,
    chunk: int = 1024,
) -> dict[str, float]:
    """Top-k accuracy; a tie with another class is a miss.

    Args:
        images: float[N, P], unit vectors.
        classes: float[classes, P], of `class_vectors`.
        labels: int[N], the right class of each picture.
        chunk: pictures and classes that are compared at a time.

    Returns:
        "top1", ..., each from 0 to 1.

    Raises:
        DataError: vectors that are not of length 1, or labels that are no classes.
    """
    images, classes, labels = unit_vectors(images, "pictures"), unit_vectors(classes, "classes"), np.asarray(labels)
    fits = labels.shape == (len(images),) and labels.dtype.kind in "iu" and images.shape[1] == classes.shape[1]
    if not (fits and labels.min() >= 0 and labels.max() < len(classes)):
        raise DataError(
            f"{images.shape} pictures with labels {labels.dtype}{list(labels.shape)} for {classes.shape} classes",
            f"vectors of one width, and for each picture a label from 0 to {len(classes) - 1}",
            "check the order of the classes",
        )
    ranks = rank_of_own(images, classes, labels, np.arange(len(classes)), chunk)
    return {f"top{k}": float((ranks < k).mean()) for k in ks}
