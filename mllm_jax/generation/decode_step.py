"""The interface of a model for generation: reads the prompts once, then takes one token at a time.

Layers are trained as one scanned stack. A loop that decodes one token at a time would copy each layer's slice of the
parameters, and the whole cache, at every step: a CPU has no dot products of slices, and a scan's inputs and outputs
share no memory. So parameters and cache are kept layer by layer outside the compiled function and stacked inside it,
and the module unrolls its layers. XLA replaces a slice of a concatenation by the part, and makes neither.

For one row, a CPU's product of a vector and a matrix is fast only if the matrix is the loop's own: a matrix that is the
reshaped kernel of several heads takes 20 times as long. So such kernels are kept as matrices too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from mllm_jax.generation.quantize import int8_linear
from mllm_jax.layers.compute import with_compute
from mllm_jax.layers.linear import linear_hook
from mllm_jax.llms.protocol import LLMConfig
from mllm_jax.models.multimodal import Multimodal
from mllm_jax.models.whisper import Whisper
from mllm_jax.sharding.logical import use_mesh

Batch = dict[str, jax.Array]
STACK = "layers"  # the last part of a scanned stack's name among the parameters


def on_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """Returns a context in which activations follow the mesh, if there is one."""
    return nullcontext() if mesh is None else use_mesh(mesh)


class Steps(Protocol):
    """A model as a state that tokens advance.

    Batches hold tokens and segments int32[B, S], padding (segment 0) after each prompt, and the model's other inputs.

    Attributes:
        prompt_takes_room: prompt and answer share one row. If False, the state holds prompts of one padded length.
        masked: `prefill` and `step` return log probabilities, and -inf for tokens that may not follow.
    """

    prompt_takes_room: bool
    masked: bool

    def prepare(self, params: dict) -> dict:
        """Converts parameters to the form that `prefill` and `step` take."""

    def prefill(self, params: dict, batch: Batch, room: int) -> tuple[jax.Array, Any]:
        """Reads the prompts; returns logits float32[B, V] of the next token, and a state of `room` positions a row."""

    def step(self, params: dict, state: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        """Takes a token int32[B] of each row; returns logits float32[B, V] of the token after it, and the new state."""

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        """Returns float32[B, S, V] for whole rows; for an encoder-decoder, for the rows of its decoder."""

    def take(self, state: Any, rows: jax.Array) -> Any:
        """Returns the state with row rows[i] in row i."""

    def exchange(self, state: Any, rows: jax.Array) -> Any:
        """Does the same for rows[i] that have the prompt of row i, whose encoded source need not be copied."""

    def put(self, state: Any, other: Any, places: jax.Array) -> Any:
        """Returns the state with row i of another in row places[i]; rows with a place past the end are dropped."""

    def said(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the prompt's tokens int32[B, S], and bool[B, S]: True where a repetition penalty counts them."""


def steps_of(module: nn.Module, by_layer: bool | None = None) -> Steps:
    """Returns the steps of a composed model, Whisper, another encoder-decoder, or a decoder-only model."""
    if isinstance(module, Multimodal):
        composed = MultimodalEncoderDecoderSteps if module.config.encoder_decoder else MultimodalSteps
        return composed(module, by_layer)
    if isinstance(module, Whisper):
        return WhisperSteps(module, by_layer)
    return (EncoderDecoderSteps if module.config.encoder_decoder else LanguageSteps)(module, by_layer)


