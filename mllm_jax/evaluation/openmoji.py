"""What a model trained on OpenMoji is asked at the end of its run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm_jax.errors import ConfigError
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.multimodal import MultimodalConfig


@dataclass(frozen=True)
class OpenMojiEvaluation:
    """Fixed questions on the splits; see `mllm_jax.datasets.openmoji.evaluation` for the tasks.

    Attributes:
        limit: questions a task and split at most.
    """

    config: str = "quickstart"
    splits: tuple[str, ...] = ("validation", "composition", "unseen")
    image_size: int = 64
    limit: int = 200
    seed: int = 0
    data_dir: str | None = None

    def check(self, model: Any) -> None:
        _require(self, model, MultimodalConfig, "a multimodal LLM, which answers questions")

    def questions(self) -> dict[str, list]:
        """{split: [EvalQuestion, ...]}"""
        from mllm_jax.datasets.openmoji.evaluation import evaluation_questions

        return {
            split: evaluation_questions(self.config, split, self.image_size, self.seed, self.limit, self.data_dir)
            for split in self.splits
        }

    def score(self, splits, model, params, processor, mesh, batch_size) -> tuple[dict, list]:
        from mllm_jax.evaluation.evaluate import evaluate
        from mllm_jax.generation.assistant import Assistant

        return evaluate(Assistant(model, params, processor, mesh=mesh), splits, batch_size=batch_size)


@dataclass(frozen=True)
class OpenMojiSkillsEvaluation:
    """Naming, places, numbers and small written text, each asked by itself; see `mllm_jax.datasets.openmoji.skills`.

    Attributes:
        limit: questions a skill at most.
    """

    config: str = "study"
    image_size: int = 64
    limit: int = 200
    seed: int = 0
    data_dir: str | None = None

    check, score = OpenMojiEvaluation.check, OpenMojiEvaluation.score

    def questions(self) -> dict[str, list]:
        """{split: [EvalQuestion, ...]}"""
        from mllm_jax.datasets.openmoji.skills import skill_questions

        return skill_questions(self.config, self.image_size, self.seed, self.limit, self.data_dir)


@dataclass(frozen=True)
class OpenMojiRetrieval:
    """Names among names and pictures among pictures; see `mllm_jax.datasets.openmoji.galleries`.

    Attributes:
        ways: pictures and names that each is looked for among.
    """

    config: str = "quickstart"
    splits: tuple[str, ...] = ("validation", "composition", "unseen")
    image_size: int = 64
    ways: int = 300
    seed: int = 0
    data_dir: str | None = None

    def check(self, model: Any) -> None:
        _require(self, model, DualEncoderConfig, "a dual encoder, which compares pictures and texts")

    def questions(self) -> dict[str, list]:
        """{split: [Gallery, ...]}"""
        from mllm_jax.datasets.openmoji.galleries import galleries

        return {
            split: galleries(self.config, split, self.image_size, self.ways, self.seed, self.data_dir)
            for split in self.splits
        }

    def score(self, splits, model, params, processor, mesh, batch_size) -> tuple[dict, list]:
        from mllm_jax.evaluation.galleries import evaluate_retrieval
        from mllm_jax.generation.embed import Embedder

        return evaluate_retrieval(Embedder.trained(model, params, processor.tokenizer, batch_size=batch_size), splits)


def _require(evaluation: Any, model: Any, kind: type, expected: str) -> None:
    if not isinstance(model, kind):
        raise ConfigError(f"{type(evaluation).__name__} of a {type(model).__name__}", expected, "change the evaluation")
