"""The compiled functions of transcription: hear audio, read prompts, write texts, align texts with the audio."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from mllm_jax.generation.beam import Beams, Rule, advance_beams, begin_beams, best_beam
from mllm_jax.generation.decode_step import Batch, WhisperSteps, last_token, on_mesh, restack
from mllm_jax.generation.program import bucket
from mllm_jax.generation.sampling import row_keys
from mllm_jax.generation.timestamp_rules import Rules, Written
from mllm_jax.llms.whisper_decoder import WhisperCache
from mllm_jax.models.whisper import Whisper

# The keys and values of the audio that the decoder's layers attend to, layer by layer or stacked.
Heard = tuple[Any, Any]

T = TypeVar("T")
FEW = 64  # tokens for which a cache has room at first: each step reads the whole cache


@struct.dataclass
class Held:
    """The state of a decoder: its cache without the audio, the audio with fewer rows if they are beams, the rules."""

    cache: Any
    heard: Heard
    written: Written


@struct.dataclass
class SpeechTexts:
    """SpeechTexts that are being written.

    tokens: int32[B, N].  counts: int32[B] tokens with the end.  ended: bool[B].
    logprobs: float32[B], the sums of the tokens' log probabilities among the tokens that may follow.
    """

    tokens: jax.Array
    counts: jax.Array
    ended: jax.Array
    logprobs: jax.Array


class SpeechSteps(WhisperSteps):
    """Whisper's decoder with the rules of its texts.

    Batches hold the prompts, `heard` of `hear` instead of the features, and `timed` bool[B]. Beams of a prompt share
    its audio: the rows of the state follow one another prompt by prompt.
    """

    masked = True

    def __init__(self, module: Whisper, rules: Rules, by_layer: bool | None = None):
        super().__init__(module, by_layer)
        self.rules = rules

    def hear(self, params: dict, features: jax.Array) -> Heard:
        """Encodes features float[B, mel, T] for any number of prefills."""
        cache = self.apply(params, features, size=1, method="start")
        heard = cache.cross_keys, cache.cross_values
        return tuple(map(tuple, heard)) if self.by_layer else heard

    def prefill(self, params: dict, batch: Batch, room: int) -> tuple[jax.Array, Held]:
        logprobs, cache = self.read(params, batch, room)
        written = Written.nothing(batch["timed"])
        return self.rules.allow(logprobs, written), Held(cache, batch["heard"], written)

    def step(self, params: dict, state: Held, tokens: jax.Array) -> tuple[jax.Array, Held]:
        written = self.rules.add(state.written, tokens)
        cache = self._hearing(self.open(state.cache), state.heard)
        logits, cache = self.apply(params, tokens[:, None], cache, method="step")
        logprobs = self.rules.allow(jax.nn.log_softmax(logits[:, 0]), written)
        return logprobs, Held(self.shut(self._deaf(cache)), state.heard, written)

    def take(self, state: Held, rows: jax.Array) -> Held:
        written = jax.tree.map(lambda leaf: leaf[rows], state.written)
        return Held(super().take(state.cache, rows), state.heard, written)

    exchange = take  # the audio is not copied

    def grow(self, state: Held, room: int) -> Held:
        """Returns the state with a cache of `room` positions a row."""
        return state.replace(cache=self.shut(self.open(state.cache).grown(room)))

    def read(self, params: dict, batch: Batch, room: int) -> tuple[jax.Array, Any]:
        """Returns the log probabilities float32[B, V] of the token after each prompt, without rules, and the cache."""
        cache = self._hearing(self.config.make_cache(len(batch["tokens"]), room, 0), batch["heard"])
        ask = dict(logits_at=last_token(batch), method="step")
        logits, cache = self.apply(params, batch["tokens"], cache, batch["segments"], **ask)
        return jax.nn.log_softmax(logits[:, 0]), self.shut(self._deaf(cache))

    def attend(self, params: dict, tokens: jax.Array, heard: Heard, heads: tuple) -> tuple[jax.Array, jax.Array]:
        """Returns the logits float32[B, T, V] after tokens int[B, T], and the heads' attention float32[B, A, T, S]."""
        cache = self._hearing(self.config.make_cache(*tokens.shape, 0), heard)
        logits, _, weights = self.apply(params, tokens, cache, heads=heads, method="step")
        return logits, weights

    def _hearing(self, cache: WhisperCache, heard: Heard) -> WhisperCache:
        keys, values = (restack(part) for part in heard)
        return cache.replace(cross_keys=keys, cross_values=values)

    def _deaf(self, cache: WhisperCache) -> WhisperCache:
        none = cache.keys[..., :0]
        return cache.replace(cross_keys=none, cross_values=none)


