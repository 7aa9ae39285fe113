"""The layout of a composed model, made from its branches and a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.processing.composed import ComposedLayout, ImageTokens
from mllm_jax.data.processing.encode import Words
from mllm_jax.data.processing.frames import FrameTokens
from mllm_jax.data.processing.sounds import SoundTokens
from mllm_jax.data.video import FIVE_FRAMES, FrameSampling
from mllm_jax.errors import DataError
from mllm_jax.models.multimodal import MultimodalConfig

# The usual placeholders for images; without one, any special token that the template leaves unused.
IMAGE_TOKENS = ("<image>", "<|image|>", "<|image_pad|>")


def composed_layout(
    config: Any,
    tokenizer: Words,
    words: Sequence[str] = (),
    sampling: FrameSampling = FIVE_FRAMES,
    frame_time: str = "",
) -> ComposedLayout:
    """Returns the layout of a composed model; the arguments are those of `Processor.of`."""
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
    return ComposedLayout(conversions, image_token(tokenizer), flattens=isinstance(tokenizer, ChatTokenizer))


def image_token(tokenizer: Words) -> int:
    """Returns an id for images that nothing else in a row has.

    Adds a token if the template writes all special tokens. No text contains it, and its embedding is not read.

    Raises:
        DataError: there is no chat template, or it refuses a question and its answer.
    """
    special = {token: tokenizer.id_of(token) for token in tokenizer.special_tokens}
    if named := [special[name] for name in IMAGE_TOKENS if name in special]:
        return named[0]
    template = tokenizer.template if isinstance(tokenizer.template, str) else ""
    written = {i for token, i in special.items() if token in template} | _written(tokenizer)
    free = sorted(set(special.values()) - written)
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
