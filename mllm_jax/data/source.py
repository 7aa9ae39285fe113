"""The interface of every source: examples by index."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from mllm_jax.data.message import Example


@runtime_checkable
class Source(Protocol):
    """Random access to examples: a pure function of the source's settings and an index.

    A source that has the attribute `sendable = True` is pickled for processes that measure it; for any other, its
    config is, and each process builds it.
    """

    name: str

    def __len__(self) -> int: ...

    def example(self, index: int) -> Example:
        """Returns example `index`. Its media are decoded or drawn when they are read, not here."""
        ...

    def fingerprint(self) -> str:
        """Returns a short text that changes whenever the data or the questions change."""
        ...