_HOW = dict(num_stops=1, repetition_penalty=1.0)
_SIZES = ("room", "new", "beams")
_RULE = Rule(np.float32(1.0), np.asarray(False))


def _in_rooms(begin: Callable[[int], T], advance: Callable[..., tuple[T, Any]], batch: Batch, largest: int) -> T:
    """Writes texts in a cache that grows with them, up to `largest` positions a row.

    Args:
        begin: room -> texts with a token each.
        advance: (texts, most tokens, room) -> texts with more tokens, and whether one has not ended.
    """
    length = batch["tokens"].shape[1]
    room = bucket(length + FEW, largest)
    texts, going = begin(room), True
    while going:
        # A token of a text is in the cache when the next one is written.
        most = largest if room == largest else room - length
        texts, going = advance(texts, np.int32(most), room)
        if room == largest:
            break
        room = min(2 * room, largest)
    return texts


class SpeechProgram:
    """A model's compiled functions, compiled once for each number of rows and padded length of prompts.

    Args:
        heads: the (layer, head) pairs whose attention aligns a text with its audio.
    """

    def __init__(
        self,
        module: Whisper,
        params: dict,
        rules: Rules,
        heads: tuple[tuple[int, int], ...] = (),
        mesh: Mesh | None = None,
        *,
        by_layer: bool | None = None,
    ):
        self.steps, self.mesh, self.heads = SpeechSteps(module, rules, by_layer), mesh, heads
        self.params = self.steps.prepare(params)
        self.hear = jax.jit(self._hear)
        self.probabilities = jax.jit(self._probabilities, static_argnames="wanted")
        self._begin = jax.jit(self._begin_texts, static_argnames=("room", "new"))
        self._advance = jax.jit(self._advance_texts, static_argnames="room")
        self._begin_search = jax.jit(partial(begin_beams, self.steps, mesh, **_HOW), static_argnames=_SIZES)
        self._advance_search = jax.jit(self._advance_beams, static_argnames="room")
        self._best = jax.jit(best_beam)
        self.align = jax.jit(self._align)

    def of(self, params: dict) -> SpeechProgram:
        """Returns the same program with other parameters; both share the compiled functions."""
        other = copy.copy(self)
        other.params = self.steps.prepare(params)
        return other

    def _hear(self, params, features) -> Heard:
        with on_mesh(self.mesh):
            return self.steps.hear(params, features)

    def _probabilities(self, params, batch, *, wanted: tuple[int, ...]) -> jax.Array:
        """Returns float32[B, n], the probabilities of n tokens after each prompt."""
        with on_mesh(self.mesh):
            logprobs, _ = self.steps.read(params, batch, batch["tokens"].shape[1])
        return jnp.exp(logprobs[:, np.asarray(wanted)])

    def write(self, params, batch, limits, temperature, seeds, indices, *, room: int, new: int) -> SpeechTexts:
        """Continues prompts token by token.

        Args:
            limits: int32[B], the most tokens of each text; a row with 0 is not written.
            temperature: float32, 0 is greedy.
            seeds, indices: int32[B], see `row_keys`.
            room: the most positions of a row in the cache.
            new: the most tokens of any text.
        """
        how = limits, temperature, seeds, indices

        def advance(begun, most, room):
            *begun, going = self._advance(params, *begun, *how, most, room=room)
            return begun, going

        return _in_rooms(lambda room: self._begin(params, batch, *how, room=room, new=new), advance, batch, room)[1]

    def _begin_texts(self, params, batch, limits, temperature, seeds, indices, *, room: int, new: int):
        """Reads the prompts and adds the first token of each text; see `write`."""
        with on_mesh(self.mesh):
            logprobs, state = self.steps.prefill(params, batch, room)
            zero = jnp.zeros(limits.shape, jnp.int32)
            none = SpeechTexts(jnp.zeros((len(limits), new), jnp.int32), zero, limits <= 0, zero.astype(jnp.float32))
            return state, self._add(none, logprobs, limits, temperature, row_keys(seeds, indices))

    def _advance_texts(self, params, state, texts, limits, temperature, seeds, indices, most, *, room: int):
        """Adds tokens to texts of at most `most`; returns their state, the texts, and whether one has not ended."""
        keys = row_keys(seeds, indices)

        def going(carry):
            return (~carry[1].ended & (carry[1].counts <= most)).any()

        def body(carry):
            state, texts = carry
            last = jnp.take_along_axis(texts.tokens, jnp.maximum(texts.counts - 1, 0)[:, None], axis=1)[:, 0]
            logprobs, state = self.steps.step(params, state, last)
            return state, self._add(texts, logprobs, limits, temperature, keys)

        with on_mesh(self.mesh):
            state, texts = jax.lax.while_loop(going, body, (self.steps.grow(state, room), texts))
        return state, texts, ~texts.ended.all()

    def _add(self, texts: SpeechTexts, logprobs, limits, temperature, keys) -> SpeechTexts:
        """Adds the next token of each text that has not ended."""

        def draw(logprobs, counts):
            each = jax.vmap(jax.random.fold_in)(keys, counts)
            return jax.vmap(jax.random.categorical)(each, logprobs / temperature).astype(jnp.int32)

        best = lambda logprobs, _: logprobs.argmax(axis=-1).astype(jnp.int32)  # noqa: E731
        token = jax.lax.cond(temperature > 0, draw, best, logprobs, texts.counts)
        place = jnp.where(texts.ended, texts.tokens.shape[1], texts.counts)  # past the end, where writes are dropped
        gained = jnp.take_along_axis(jax.nn.log_softmax(logprobs), token[:, None], axis=1)[:, 0]
        counts = texts.counts + ~texts.ended
        return SpeechTexts(
            tokens=texts.tokens.at[jnp.arange(len(token)), place].set(token, mode="drop"),
            counts=counts,
            ended=texts.ended | (token == self.steps.rules.end) | (counts >= limits),
            logprobs=texts.logprobs + jnp.where(texts.ended, 0.0, gained),
        )

    def search(self, params, batch, limits, *, room: int, new: int, beams: int) -> SpeechTexts:
        """Continues prompts by beam search; see `write`."""
        stops = jnp.full((len(limits), 1), self.steps.rules.end, jnp.int32)
        how = dict(limits=limits, stops=stops, rule=_RULE)

        def begin(room):
            return self._begin_search(params, batch, **how, room=room, new=new, beams=beams)

        def advance(begun, most, room):
            return self._advance_search(params, begun, most, room=room, **how)

        tokens, counts, logprobs = self._best(_in_rooms(begin, advance, batch, room), _RULE)
        return SpeechTexts(tokens, counts, counts >= 0, logprobs)

    def _advance_beams(self, params, begun: Beams, most, *, room: int, **how):
        with on_mesh(self.mesh):
            begun = begun.replace(state=self.steps.grow(begun.state, room))
        return advance_beams(self.steps, self.mesh, params, begun, most, **how, **_HOW)

    def _align(self, params, tokens, heard):
        """Returns the attention float32[B, A, T, S] of tokens int[B, T], and each one's log probability float32[B, T]
        among the tokens of text, given those before it; the first has none."""
        with on_mesh(self.mesh):
            logits, weights = self.steps.attend(params, tokens, heard, self.heads)
        logprobs = jax.nn.log_softmax(logits[:, :-1, : self.steps.rules.end])
        chosen = jnp.take_along_axis(logprobs, jnp.minimum(tokens[:, 1:, None], logprobs.shape[-1] - 1), axis=-1)
        return weights, jnp.pad(chosen[..., 0], [(0, 0), (1, 0)])
