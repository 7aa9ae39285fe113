"""What generation needs of a model: read the prompts once, then take a token at a time.

Layers are trained as one scanned stack. A loop that decodes a token at a time would copy each layer's slice of the
parameters, and the whole cache, at every step: on a CPU there are no dot products of slices, and a scan's inputs and
outputs share no memory. So parameters and cache are kept apart, layer by layer, outside the compiled function, are
stacked inside it, and the module unrolls its layers: XLA sees a slice of a concatenation, which is one of its parts,
and neither is ever made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from mllm_jax.generation.quantize import int8_linear
from mllm_jax.layers.compute import with_compute
from mllm_jax.layers.linear import linear_hook
from mllm_jax.llms.protocol import LLMConfig
from mllm_jax.models.multimodal import Multimodal
from mllm_jax.sharding.logical import use_mesh

Batch = dict[str, jax.Array]
STACK = "layers"  # the end of a scanned stack's name among the parameters


def on_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """Makes activations follow the mesh, if there is one."""
    return nullcontext() if mesh is None else use_mesh(mesh)


class Steps(Protocol):
    """A model as a state that is moved on by tokens.

    Batches hold tokens and segments int32[B, S], padding (segment 0) behind each prompt, and what else the model reads.

    Attributes:
        prompt_takes_room: prompt and answer share one row. If not, the state holds prompts of one padded length.
    """

    prompt_takes_room: bool

    def prepare(self, params: dict) -> dict:
        """The parameters in the form in which `prefill` and `step` take them."""

    def prefill(self, params: dict, batch: Batch, room: int) -> tuple[jax.Array, Any]:
        """Reads the prompts: float32[B, V] logits of what follows them, and a state of `room` positions a row."""

    def step(self, params: dict, state: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        """Takes the next token int32[B] of each row: float32[B, V] logits of the one behind it, and the new state."""

    def logits(self, params: dict, batch: Batch) -> jax.Array:
        """float32[B, S, V] of whole rows; of an encoder-decoder, of what its decoder reads."""

    def take(self, state: Any, rows: jax.Array) -> Any:
        """The state with row rows[i] in row i."""

    def put(self, state: Any, other: Any, places: jax.Array) -> Any:
        """The state with row i of another in row places[i]; places past the end are left out."""

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
        by_layer: keep the layers of parameters and cache apart (see above), which holds the layers' parameters a
            second time. None: on a CPU, where it pays.
    """

    prompt_takes_room = True

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
    """The composed model; batches also hold positions, media_index and, where there are pictures, what shows them."""

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
    """The composed model over an encoder-decoder, which reads text and media in its encoder."""

    def prefill(self, params: dict, batch: Batch, room: int) -> tuple[jax.Array, Any]:
        cache = self.apply(params, batch, size=room, method="start")
        return self.step(params, self.shut(cache), self._first(batch)[:, 0])


def last_token(batch: Batch) -> jax.Array:
    """int[B, 1]: where each prompt ends."""
    return (batch["segments"] > 0).sum(axis=1, keepdims=True) - 1


def unrolled(config: LLMConfig) -> LLMConfig:
    """The config of the same module with its scan over layers unrolled."""
    names = [f.name for f in dataclasses.fields(config) if f.name.startswith("num_") and f.name.endswith("layers")]
    return with_compute(config, scan_unroll=max(getattr(config, name) for name in names), remat="none")


def unstack(params: dict) -> dict:
    """Parameters with each stack of layers as a tuple of layers; a copy, sharded as the stack was."""
    return {
        name: _layers(value) if name.endswith(STACK) else unstack(value) if isinstance(value, dict) else value
        for name, value in params.items()
    }


@jax.jit
def _layers(stack: dict) -> tuple[dict, ...]:
    flat, structure = jax.tree.flatten(stack)
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*map(tuple, flat), strict=True))


def restack(tree: Any) -> Any:
    """Undoes `unstack`; inside a compiled function whose layers are unrolled it costs nothing."""
    if isinstance(tree, tuple):
        return jax.tree.map(lambda *layers: jnp.stack(layers), *map(restack, tree))
    return {name: restack(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


@dataclass(frozen=True)
class CacheLayout:
    """Where the rows of a cache lie, found out by making one with more rows.

    Attributes:
        axes: for each leaf the axis of the rows; where they are on axis 1, layers are on axis 0.
    """

    structure: jax.tree_util.PyTreeDef
    axes: tuple[int, ...]

    @classmethod
    def of(cls, make_cache: Callable[[int], Any]) -> CacheLayout:
        """`make_cache(batch)` -> a cache; it is only traced."""
        few, more = (jax.tree.flatten(jax.eval_shape(lambda rows=rows: make_cache(rows))) for rows in (2, 3))
        axes = (
            next(axis for axis, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b)
            for x, y in zip(few[0], more[0], strict=True)
        )
        return cls(few[1], tuple(axes))

    def split(self, cache: Any) -> tuple:
        """The cache's leaves, each stack of layers as a tuple of layers."""
        leaves = zip(jax.tree.leaves(cache), self.axes, strict=True)
        return tuple(tuple(leaf) if axis == 1 else leaf for leaf, axis in leaves)

    def join(self, parts: tuple) -> Any:
        """Undoes `split`."""
        return jax.tree.unflatten(self.structure, [jnp.stack(p) if isinstance(p, tuple) else p for p in parts])

    def map(self, function: Callable[..., jax.Array], cache: Any, *others: Any) -> Any:
        """function(leaf, axis of its rows, leaves of the others) over caches, or over what `split` makes of them."""
        leaves, structure = jax.tree.flatten(cache)
        # Of a split cache each layer's leaf has its rows first.
        axes = self.axes if structure == self.structure else (0,) * len(leaves)
        return jax.tree.unflatten(structure, map(function, leaves, axes, *map(jax.tree.leaves, others)))
