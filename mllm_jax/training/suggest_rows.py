"""Suggests the rows of a stage from a measured sample of its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.data.message import Example
from mllm_jax.data.pipeline import Mixture
from mllm_jax.data.source_encoder import without_pixels
from mllm_jax.data.suggest import Candidate, Sizes, best, candidates, judge, rows_for
from mllm_jax.errors import DataError
from mllm_jax.training.config import Experiment, Stage
from mllm_jax.training.own_tokenizer import with_own_tokenizer
from mllm_jax.training.run_processor import prepare_processor

LONGEST = 1 << 20  # positions, more than any example has


@dataclass(frozen=True)
class Suggestion:
    """The rows of a stage, alternatives with their effect on its data, and the proposed ones.

    Attributes:
        examples: number of measured examples; bad: number that no rows can hold, and the first reason.
        unit: content of a slot.
        rows: of a batch with the proposed rows, which holds about as many tokens as now.
    """

    stage: str
    examples: int
    bad: int
    reason: str
    unit: str
    now: Candidate
    found: Sequence[Candidate]
    proposed: Candidate
    rows: int


def suggest(experiment: Experiment, sample: int = 1000) -> list[Suggestion]:
    """Measures a sample of each stage's data and proposes its rows.

    Args:
        sample: number of examples of each stage, divided among its sources by weight.

    Raises:
        DataError: a stage without a usable example.
        ConfigError: an error that prevents training too, such as an unsuitable tokenizer.
    """
    experiment = with_own_tokenizer(experiment)
    with TemporaryDirectory() as folder:
        processor = prepare_processor(experiment, RunFolder(Path(folder) / "run"))
    return [_of_stage(experiment, stage, processor, sample) for stage in experiment.stages]


def _of_stage(experiment: Experiment, stage: Stage, processor: Any, sample: int) -> Suggestion:
    mixture = stage.data
    processor = processor.of_composition(experiment.model_of(stage))
    sizes, bad = measured(mixture, processor, sample)
    packed, mesh = mixture.layout == "conversation", experiment.mesh
    found = candidates(sizes, packed=packed, unit=2 * mesh.context if mesh.context > 1 else 1)
    proposed = best(found)
    unit = math.lcm(stage.accumulate * max(1, mesh.data) * max(1, mesh.fsdp), mixture.group)
    return Suggestion(
        stage.name,
        len(sizes.lengths),
        len(bad),
        bad[0] if bad else "",
        processor.layout.unit,
        judge(sizes, mixture.length, dict(mixture.slots), packed=packed),
        found,
        proposed,
        rows_for(proposed, mixture.rows, mixture.length, unit) if packed else mixture.rows,
    )


def measured(mixture: Mixture, processor: Any, sample: int) -> tuple[Sizes, list[str]]:
    """Measures the positions and slots of evenly spaced examples of a mixture; gives the reasons why some are unusable.

    Raises:
        DataError: none of them can.
    """
    total = sum(weighted.weight for weighted in mixture.sources)
    found: list[tuple[int, int, dict[str, int]]] = []
    bad: list[str] = []
    for weighted in mixture.sources:
        source = weighted.source.build()
        count = min(len(source), max(1, round(sample * weighted.weight / total)))
        for index in np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64)).tolist():
            try:
                example = without_pixels(source.example(index), processor.layout)
                found.append(_taken(example, mixture, processor))
            except DataError as error:
                bad.append(f"{source.name}[{index}]: {error.given}")
    if not found:
        raise DataError(f"{len(bad)} examples, the first: {bad[0]}", "some that can be used", "correct the records")
    modalities = sorted({modality for *_, slots in found for modality in slots})
    lengths, least = (np.array([each[i] for each in found]) for i in (0, 1))
    slots = {modality: np.array([each[2].get(modality, 0) for each in found]) for modality in modalities}
    return Sizes(lengths, least, slots), bad


def _taken(example: Example, mixture: Mixture, processor: Any) -> tuple[int, int, dict[str, int]]:
    """Returns the positions of an example, those of its first turn alone, and its slots by modality."""
    if mixture.layout == "caption":
        encoded = processor.encode_captions(example, LONGEST, mixture.captions)
        return encoded.length, encoded.length, encoded.slots
    encoded = processor.encode(example, LONGEST, mixture.learn)
    answers = [number for number, message in enumerate(example.messages) if message.role == "assistant"]
    if len(answers) < 2:
        return encoded.length, encoded.length, encoded.slots
    first = replace(example, messages=example.messages[: answers[0] + 1], segments=())
    if len(first.media) < len(example.media):  # media in later turns: the example cannot lose turns
        return encoded.length, encoded.length, encoded.slots
    return encoded.length, processor.encode(first, LONGEST, mixture.learn).length, encoded.slots