class LanguageSteps:
    """A decoder-only model: `module.apply(variables, tokens, positions, segments, cache=cache) -> (logits, cache)`.

    Args:
        module: with a config that has `make()` and `make_cache(batch, size)`.
        by_layer: keep parameters and cache layer by layer (see the module), which holds the layers' parameters a
            second time. None: on a CPU, where it is faster.
    """

    prompt_takes_room, masked = True, False

    def __init__(self, module: nn.Module, by_layer: bool | None = None):
        self.by_layer = jax.default_backend() == "cpu" if by_layer is None else by_layer
        self.config = unrolled(module.config) if self.by_layer else module.config
        self.module = self.config.make()
        self.layout = CacheLayout.of(lambda rows: self.config.make_cache(rows, 8))

    def prepare(self, params: dict) -> dict:
        return unstack(params) if self.by_layer else params

    def prefill(self, params: dict, batch: Batch, room: int) -> tuple[jax.Array, Any]:
        ask = dict(cache=self.config.make_cache(len(batch["tokens"]), room), logits_at=last_token(batch))
        logits, cache = self.apply(params, batch["tokens"], None, batch["segments"], **ask)
        return logits[:, 0], self.shut(cache)

    def step(self, params: dict, state: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        logits, cache = self.apply(params, tokens[:, None], cache=self.open(state))
        return logits[:, 0], self.shut(cache)

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        return self.apply(params, batch["tokens"], batch["positions"], batch["segments"])

    def take(self, state: Any, rows: jax.Array) -> Any:
        return self.layout.map(lambda leaf, axis: jnp.take(leaf, rows, axis=axis), state)

    def exchange(self, state: Any, rows: jax.Array) -> Any:
        old, new = self.open(state), self.open(self.take(state, rows))
        return self.shut(new.replace(**{name: getattr(old, name) for name in old.shared}))

    def put(self, state: Any, other: Any, places: jax.Array) -> Any:
        def write(held, axis, new):
            return held.at[(slice(None),) * axis + (places,)].set(new, mode="drop")

        return self.layout.map(write, state, other)

    def said(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return batch["tokens"], batch["segments"] > 0

    def apply(self, params: dict, *args, **kwargs) -> Any:
        with linear_hook(int8_linear):
            return self.module.apply({"params": restack(params)}, *args, **kwargs)

    def open(self, state: Any) -> Any:
        """Returns the cache of a state."""
        return self.layout.join(state) if self.by_layer else state

    def shut(self, cache: Any) -> Any:
        """Returns the state of a cache."""
        return self.layout.split(cache) if self.by_layer else cache


class EncoderDecoderSteps(LanguageSteps):
    """An encoder-decoder: `start` reads the source and makes the cache; the later calls are those of a decoder.

    The prompt is the source; the answer begins after the config's `decoder_start_token_id`.
    """

    prompt_takes_room = False

    def prefill(self, params: dict, batch: Batch, room: int) -> tuple[jax.Array, Any]:
        cache = self.apply(params, batch["tokens"], None, batch["segments"], size=room, method="start")
        return self.step(params, self.shut(cache), self._first(batch)[:, 0])

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        read = batch["tokens"], batch["positions"], batch["segments"]
        target = {name: batch[name] for name in ("decoder_tokens", "decoder_segments")}
        return self.apply(params, *read, **target)

    def said(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        first = self._first(batch)
        return first, jnp.ones_like(first, bool)

    def _first(self, batch: Batch) -> jax.Array:
        return jnp.full((batch["tokens"].shape[0], 1), self.config.decoder_start_token_id, jnp.int32)


class MultimodalSteps(LanguageSteps):
    """The composed model; batches also hold positions, media_index and, if there are images, their arrays."""

    def __init__(self, module: Multimodal, by_layer: bool | None = None):
        super().__init__(module.config.parts["llm"].make(), by_layer)
        self.module = dataclasses.replace(module.config, llm=self.config).make()

    def prepare(self, params: dict) -> dict:
        return {**params, "llm": super().prepare(params["llm"])}

    def prefill(self, params: dict, batch: Batch, room: int) -> tuple[jax.Array, Any]:
        ask = dict(cache=self.config.make_cache(len(batch["tokens"]), room), logits_at=last_token(batch))
        out = self.apply(params, batch, **ask)
        return out.logits[:, 0], self.shut(out.cache)

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        return self.apply(params, batch).logits

    def step(self, params: dict, state: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        logits, cache = self.apply(params, tokens[:, None], self.open(state), method="step")
        return logits[:, 0], self.shut(cache)


class MultimodalEncoderDecoderSteps(MultimodalSteps, EncoderDecoderSteps):
    """The composed model with an encoder-decoder, whose encoder reads text and media."""

    def prefill(self, params: dict, batch: Batch, room: int) -> tuple[jax.Array, Any]:
        cache = self.apply(params, batch, size=room, method="start")
        return self.step(params, self.shut(cache), self._first(batch)[:, 0])


class WhisperSteps(MultimodalSteps):
    """Whisper: the prompt is what its decoder reads first, and the answer continues it.

    Batches also hold the audio: `features` float[B, mel, T] or, if it is encoded already, `encoded` dtype[B, S, E].
    Layer by layer, the head has its own weights: a CPU transposes a large embedding table at every step.
    """

    def __init__(self, module: Whisper, by_layer: bool | None = None):
        self.tied = module.config.llm.tie_word_embeddings
        super().__init__(module, by_layer)
        if self.by_layer and self.tied:
            self.config = dataclasses.replace(self.config, tie_word_embeddings=False)
            self.module = dataclasses.replace(module.config, llm=self.config).make()

    def prepare(self, params: dict) -> dict:
        if self.by_layer and self.tied:
            llm = params["llm"]
            head = {"kernel": jnp.swapaxes(llm["token_embedding"]["embedding"], 0, 1)}
            params = {**params, "llm": {**llm, "lm_head": head}}
        return super().prepare(params)

    def prefill(self, params: dict, batch: Batch, room: int) -> tuple[jax.Array, Any]:
        audio = dict(encoded=batch["encoded"]) if "encoded" in batch else dict(features=batch["features"])
        cache = self.apply(params, **audio, size=room, method="start")
        ask = dict(logits_at=last_token(batch), method="step")
        logits, cache = self.apply(params, batch["tokens"], cache, batch["segments"], **ask)
        return logits[:, 0], self.shut(cache)

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        return self.apply(params, batch["features"], batch["tokens"], batch["positions"], batch["segments"])


def last_token(batch: Batch) -> jax.Array:
    """Returns int[B, 1]: the position of each prompt's last token."""
    return (batch["segments"] > 0).sum(axis=1, keepdims=True) - 1


def unrolled(config: LLMConfig) -> LLMConfig:
    """Returns the config of the same module with its scan over layers unrolled."""
    names = [f.name for f in dataclasses.fields(config) if f.name.startswith("num_") and f.name.endswith("layers")]
    return with_compute(config, scan_unroll=max(getattr(config, name) for name in names), remat="none")


@struct.dataclass
class Matrix:
    """The kernel of heads as a matrix of inputs and outputs.

    values: dtype[inputs, outputs].  shape: the kernel's.
    """

    values: jax.Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, leaf: jax.Array) -> Matrix | jax.Array:
        """Returns a kernel [E, N, H] or [N, H, E] as a matrix, and any other leaf as it is."""
        if leaf.ndim != 3:
            return leaf
        # The longer end is the model's width: inputs of q, k and v, outputs of the map after them.
        inputs = leaf.shape[:1] if leaf.shape[0] >= leaf.shape[2] else leaf.shape[:2]
        return cls(leaf.reshape(math.prod(inputs), -1), leaf.shape)

    def kernel(self) -> jax.Array:
        return self.values.reshape(self.shape)


def unstack(params: dict) -> dict:
    """Returns a copy of the parameters with each stack of layers as a tuple of layers, sharded as the stack was.

    Kernels of heads become `Matrix`.
    """
    return {
        name: _layers(value) if name.endswith(STACK) else unstack(value) if isinstance(value, dict) else value
        for name, value in params.items()
    }


@jax.jit
def _layers(stack: dict) -> tuple[dict, ...]:
    flat, structure = jax.tree.flatten(stack)
    return tuple(jax.tree.unflatten(structure, map(Matrix.of, layer)) for layer in zip(*map(tuple, flat), strict=True))


def restack(tree: Any) -> Any:
    """Undoes `unstack`; free inside a compiled function whose layers are unrolled."""
    if isinstance(tree, tuple):
        return jax.tree.map(lambda *layers: jnp.stack(layers), *map(restack, tree))
    if isinstance(tree, Matrix):
        return tree.kernel()
    return {name: restack(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


@dataclass(frozen=True)
class CacheLayout:
    """The axis of the rows in each leaf of a cache, found by making caches of two sizes.

    Attributes:
        axes: the axis of the rows for each leaf; if it is 1, the layers are on axis 0.
    """

    structure: jax.tree_util.PyTreeDef
    axes: tuple[int, ...]

    @classmethod
    def of(cls, make_cache: Callable[[int], Any]) -> CacheLayout:
        """Traces `make_cache(batch)` -> a cache, and compares the shapes."""
        few, more = (jax.tree.flatten(jax.eval_shape(lambda rows=rows: make_cache(rows))) for rows in (2, 3))
        axes = (
            next(axis for axis, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b)
            for x, y in zip(few[0], more[0], strict=True)
        )
        return cls(few[1], tuple(axes))

    def split(self, cache: Any) -> tuple:
        """Returns the cache's leaves, each stack of layers as a tuple of layers."""
        leaves = zip(jax.tree.leaves(cache), self.axes, strict=True)
        return tuple(tuple(leaf) if axis == 1 else leaf for leaf, axis in leaves)

    def join(self, parts: tuple) -> Any:
        """Undoes `split`."""
        return jax.tree.unflatten(self.structure, [jnp.stack(p) if isinstance(p, tuple) else p for p in parts])

    def map(self, function: Callable[..., jax.Array], cache: Any, *others: Any) -> Any:
        """Applies function(leaf, axis of its rows, leaves of the others) to caches, or to split ones."""
        leaves, structure = jax.tree.flatten(cache)
        # In a split cache the rows are each layer's first axis.
        axes = self.axes if structure == self.structure else (0,) * len(leaves)
        return jax.tree.unflatten(structure, map(function, leaves, axes, *map(jax.tree.leaves, others)))
