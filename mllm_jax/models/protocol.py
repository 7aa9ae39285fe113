"""Protocols of models' configs: the attributes and methods that the library uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from flax import linen as nn

from mllm_jax.data.batch import NO_MEDIA, ArraySpec, BatchSpec, target_spec, text_spec


@runtime_checkable
class ModelConfig(Protocol):
    """The config of a model for training or generation.

    Attributes:
        family: the Hugging Face architecture for writing it; None for a composed model.
        image_size: side of the images in a batch.
        media_tokens: of one image.
        llm: the language model's config; None for a model without one.
    """

    family: str | None
    llm: Any

    @property
    def image_size(self) -> int: ...
    @property
    def media_tokens(self) -> int: ...
    @property
    def encoder_decoder(self) -> bool: ...
    @property
    def parts(self) -> Mapping[str, Any]:
        """Each part's config by the name of its parameters, such as encoder_image."""
        ...

    def batch_spec(self, rows: int = 1, length: int = 8, slots: Mapping[str, int] = NO_MEDIA) -> BatchSpec:
        """Returns the arrays of a batch; without arguments, those that `init` needs to create every parameter.

        Args:
            slots: for media in a row, by modality.
        """
        ...

    def make(self) -> nn.Module: ...


@runtime_checkable
class SoundEncoderConfig(Protocol):
    """The config of an encoder of sounds, in the role of `Branch.encoder`; a composed model also calls `processor`.

    Attributes:
        rate: samples a second.
    """

    rate: int

    def inputs(self, seconds: float) -> tuple[int, ...]:
        """Returns the shape of the encoder's input for a sound of that length; steps in time are its last axis."""
        ...

    def frames(self, n: Any) -> Any:
        """Returns the number of output vectors for n steps of the input, an integer or an array of integers."""
        ...


@runtime_checkable
class SequenceProjectorConfig(Protocol):
    """The config of a projector that reads sequences of any length, in the role of `Branch.projector`."""

    def length(self, vectors: Any) -> Any:
        """Returns the media tokens of a sequence of that many vectors, an integer or an array of integers."""
        ...


@runtime_checkable
class TakesFromExperiment(Protocol):
    """The config of a composition whose open fields the experiment fills in."""

    def beside(self, model: Any, vocab_size: int) -> Any:
        """Returns the config with open fields filled in.

        Args:
            model: the experiment's own, whose parts replace missing ones.
            vocab_size: of the experiment's tokenizer.
        """
        ...


@runtime_checkable
class WritesText(Protocol):
    """The config of a model that generates text."""

    def target_spec(self, rows: int, length: int) -> BatchSpec:
        """Returns the arrays for the output of an encoder-decoder's decoder."""
        ...


@runtime_checkable
class ProducesMedia(Protocol):
    """The config of a model that also generates media, if it has output branches."""

    @property
    def outputs(self) -> Mapping[str, Any]:
        """The output branches by modality."""
        ...

    def output(self, modality: str) -> Any:
        """Returns an output branch, with open widths filled in. Raises ConfigError: there is none."""
        ...


@runtime_checkable
class GeneratorConfig(Protocol):
    """The config of a generator in an output branch, such as a `TextToImageConfig`.

    Attributes:
        modality: "image", "video" or "audio".
        target_dtype: of the media of the training.
        tokenizers: the subfolders of `Output.tokenizer` with a tokenizer of each text encoder; "" is the folder itself.
    """

    modality: str
    target_dtype: str
    tokenizers: tuple[str, ...]

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The shape of the media of the training."""
        ...

    @property
    def caption_length(self) -> int:
        """The number of ids of a caption in a batch."""
        ...

    @property
    def condition_tokens(self) -> int | tuple[int, ...]:
        """The number of a condition's vectors, or of each of several."""
        ...

    @property
    def condition_size(self) -> int | tuple[int, ...]:
        """The width of a condition's vectors, or of those of each of several."""
        ...

    def captions(self, tokenizers: Sequence[Any]) -> Any:
        """Returns the conversion of captions to ids, by tokenizers in the order of `tokenizers`."""
        ...


def produced(config: Any) -> tuple[str, ...]:
    """Returns the modalities of media that the model of a config generates."""
    return tuple(config.outputs) if isinstance(config, ProducesMedia) else ()


@dataclass(frozen=True)
class LanguageOnly:
    """A language model in the role of a multimodal model without encoders.

    Attributes:
        llm: the language model's config.
    """

    llm: Any

    image_size = media_tokens = instruction_length = 0
    inputs: ClassVar[Mapping[str, Any]] = NO_MEDIA

    @property
    def family(self) -> str | None:
        return self.llm.family

    @property
    def encoder_decoder(self) -> bool:
        return self.llm.encoder_decoder

    @property
    def dtype(self) -> str:
        return self.llm.dtype

    @property
    def parts(self) -> dict[str, Any]:
        """No named parts: the parameters are those of the language model."""
        return {}

    def batch_spec(self, rows: int = 1, length: int = 8, slots: Mapping[str, int] = NO_MEDIA) -> BatchSpec:
        """Returns the arrays of a batch of text."""
        return text_spec(rows, length)

    def target_spec(self, rows: int, length: int) -> BatchSpec:
        """Returns the arrays for the output of an encoder-decoder's decoder."""
        return target_spec(rows, length) | dict(loss_weights=ArraySpec((rows, length), "float32"))

    def make(self) -> nn.Module:
        return self.llm.make()
