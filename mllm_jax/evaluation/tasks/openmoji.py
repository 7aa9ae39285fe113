"""Fixed questions about emoji, a task for each split and kind: "composition/naming", "unseen/category", ..."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from mllm_jax.data.message import Image, Message, Text
from mllm_jax.datasets.openmoji.evaluation import EvalQuestion, evaluation_questions, kinds_on
from mllm_jax.datasets.openmoji.skills import EVALUATED, skill_questions
from mllm_jax.evaluation.metrics import QUESTION_METRICS
from mllm_jax.evaluation.task import Task

SPLITS = ("validation", "composition", "unseen")


def openmoji_tasks(
    config: str = "quickstart",
    splits: tuple[str, ...] = SPLITS,
    image_size: int = 64,
    limit: int = 200,
    seed: int = 0,
    data_dir: str | None = None,
) -> tuple[Task, ...]:
    """The questions of `mllm_jax.datasets.openmoji.evaluation_questions`; nothing is read before they are asked.

    Args:
        limit: questions a task at most.
    """
    return tuple(
        _task(split, OpenMojiAsked(kind, split, config, image_size, limit, seed, data_dir))
        for split in splits
        for kind in kinds_on(split)
    )


def openmoji_skill_tasks(
    config: str = "study", image_size: int = 64, limit: int = 200, seed: int = 0, data_dir: str | None = None
) -> tuple[Task, ...]:
    """Naming, places, numbers and small written text, each asked by itself; see `mllm_jax.datasets.openmoji.skills`."""
    return tuple(
        _task(split, OpenMojiSkillsAsked(kind, split, config, image_size, limit, seed, data_dir))
        for split, kinds in EVALUATED.items()
        for kind in kinds
    )


@dataclass(frozen=True)
class OpenMojiAsked:
    """The questions of one kind on a split, made when they are first asked for."""

    kind: str
    split: str
    config: str
    image_size: int
    limit: int
    seed: int
    data_dir: str | None

    @property
    def questions(self) -> list[EvalQuestion]:
        found = _questions(self.config, self.split, self.image_size, self.seed, self.limit, self.data_dir)
        return [question for question in found if question.task == self.kind]

    def __len__(self) -> int:
        return len(self.questions)

    def example(self, index: int) -> EvalQuestion:
        return self.questions[index]


class OpenMojiSkillsAsked(OpenMojiAsked):
    """The same of skills."""

    @property
    def questions(self) -> list[EvalQuestion]:
        found = _skills(self.config, self.image_size, self.seed, self.limit, self.data_dir)
        return [question for question in found[self.split] if question.task == self.kind]


# All kinds of a split come out of one pass over it.
_questions = functools.lru_cache(maxsize=len(SPLITS))(evaluation_questions)
_skills = functools.lru_cache(maxsize=1)(skill_questions)


def ask(question: EvalQuestion) -> tuple[Message, ...]:
    return (Message("user", (*map(Image, question.images), Text(question.question))),)


def _task(split: str, source: OpenMojiAsked) -> Task:
    return Task(f"{split}/{source.kind}", source, ask, QUESTION_METRICS)
