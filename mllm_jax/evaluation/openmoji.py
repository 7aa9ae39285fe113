"""What a model trained on OpenMoji is asked at the end of its run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OpenMojiEvaluation:
    """Fixed questions on the splits; see `mllm_jax.data.openmoji.evaluation` for the tasks.

    Attributes:
        limit: questions a task and split at most.
    """

    config: str = "quickstart"
    splits: tuple[str, ...] = ("validation", "composition", "unseen")
    image_size: int = 64
    limit: int = 200
    seed: int = 0
    data_dir: str | None = None

    def questions(self) -> dict[str, list]:
        """{split: [EvalQuestion, ...]}"""
        from mllm_jax.data.openmoji.evaluation import evaluation_questions

        return {
            split: evaluation_questions(self.config, split, self.image_size, self.seed, self.limit, self.data_dir)
            for split in self.splits
        }
