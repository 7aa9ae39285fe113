"""The output branch of a multimodal model for one modality: signal tokens -> output projector -> generator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_jax.data.batch import BatchSpec, targets_spec
from mllm_jax.data.processing.signals import signal_names
from mllm_jax.errors import ConfigError
from mllm_jax.models.branch import filled
from mllm_jax.models.protocol import GeneratorConfig, produced

KINDS = ("output_projector", "generator")  # kinds of parts of an output branch
TARGETS = "targets"  # the slots of a row for media of a modality that the model produces are <modality>_targets


@dataclass(frozen=True)
class Output:
    """The parts that produce media of one modality from the hidden states of signal tokens.

    A medium of an answer becomes `projector.tokens` signal tokens in the text: special tokens <image_0>, <image_1>, ...
    (GILL, arXiv 2305.17216; NExT-GPT, arXiv 2309.05519), which the LLM writes. As queries (MetaQuery, arXiv 2504.06256)
    they are between <begin_image> and <end_image>, and the LLM writes only the first of these.

    Attributes:
        projector: the output projector, from the LLM's hidden states to the condition of the generator.
        generator: a generator with its own text encoder: a `TextToImageConfig`, `TextToVideoConfig`,
            `TextToSoundConfig`, or `AudioLDM2OutputConfig`. The text encoder's output for a
            caption is what the condition is aligned to, and for an empty caption the condition without one.
        queries: whether the tokens are queries.
        tokenizer: folder of the text encoder's tokenizer; None: the model's own. A generator with several text encoders
            has one in each subfolder: that of an AudioLDM-2 is the folder of the whole.
    """

    projector: Any
    generator: Any
    queries: bool = False
    tokenizer: str | None = None

    def joined(self, hidden_size: int, vocab_size: int) -> Output:
        """Returns the branch with open widths filled in from the LLM, and the open vocabulary of its text encoder."""
        generator = self.generator
        if self.tokenizer is None and isinstance(generator, GeneratorConfig) and len(generator.tokenizers) == 1:
            generator = replace(generator, text_encoder=filled(generator.text_encoder, vocab_size=vocab_size))
        return replace(self, projector=filled(self.projector, input_size=hidden_size), generator=generator)

    def parts(self, modality: str) -> dict[str, Any]:
        """Returns each part's config by the name of its parameters."""
        return {f"output_projector_{modality}": self.projector, f"generator_{modality}": self.generator}

    def check(self, modality: str, hidden_size: int) -> None:
        """Raises ConfigError if the parts do not fit each other, the modality, or the LLM's width."""
        if not isinstance(self.generator, GeneratorConfig) or self.generator.modality != modality:
            raise ConfigError(
                f"outputs[{modality!r}] with a {type(self.generator).__name__}",
                "a TextToImageConfig for images, a TextToVideoConfig for videos, and for sounds a TextToSoundConfig or "
                "an AudioLDM2OutputConfig",
                "change the generator, or the modality",
            )
        if self.tokenizer is None and len(self.generator.tokenizers) > 1:
            raise ConfigError(
                f"outputs[{modality!r}] without a tokenizer for the {len(self.generator.tokenizers)} text encoders of "
                f"its {type(self.generator).__name__}",
                f"Output(tokenizer=FOLDER) with {' and '.join(self.generator.tokenizers)}",
                "name the generator's folder",
            )
        if self.projector.input_size != hidden_size:
            raise ConfigError(
                f"projector.input_size {self.projector.input_size}",
                f"the LLM's hidden_size {hidden_size}",
                "make the two equal, or leave it out",
            )
        made = (self.projector.output_tokens, self.projector.output_size)
        read = (self.generator.condition_tokens, self.generator.condition_size)
        if made != read:
            raise ConfigError(
                "an output projector that makes {} vectors of width {}".format(*made),
                "the generator's condition: {} vectors of width {}".format(*read),
                "change output_tokens or output_size of the output projector",
            )

    def batch_spec(self, modality: str, rows: int, slots: int) -> BatchSpec:
        """Returns the arrays of a batch for media that the model produces.

        Args:
            slots: of a row.
        """
        target = self.generator.target_shape, self.generator.target_dtype
        return targets_spec(modality, rows, slots, target, self.projector.tokens, self.generator.caption_length)


def names_of_signals(config: Any) -> dict[str, tuple[str, ...]]:
    """Returns the special tokens that a model needs for each modality that it produces."""
    outputs = {modality: config.output(modality) for modality in produced(config)}
    return {m: signal_names(m, output.projector.tokens, output.queries) for m, output in outputs.items()}


def captions_folder(folder: Path, modality: str) -> Path:
    """Returns the folder, beside a model's tokenizer, of the tokenizer of a generator's text encoder."""
    return folder / f"captions_{modality}"


def slots_of(modality: str) -> str:
    """Returns the name of the slots of media that the model produces, such as image_targets."""
    return f"{modality}_{TARGETS}"


def produced_in(slots: str) -> str | None:
    """Returns what the model produces in slots of this name, such as "image"; None: it reads what they hold."""
    return slots.removesuffix(f"_{TARGETS}") if slots.endswith(f"_{TARGETS}") else None
