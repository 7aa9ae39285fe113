"""An evaluation of toys: a module of its own, so that a run that names it finds it again."""

from __future__ import annotations

from dataclasses import dataclass

import toy_data


@dataclass(frozen=True)
class Question:
    task: str
    question: str
    answer: str
    images: tuple


@dataclass(frozen=True)
class ToyEvaluation:
    """Eight questions about the colour of pictures of noise."""

    def check(self, model):
        assert model.llm

    def questions(self):
        source = toy_data.Toy().build()
        numbers = range(8)
        return {"toy": [Question("colour", "what colour", toy_data.COLOURS[i], (source.picture(i),)) for i in numbers]}

    def score(self, splits, model, params, processor, mesh, batch_size):
        from mllm_jax.evaluation.evaluate import evaluate
        from mllm_jax.generation.assistant import Assistant

        return evaluate(Assistant(model, params, processor, mesh=mesh), splits, batch_size=8, max_new_tokens=4)
