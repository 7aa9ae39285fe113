"""A multimodal LLM beside the P-Former that guides its projector (arXiv 2307.07063, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import linen as nn
from flax import struct

from mllm_jax.data.batch import BatchSpec
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.head import HeadInputs
from mllm_jax.layers.requirements import Requirements
from mllm_jax.models.caption_row import caption_row
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.pformer import PFormerConfig


@dataclass(frozen=True)
class PromptGuidedConfig(WithCompute):
    """What a stage trains that draws an image's media tokens to the prompts of its caption.

    The parts of `model` keep their names, so that what the stage trains is what the next one goes on with.

    Attributes:
        model: the multimodal LLM; None: the experiment's model.
        prompter: the P-Former that reads captions. What a run of `PFormerPretrainingConfig` trained is read here as the
            part "prompter".
    """

    model: MultimodalConfig | None = None
    prompter: PFormerConfig = PFormerConfig()

    family = None

    def __post_init__(self):
        if self.model is None:
            return
        prompter = self.parts["prompter"]
        made = (prompter.num_queries, prompter.output_size)
        packed = self.model.image.packed
        media = ("any number" if packed else self.media_tokens, self.llm.hidden_size)
        if made != media:
            raise ConfigError(
                "a prompter of {} prompts of width {}".format(*made),
                "as many as an image has media tokens, in the LLM's width: {} of {}".format(*media),
                "train without a prompter: images of any size have no fixed number of media tokens"
                if packed
                else "change num_queries or output_size of the prompter or the projector",
            )

    @property
    def llm(self) -> Any:
        """The language model's config."""
        return self.model.llm

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters."""
        prompter = self.prompter.beside(self.llm)
        return within(self.model, self.compute).parts | {"prompter": within(prompter, self.compute)}

    @property
    def encoder_decoder(self) -> bool:
        """Whether the LLM reads text and media in an encoder of its own and answers from a decoder."""
        return self.model.encoder_decoder

    @property
    def media_tokens(self) -> int:
        """Tokens that one image takes in the LLM's row."""
        return self.model.media_tokens

    @property
    def image_size(self) -> int:
        """Side of the images that a batch holds."""
        return self.model.image_size

    @property
    def instruction_length(self) -> int:
        """Tokens of an instruction that the projector reads in training; 0: it reads none."""
        return self.model.instruction_length

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """How many tokens each embedding holds, by its place in an experiment."""
        if self.model is None:
            return {}
        return self.model.vocab_sizes | {"prompter.vocab_size": self.parts["prompter"].vocab_size}

    @property
    def dtype(self) -> str:
        """What most of the model computes in."""
        return self.parts["llm"].dtype

    def batch_spec(self, rows: int = 1, length: int = 8, slots=None) -> BatchSpec:
        """The arrays of a batch: those of the model."""
        return self.model.batch_spec(rows, length, slots)

    def beside(self, model: Any, vocab_size: int) -> PromptGuidedConfig:
        """Returns the config with what it leaves open taken from the experiment; see `TakesFromExperiment`."""
        return self if self.model is not None else replace(self, model=model)

    def make(self) -> PromptGuidedModel:
        Requirements("prompt-guided model", self).given("model")
        return PromptGuidedModel(self)


@struct.dataclass
class GuidedMedia:
    """Images and what a P-Former makes of their captions.

    Attributes:
        media, prompts: dtype[B, T, E], of each row's image and of its caption.
        row: media and captions as the LLM reads them; see `caption_row`.
    """

    media: jax.Array
    prompts: jax.Array
    row: dict


class PromptGuidedModel(nn.Module):
    """Images to media tokens, captions to prompts."""

    config: PromptGuidedConfig

    def setup(self):
        self.model = within(self.config.model, self.config.compute).make()
        nn.share_scope(self, self.model)  # its parts stand beside the prompter, by their own names
        self.prompter = self.config.parts["prompter"].make()

    def __call__(self, batch):
        """Next-token logits of a row, see `Multimodal`."""
        return self.model(batch)

    def head_inputs(self, batch) -> HeadInputs:
        """What the LLM's output head makes the logits of a row from."""
        return self.model.head_inputs(batch)

    def encode_images(self, batch):
        """The features that the projector reads, see `Multimodal.encode_images`."""
        return self.model.encode_images(batch)

    def guide(self, batch) -> GuidedMedia:
        """An image and its caption, which are tokens and segments int[B, L], in each row; see `PromptGuided`."""
        media, caption = self.model.encode_media(batch).tokens, (batch["tokens"], batch["segments"])
        return GuidedMedia(media, self.prompter(*caption), caption_row(self.config.llm, media, *caption))

    def touch(self, batch):
        """Runs every part once: what `init` traces so that all parameters exist."""
        self.prompter(*(batch[name][:, : self.config.prompter.max_length] for name in ("tokens", "segments")))
        return self.model(batch)
