"""A multimodal LLM with a P-Former that guides its projector (arXiv 2307.07063, section 3.3)."""

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
    """The config of a stage that moves an image's media tokens towards the prompts of its caption.

    The parts of `model` keep their names, so that the next stage continues with the same parts.

    Attributes:
        model: the multimodal LLM; None: the experiment's model.
        prompter: the P-Former that reads captions, the part "prompter" of a run of `PFormerPretrainingConfig`.
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
                "one for each media token of an image, in the LLM's width: {} of {}".format(*media),
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
        prompter = self.prompter.for_llm(self.llm)
        return within(self.model, self.compute).parts | {"prompter": within(prompter, self.compute)}

    @property
    def encoder_decoder(self) -> bool:
        """True if the LLM reads text and media in its encoder, and answers with its decoder."""
        return self.model.encoder_decoder

    @property
    def media_tokens(self) -> int:
        """The number of tokens of one image in the LLM's row."""
        return self.model.media_tokens

    @property
    def image_size(self) -> int:
        """The side of the images in a batch."""
        return self.model.image_size

    @property
    def instruction_length(self) -> int:
        """The most tokens of an instruction that the projector reads in training; 0: it reads none."""
        return self.model.instruction_length

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """The number of tokens of each embedding, by its path in an experiment."""
        if self.model is None:
            return {}
        return self.model.vocab_sizes | {"prompter.vocab_size": self.parts["prompter"].vocab_size}

    @property
    def dtype(self) -> str:
        """The dtype of most of the computation."""
        return self.parts["llm"].dtype

    def batch_spec(self, rows: int = 1, length: int = 8, slots=None) -> BatchSpec:
        """Returns the arrays of the model's batch."""
        return self.model.batch_spec(rows, length, slots)

    def beside(self, model: Any, vocab_size: int) -> PromptGuidedConfig:
        """Returns the config with open fields filled in from the experiment; see `TakesFromExperiment`."""
        return self if self.model is not None else replace(self, model=model)

    def make(self) -> PromptGuidedModel:
        Requirements("prompt-guided model", self).given("model")
        return PromptGuidedModel(self)


@struct.dataclass
class GuidedMedia:
    """The media tokens of images, and the prompts of their captions.

    Attributes:
        media, prompts: dtype[B, T, E], of each row's image and of its caption.
        row: media and captions as the LLM reads them; see `caption_row`.
    """

    media: jax.Array
    prompts: jax.Array
    row: dict


class PromptGuidedModel(nn.Module):
    """A module that maps images to media tokens, and captions to prompts."""

    config: PromptGuidedConfig

    def setup(self):
        self.model = within(self.config.model, self.config.compute).make()
        nn.share_scope(self, self.model)  # its parts keep their names, at the level of the prompter
        self.prompter = self.config.parts["prompter"].make()

    def __call__(self, batch):
        """Computes next-token logits of a row, see `Multimodal`."""
        return self.model(batch)

    def head_inputs(self, batch) -> HeadInputs:
        """Returns the inputs of the LLM's output head for a row."""
        return self.model.head_inputs(batch)

    def encode_features(self, batch, modality: str):
        """Returns the features that the projector reads, see `Multimodal.encode_features`."""
        return self.model.encode_features(batch, modality)

    def guide(self, batch) -> GuidedMedia:
        """Encodes an image and a caption (tokens, segments int[B, L]) in each row; see `PromptGuided`."""
        media, caption = self.model.encode_media(batch).tokens, (batch["tokens"], batch["segments"])
        return GuidedMedia(media, self.prompter(*caption), caption_row(self.config.llm, media, *caption))

    def touch(self, batch):
        """Runs every part once, so that `init` creates all parameters."""
        self.prompter(*(batch[name][:, : self.config.prompter.max_length] for name in ("tokens", "segments")))
        return self.model(batch)
