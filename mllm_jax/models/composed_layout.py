"""The layout of a composed model, made from its branches and a tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.processing.composed import ComposedLayout, ImageTokens
from mllm_jax.data.processing.encode import Words
from mllm_jax.data.processing.frames import FrameTokens
from mllm_jax.data.processing.signals import SignalTokens, ids_of
from mllm_jax.data.processing.sounds import SoundTokens
from mllm_jax.data.processing.targets import TARGETS
from mllm_jax.data.tokenizer import tokenizer_in
from mllm_jax.data.video import FIVE_FRAMES, FrameSampling
from mllm_jax.errors import DataError
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.output import captions_folder, names_of_signals

# The usual placeholders for images; without one, any special token that the template leaves unused.
IMAGE_TOKENS = ("<image>", "<|image|>", "<|image_pad|>")


def composed_layout(
    config: Any,
    tokenizer: Words,
    words: Sequence[str] = (),
    sampling: FrameSampling = FIVE_FRAMES,
    frame_time: str = "",
    folder: Path | None = None,
) -> ComposedLayout:
    """Returns the layout of a composed model; the arguments are those of `Processor.of`.

    Args:
        folder: the tokenizer's, with those of the captions of media that the model produces.
    """
    produced = signal_conversions(config, tokenizer, folder)
    conversions = {}
    for modality in config.inputs if isinstance(config, MultimodalConfig) else ("image",):
        if modality == "image":
            ids = [tokenizer.words(word) for word in words]
            conversions[modality] = ImageTokens(config.image_size, config.media_tokens, ids)
            continue
        branch = config.branch(modality)
        if branch.sound:
            processor = branch.encoder.processor(branch.seconds)
            samples = round(branch.seconds * processor.rate)
            conversions[modality] = SoundTokens(processor, samples, branch.inputs, branch.length)
        else:
            side = branch.encoder.image_size
            conversions[modality] = FrameTokens(side, branch.tokens, sampling, frame_time, tokenizer.words)
    placeholder = image_token(tokenizer, {i for each in produced.values() for i in each.ids})
    return ComposedLayout(conversions, placeholder, isinstance(tokenizer, ChatTokenizer), produced)


def signal_conversions(config: Any, tokenizer: Words, folder: Path | None) -> dict[str, SignalTokens]:
    """Returns the conversions of media that a model produces, by modality.

    Raises:
        ConfigError: the tokenizer lacks their signal tokens.
    """
    found = {}
    for modality, names in names_of_signals(config).items():
        output = config.output(modality)
        generator, words = output.generator, [tokenizer]
        if output.tokenizer is not None:
            words = [tokenizer_in(captions_folder(folder, modality) / name) for name in generator.tokenizers]
        found[modality] = SignalTokens(
            modality,
            ids_of(tokenizer, names, str(folder)),
            output.queries,
            generator.target_shape,
            generator.target_dtype,
            partial(TARGETS[modality], generator),
            generator.captions(words),
        )
    return found


def image_token(tokenizer: Words, taken: Collection[int] = ()) -> int:
    """Returns an id for images that nothing else in a row has.

    Args:
        taken: ids of tokens with another meaning.

    Adds a token if the template writes all special tokens. No text contains it, and its embedding is not read.

    Raises:
        DataError: there is no chat template, or it refuses a question and its answer.
    """
    special = {token: tokenizer.id_of(token) for token in tokenizer.special_tokens}
    if named := [special[name] for name in IMAGE_TOKENS if name in special]:
        return named[0]
    template = tokenizer.template if isinstance(tokenizer.template, str) else ""
    written = {i for token, i in special.items() if token in template} | _written(tokenizer)
    free = sorted(set(special.values()) - written - set(taken))
    # Tokens with a meaning of their own come last.
    meant = (*tokenizer.stop_ids, tokenizer.pad_token_id, tokenizer.bos_token_id)
    free.sort(key=lambda i: i in meant)
    return free[0] if free else tokenizer.add_placeholder(IMAGE_TOKENS[0])


def _written(tokenizer: Words) -> set[int]:
    """Returns the ids that a chat template writes around messages of every role that it knows."""
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    written = set(tokenizer.ids(tokenizer.render_chat(talk)))
    try:
        return written | set(tokenizer.ids(tokenizer.render_chat([{"role": "system", "content": "a"}, *talk])))
    except DataError:  # a template without system messages
        return written
