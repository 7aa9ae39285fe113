"""What generation needs of a model: read the prompts once, then take a token at a time."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.generation.quantize import int8_linear
from mllm_jax.generation.stacks import CacheLayout, restack, unrolled, unstack
from mllm_jax.layers.linear import linear_hook
from mllm_jax.models.multimodal import Multimodal

Batch = dict[str, jax.Array]


class Steps(Protocol):
    """A model as a state that is moved on by tokens.

    Batches hold tokens and segments int32[B, S], padding (segment 0) behind each prompt, and what else the model reads.

    Attributes:
        prompt_takes_room: prompt and answer share one row, so that a limit holds for their sum.
    """

    prompt_takes_room: bool

    def prepare(self, params: dict) -> dict:
        """The parameters in the form in which `prefill` and `step` take them."""

    def prefill(self, params: dict, batch: Batch, new: int) -> tuple[jax.Array, Any]:
        """Reads the prompts: float32[B, V] logits of what follows them, and a state with room for `new` tokens."""

    def step(self, params: dict, state: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        """Takes the next token int32[B] of each row: float32[B, V] logits of the one behind it, and the new state."""

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        """float32[B, S, V] of whole rows; of an encoder-decoder, of what its decoder reads."""

    def take(self, state: Any, rows: jax.Array) -> Any:
        """The state with row rows[i] in row i."""

    def said(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The tokens that a repetition penalty counts from the start: int32[B, S], and which of them bool[B, S]."""


def steps_of(module: nn.Module, by_layer: bool | None = None) -> Steps:
    """The steps of a composed model, an encoder-decoder (it has a method `start`) or a decoder-only model."""
    if isinstance(module, Multimodal):
        composed = MultimodalEncoderDecoderSteps if module.config.encoder_decoder else MultimodalSteps
        return composed(module, by_layer)
    return (EncoderDecoderSteps if module.config.encoder_decoder else LanguageSteps)(module, by_layer)


class LanguageSteps:
    """A decoder-only model: `module.apply(variables, tokens, positions, segments, cache=cache) -> (logits, cache)`.

    Args:
        module: with a config that has `make()` and `make_cache(batch, size)`.
        by_layer: keep the layers of parameters and cache apart (see `stacks`), which holds the layers' parameters a
            second time. None: on a CPU, where it pays.
    """

    prompt_takes_room = True

    def __init__(self, module: nn.Module, by_layer: bool | None = None):
        wanted = jax.default_backend() == "cpu" if by_layer is None else by_layer
        flat = unrolled(module.config) if wanted else None
        self.by_layer = flat is not None
        self.config = flat or module.config
        self.module = self.config.make()
        self.layout = CacheLayout.of(lambda rows: self.config.make_cache(rows, 8))

    def prepare(self, params: dict) -> dict:
        return unstack(params) if self.by_layer else params

    def prefill(self, params: dict, batch: Batch, new: int) -> tuple[jax.Array, Any]:
        rows, length = batch["tokens"].shape
        ask = only_last(self.module, batch) | {"cache": self.config.make_cache(rows, length + new)}
        logits, cache = self.apply(params, batch["tokens"], None, batch["segments"], **ask)
        return last_of(logits, batch), self.shut(cache)

    def step(self, params: dict, state: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        logits, cache = self.apply(params, tokens[:, None], cache=self.open(state))
        return logits[:, 0], self.shut(cache)

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        return self.apply(params, batch["tokens"], batch["positions"], batch["segments"])

    def take(self, state: Any, rows: jax.Array) -> Any:
        return self.shut(self.layout.take(self.open(state), rows))

    def said(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return batch["tokens"], batch["segments"] > 0

    def apply(self, params: dict, *args, **kwargs) -> Any:
        with linear_hook(int8_linear):
            return self.module.apply({"params": restack(params)}, *args, **kwargs)

    def open(self, state: Any) -> Any:
        """The cache that a state holds."""
        return self.layout.join(state) if self.by_layer else state

    def shut(self, cache: Any) -> Any:
        """A cache as a state."""
        return self.layout.split(cache) if self.by_layer else cache


class EncoderDecoderSteps(LanguageSteps):
    """An encoder-decoder: `start` reads the source and makes the cache; after that it is called as a decoder is.

    The prompt is the source; the answer begins behind the config's `decoder_start_token_id`.
    """

    prompt_takes_room = False

    def prefill(self, params: dict, batch: Batch, new: int) -> tuple[jax.Array, Any]:
        cache = self.apply(params, batch["tokens"], None, batch["segments"], size=new + 1, method="start")
        return self.step(params, self.shut(cache), self._first(batch)[:, 0])

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        read = batch["tokens"], batch["positions"], batch["segments"]
        target = {name: batch[name] for name in ("decoder_tokens", "decoder_positions", "decoder_segments")}
        return self.apply(params, *read, **target)

    def said(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        first = self._first(batch)
        return first, jnp.ones_like(first, bool)

    def _first(self, batch: Batch) -> jax.Array:
        return jnp.full((batch["tokens"].shape[0], 1), self.config.decoder_start_token_id, jnp.int32)


class MultimodalSteps(LanguageSteps):
    """The composed model; batches also hold positions, media_index and, where there are pictures, what shows them."""

    def __init__(self, module: Multimodal, by_layer: bool | None = None):
        super().__init__(module.config.llm.make(), by_layer)
        self.llm, self.module = self.module, dataclasses.replace(module.config, llm=self.config).make()

    def prepare(self, params: dict) -> dict:
        return {**params, "llm": super().prepare(params["llm"])}

    def prefill(self, params: dict, batch: Batch, new: int) -> tuple[jax.Array, Any]:
        rows, length = batch["tokens"].shape
        ask = only_last(self.llm, batch) | {"cache": self.config.make_cache(rows, length + new)}
        out = self.apply(params, batch, **ask)
        return last_of(out.logits, batch), self.shut(out.cache)

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        return self.apply(params, batch).logits

    def step(self, params: dict, state: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        logits, cache = self.apply(params, tokens[:, None], self.open(state), method="step")
        return logits[:, 0], self.shut(cache)


class MultimodalEncoderDecoderSteps(MultimodalSteps, EncoderDecoderSteps):
    """The composed model over an encoder-decoder, which reads text and media in its encoder."""

    prompt_takes_room = False

    def prefill(self, params: dict, batch: Batch, new: int) -> tuple[jax.Array, Any]:
        cache = self.apply(params, batch, size=new + 1, method="start")
        return self.step(params, self.shut(cache), self._first(batch)[:, 0])

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        return MultimodalSteps.logits(self, params, batch)

    def said(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return EncoderDecoderSteps.said(self, batch)


def only_last(module: nn.Module, batch: Batch) -> dict:
    """The argument that asks a module for the logits of the prompts' last tokens only, if it can be asked."""
    if "logits_at" not in inspect.signature(type(module).__call__).parameters:
        return {}
    return {"logits_at": (batch["segments"] > 0).sum(axis=1, keepdims=True) - 1}


def last_of(logits: jax.Array, batch: Batch) -> jax.Array:
    """float32[B, S, V], or [B, 1, V] where only the last were asked for, -> float32[B, V]."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    last = (batch["segments"] > 0).sum(axis=1) - 1
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
