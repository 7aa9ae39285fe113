"""A source of random numbers and a tiny model, for tests that need batches but no data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from mllm_jax.data.batch import ArraySpec, BatchSpec
from mllm_jax.data.images import Drawn
from mllm_jax.data.message import Example, Image, Message, Segment, Text
from mllm_jax.data.pipeline import Mixture, Pipeline, Weighted, training_texts
from mllm_jax.data.processing.composed import ComposedLayout, ImageTokens
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.processor import Processor
from mllm_jax.projectors.mlp import MLPProjectorConfig

SIZE = 8
PIXELS = np.zeros((SIZE, SIZE, 3), np.uint8)
COLOURS = ("red", "green", "blue", "grey", "black", "white", "brown", "pink", "violet", "orange")


@dataclass(frozen=True)
class Toy:
    """Images of noise, described by color and number; `images` in each conversation (0: a text instead)."""

    name: str = "toy"
    size: int = 200
    images: int = 1
    image_size: int = SIZE

    def build(self) -> ToySource:
        return ToySource(self)


class ToySource:
    def __init__(self, config: Toy):
        self.config, self.name = config, config.name

    def __len__(self) -> int:
        return self.config.size

    def example(self, index: int) -> Example:
        colour, number = COLOURS[index % len(COLOURS)], index // len(COLOURS)
        context = () if self.config.images else (Text(f"number {number} is {colour}"),)
        images = [Image(Drawn(partial(self.image, index, i))) for i in range(self.config.images)]
        messages = (
            Message("user", (*images, *context, Text("what colour"))),
            Message("assistant", colour),
            Message("user", "which number"),
            Message("assistant", f"{number} {colour}"),
        )
        turns = 1 + index % 3 // 2
        return Example(messages[: 2 * turns], (Segment((1,)), Segment((3,), region=1))[:turns])

    def image(self, index: int, number: int = 0) -> np.ndarray:
        rng = np.random.default_rng((index, number))
        return rng.integers(0, 256, (self.config.image_size, self.config.image_size, 3), dtype=np.uint8)

    def fingerprint(self) -> str:
        return repr(self.config)


@lru_cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(training_texts([Toy().build(), Toy(images=0).build()]), 320)


IMAGES = Mixture(
    (Weighted(Toy(), 0.5), Weighted(Toy("toy_pairs", images=2), 0.3), Weighted(Toy("toy_text", images=0), 0.2)),
    rows=8,
    length=64,
    slots={"image": 3},
)
PAIRS = Mixture((Weighted(Toy()),), rows=8, length=24, slots={"image": 1}, layout="caption", captions=2)

# 8 divides the LLM's heads, MLP and vocabulary, but not its 2 key-value heads; nothing divides the ViT's 3 heads.
MODEL = MultimodalConfig(
    inputs={
        "image": Branch(
            ViTConfig(SIZE, 4, 24, num_layers=1, num_heads=3, mlp_size=32), MLPProjectorConfig(output_size=32, merge=1)
        )
    },
    llm=DecoderConfig(vocab_size=320, hidden_size=32, num_layers=2, num_heads=8, num_kv_heads=2, mlp_size=64),
)
# A contrastive stage's composition, with the model's own image encoder.
DUAL = DualEncoderConfig(
    MODEL.image.encoder,
    TextTowerConfig(vocab_size=320, max_length=24, hidden_size=16, num_layers=1, num_heads=2, mlp_size=32),
    projection_size=8,
    captions=2,
)


def processor(config: Any = MODEL, words: Tokenizer | None = None) -> Processor:
    """Returns the processor of a composed model, with the toys' tokenizer."""
    words = words or tokenizer()
    return Processor(
        config,
        words,
        ComposedLayout({"image": ImageTokens(config.image_size, config.media_tokens)}, words.image_token_id),
    )


def conversation(images: int, turns: Sequence[tuple[str, str]], context: str = "") -> Example:
    """Makes a conversation with images and a text before the first question, as the sources give them."""
    opening = (*(Image(PIXELS) for _ in range(images)), *((Text(context),) if context else ()))
    messages = []
    for question, answer in turns:
        messages += [Message("user", (*opening, Text(question))), Message("assistant", answer)]
        opening = ()
    return Example(tuple(messages))


def media_index(encoded: Any, media_tokens: int | None = None) -> list[int]:
    """Returns the media index of a row that has only this example."""
    return encoded.row.media_index([(media_tokens or MODEL.media_tokens) * n for n in range(len(encoded.media))], 0)[
        :, 0
    ].tolist()


def spec_of(batch: dict[str, np.ndarray]) -> BatchSpec:
    """Returns the spec of given arrays."""
    return BatchSpec({name: ArraySpec(x.shape, str(x.dtype)) for name, x in batch.items()})


def pipeline(mixture: Mixture = IMAGES, *, seed: int = 0, **kwargs) -> Pipeline:
    return Pipeline(mixture, processor(), seed=seed, **kwargs)


@contextmanager
def kept_programs(folder: Path) -> Iterator[None]:
    """Keeps every compiled program in a folder, so that the runs inside share them."""
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Switches LLVM's optimizations off, since tests on toys spend most of their time compiling; partitioning stays."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)
