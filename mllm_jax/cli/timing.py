"""The time that a command spends on loading, compiling and answering."""

from __future__ import annotations

import time


class Timing:
    """Seconds of loading, compiling and answering.

    Make it before the model is loaded, and call `loaded` after that.
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
        """Describes the time to write `tokens` tokens since the model was loaded."""
        answering = time.monotonic() - self._since - self._compiling
        return (
            f"loading {self._since - self._began:.1f} s, compiling {self._compiling:.1f} s, "
            f"{tokens} tokens in {answering:.1f} s: {tokens / answering:.1f} tokens/s"
        )
