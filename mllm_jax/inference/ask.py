"""One question to the model in a folder: a language model, or a named model that reads images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mllm_jax.data.images import read_image
from mllm_jax.errors import ConfigError
from mllm_jax.inference.language import LanguageGenerator, require_language
from mllm_jax.inference.multimodal import MultimodalGenerator
from mllm_jax.inference.options import Completion, Options
from mllm_jax.inference.sampling import Sampling
from mllm_jax.models.processor import Processor
from mllm_jax.models.registry import from_pretrained, has_layout, pretrained_config


def ask(
    folder: Path,
    question: str,
    images: Sequence[Path] = (),
    options: Options = Options(),
    sampling: Sampling = Sampling(),
) -> Completion:
    """The answer, asked by the chat template if the tokenizer has one; images come before the question.

    Raises:
        ConfigError: images for a language model, or a model that generates no text or is not supported.
        DataError: no tokenizer, or an image that cannot be read.
        CheckpointError: no model in the folder, or a damaged one.
    """
    config = pretrained_config(folder)
    if has_layout(config):
        return _about_pictures(folder, question, images, options, sampling)
    require_language(config, folder)
    if images:
        raise ConfigError(
            f"{folder} with {len(images)} image(s)",
            "a question in words only: this folder holds a language model",
            "leave out --image, or name a model that reads images",
        )
    generator = LanguageGenerator.load(folder)
    prompt = [{"role": "user", "content": question}] if generator.tokenizer.has_template else question
    return generator.generate([prompt], options, sampling)[0]


def _about_pictures(
    folder: Path, question: str, images: Sequence[Path], options: Options, sampling: Sampling
) -> Completion:
    # What is small first: a wrong path should not have to wait for the weights.
    pictures = [read_image(path) for path in images]
    processor = Processor.from_pretrained(folder)
    text = question
    if processor.tokenizer.has_template:
        parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
        text = [{"role": "user", "content": parts}]
    batch = processor(text, images=pictures)
    model, params = from_pretrained(folder)
    return MultimodalGenerator(model, params, processor).complete(batch, options, sampling)[0]
