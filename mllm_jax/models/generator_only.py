"""The generators of a multimodal model alone, which read captions with their own text encoders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flax import linen as nn

from mllm_jax.data.batch import BatchSpec, text_spec
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.head import HeadInputs
from mllm_jax.layers.requirements import Requirements
from mllm_jax.models.diffused import Diffused, OfMedia, diffuse
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.output import slots_of


@dataclass(frozen=True)
class GeneratorOnlyConfig(WithCompute):
    """The config of a stage that trains generators on pairs of caption and medium, without the LLM.

    The generators keep their names, such as generator_image, so that later stages continue with them. The stage reads
    the same examples: the captions of media in answers.

    Attributes:
        model: the multimodal LLM; None: the experiment's model.
    """

    model: MultimodalConfig | None = None

    family = None
    image_size = media_tokens = instruction_length = 0
    encoder_decoder = False

    @property
    def llm(self) -> Any:
        """The language model's config."""
        return self.model.llm

    @property
    def inputs(self) -> Any:
        """No branches: media of questions are not read."""
        return {}

    @property
    def outputs(self) -> Any:
        """The output branches by modality."""
        return self.model.outputs

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters."""
        named = {f"generator_{m}": self.model.output(m).generator for m in self.outputs}
        return {name: within(part, self.compute) for name, part in named.items()}

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """The number of tokens of each embedding, by its path in an experiment."""
        return {}

    @property
    def dtype(self) -> str:
        """The dtype of most of the computation."""
        return next(iter(self.parts.values())).dtype

    def batch_spec(self, rows: int = 1, length: int = 8, slots=None) -> BatchSpec:
        """Returns the arrays of a batch."""
        spec = text_spec(rows, length)
        for modality in self.outputs:
            count = 1 if slots is None else slots.get(slots_of(modality), 0)
            spec |= self.model.output(modality).batch_spec(modality, rows, count)
        return spec

    def beside(self, model: Any, vocab_size: int) -> GeneratorOnlyConfig:
        """Returns the config with open fields filled in from the experiment; see `TakesFromExperiment`."""
        return self if self.model is not None else replace(self, model=model)

    def make(self) -> GeneratorOnly:
        Requirements("generators", self).given("model")
        return GeneratorOnly(self)


class GeneratorOnly(OfMedia, nn.Module):
    """A module that maps captions and noised media to what their generators predict."""

    config: GeneratorOnlyConfig

    def setup(self):
        self.generator = {name.removeprefix("generator_"): part.make() for name, part in self.config.parts.items()}

    def diffused(self, batch) -> tuple[HeadInputs | None, dict[str, Diffused]]:
        """Noises targets and denoises them under the conditions of captions; see `Produces.diffused`."""
        conditions = self.caption_conditions(batch)
        return None, {m: diffuse(self.generator[m], m, batch, condition) for m, condition in conditions.items()}

    def touch(self, batch):
        """Runs every part once, so that `init` creates all parameters."""
        return self.produced(batch)
