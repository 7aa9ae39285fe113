"""Where the time of a command that answers went."""

from __future__ import annotations

import time


class Timing:
    """Seconds of loading, of compiling and of answering.

    Made before the model is loaded; `loaded` is called after that.
    """

    def __init__(self):
        import jax

        self._compiling = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._began = self._since = time.monotonic()

    def _listen(self, event: str, seconds: float, **_: object) -> None:
        if event.endswith("/backend_compile_duration"):
            self._compiling += seconds

    def loaded(self) -> None:
        self._since, self._compiling = time.monotonic(), 0.0

    def summary(self, tokens: int) -> str:
        """Says what it took to write `tokens` tokens since the model was loaded."""
        answering = time.monotonic() - self._since - self._compiling
        return (
            f"loading {self._since - self._began:.1f} s, compiling {self._compiling:.1f} s, "
            f"{tokens} tokens in {answering:.1f} s: {tokens / answering:.1f} tokens/s"
        )
