"""The rules of the next token in a text of Whisper, as in transformers: some never, times in pairs and in order.

Times come in pairs, the end of a segment and the beginning of the next; the first one is alone, and the last one may
be. The rules depend on the last two tokens and on the latest time only, so a decoding loop carries just these.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

NONE = -1  # no time yet


@struct.dataclass
class Written:
    """The state of each text on which the rules depend.

    count: int32[B] tokens.  last, before: bool[B], whether the last token and the one before it are times; before is
    True if there is none.  latest: int32[B], the latest time, or NONE.  timed: bool[B], whether the text has times.
    """

    count: jax.Array
    last: jax.Array
    before: jax.Array
    latest: jax.Array
    timed: jax.Array

    @classmethod
    def nothing(cls, timed: jax.Array) -> Written:
        """Returns empty texts."""
        zero = jnp.zeros(timed.shape, jnp.int32)
        return cls(zero, zero > 0, zero == 0, zero + NONE, timed)


@dataclass(frozen=True)
class Rules:
    """The rules of one model.

    Attributes:
        vocab_size: number of tokens.
        end: the token that ends a text; those before it are text.
        no_times: the token of a prompt for texts without times; those after it are times. None: the model has none.
        latest_first: the most steps from 0 of the first time.
        suppressed, suppressed_first: tokens that a text does not contain, and does not begin with.
    """

    vocab_size: int
    end: int
    no_times: int | None = None
    latest_first: int | None = None
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()

    @property
    def times(self) -> int:
        """The token of the time 0; the vocabulary's size if the model has no times."""
        return self.vocab_size if self.no_times is None else self.no_times + 1

    def add(self, written: Written, tokens: jax.Array) -> Written:
        """Returns the texts with a token int[B] more each."""
        is_time = tokens >= self.times
        return written.replace(
            count=written.count + 1,
            last=is_time,
            before=written.last | (written.count == 0),
            latest=jnp.where(is_time, tokens, written.latest),
        )

    def allow(self, logprobs: jax.Array, written: Written) -> jax.Array:
        """Returns float32[B, V] with -inf for tokens that may not follow."""
        ids = jnp.arange(self.vocab_size)
        is_time = ids >= self.times
        first = (written.count == 0)[:, None]
        forbidden = self._among(self.suppressed) | first & self._among(self.suppressed_first)
        # A single time is followed by another time or the end, a pair by text.
        last, before = written.last[:, None], written.before[:, None]
        wrong = (last & before & is_time) | (last & ~before & (ids < self.end))
        # Times do not decrease, and a time is not repeated except in a pair.
        least = jnp.where(last & ~before, written.latest[:, None], written.latest[:, None] + 1)
        wrong |= is_time & (ids < least) | first & ~is_time
        if self.no_times is not None:
            wrong |= ids == self.no_times
            if self.latest_first is not None:
                wrong |= first & (ids > self.times + self.latest_first)
        timed = written.timed[:, None]
        logprobs = jnp.where(forbidden | timed & wrong, -jnp.inf, logprobs)
        if self.no_times is None:
            return logprobs
        # A time follows if all times together are likelier than each other token.
        likely = jax.nn.logsumexp(logprobs[:, self.times :], axis=1) > logprobs[:, : self.times].max(axis=1)
        return jnp.where(timed & likely[:, None] & ~is_time, -jnp.inf, logprobs)

    def _among(self, tokens: tuple[int, ...]) -> jax.Array:
        """Returns bool[V]: True for these tokens."""
        found = np.zeros(self.vocab_size, bool)
        found[[token for token in tokens if 0 <= token < self.vocab_size]] = True
        return jnp.asarray(found)
