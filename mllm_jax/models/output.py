"""The output branch of a multimodal model for one modality: signal tokens -> output projector -> generator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_jax.data.batch import BatchSpec, targets_spec
from mllm_jax.data.processing.signals import signal_names
from mllm_jax.errors import ConfigError
from mllm_jax.models.branch import filled

KINDS = ("output_projector", "generator")  # kinds of parts of an output branch
TARGETS = "targets"  # the slots of a row for media of a modality that the model produces are <modality>_targets


@dataclass(frozen=True)
class Output:
    """The parts that produce media of one modality from the hidden states of signal tokens.

    A medium of an answer becomes `projector.tokens` signal tokens in the text: special tokens <image_0>, <image_1>, ...
    (GILL, arXiv 2305.17216; NExT-GPT, arXiv 2309.05519), which the LLM writes. As queries (MetaQuery, arXiv 2504.06256)
    they stand between <begin_image> and <end_image>, and the LLM writes only the first of these.

    Attributes:
        projector: the output projector, from the LLM's hidden states to the condition of the generator.
        generator: None: the model only learns the condition.
        text: the generator's own text encoder. Its output for a caption is what the condition is aligned to, and its
            output for an empty caption is the condition of guidance. None: neither is needed.
        queries: whether the tokens are queries.
        caption_length: positions of a caption for the text encoder.
        tokenizer: folder of the text encoder's tokenizer; None: the model's own.
    """

    projector: Any
    generator: Any = None
    text: Any = None
    queries: bool = False
    caption_length: int = 77
    tokenizer: str | None = None

    def joined(self, hidden_size: int, vocab_size: int) -> Output:
        """Returns the branch with open widths filled in from the LLM, and the open vocabulary of its text encoder."""
        text = self.text if self.tokenizer else filled(self.text, vocab_size=vocab_size)
        return replace(self, projector=filled(self.projector, input_size=hidden_size), text=text)

    def parts(self, modality: str) -> dict[str, Any]:
        """Returns each part's config by the name of its parameters."""
        named = {f"output_projector_{modality}": self.projector, f"generator_{modality}": self.generator}
        return {n: part for n, part in (named | {text_part(modality): self.text}).items() if part is not None}

    def check(self, hidden_size: int) -> None:
        """Raises ConfigError if the parts do not fit each other, or the LLM's width."""
        if self.projector.input_size != hidden_size:
            raise ConfigError(
                f"projector.input_size {self.projector.input_size}",
                f"the LLM's hidden_size {hidden_size}",
                "make the two equal, or leave it out",
            )
        made = self.projector.output_size
        sizes = {
            "generator.condition_size": None if self.generator is None else self.generator.condition_size,
            "text.hidden_size": None if self.text is None else self.text.hidden_size,
        }
        for name, size in sizes.items():
            if size is not None and size != made:
                raise ConfigError(
                    f"projector.output_size {made}", f"{name} {size}", "change the output projector's width"
                )

    def batch_spec(self, modality: str, rows: int, slots: int) -> BatchSpec:
        """Returns the arrays of a batch for media that the model produces.

        Args:
            slots: of a row.
        """
        target = None if self.generator is None else (self.generator.target_shape, self.generator.target_dtype)
        return targets_spec(modality, rows, slots, target, self.projector.tokens, self.caption_length)


def names_of_signals(config: Any) -> dict[str, tuple[str, ...]]:
    """Returns the special tokens that a composed model needs for each modality that it produces."""
    return {m: signal_names(m, config.output(m).projector.tokens, config.output(m).queries) for m in config.outputs}


def captions_folder(folder: Path, modality: str) -> Path:
    """Returns the folder, beside a model's tokenizer, of the tokenizer of a generator's text encoder."""
    return folder / f"captions_{modality}"


def slots_of(modality: str) -> str:
    """Returns the name of the slots of media that the model produces, such as image_targets."""
    return f"{modality}_{TARGETS}"


def text_part(modality: str) -> str:
    """Returns the name of the part that is a generator's text encoder; that of images has no suffix."""
    return "encoder_text" if modality == "image" else f"encoder_text_{modality}"
