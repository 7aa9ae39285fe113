"""Speed: seconds, tokens and FLOPs of the last steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class Meter:
    """Speed over the last steps, without the first step, which compiles, and without pauses.

    Args:
        flops: model FLOPs of a step, over all devices.
        devices: number of devices.
        peak: FLOP/s of one device, or None if unknown.
        window: number of steps.
        clock: seconds, monotonic; tests pass their own.
    """

    def __init__(
        self,
        flops: int,
        devices: int = 1,
        peak: float | None = None,
        window: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.flops, self.devices, self.peak, self._clock = flops, devices, peak, clock
        self._mark: float | None = None
        self._taken: deque[tuple[float, int]] = deque(maxlen=window)

    def tick(self, tokens: int) -> None:
        """Counts a step that has ended, of a batch of `tokens` over all devices."""
        now = self._clock()
        if self._mark is not None:
            self._taken.append((now - self._mark, tokens))
        self._mark = now

    def pause(self) -> None:
        """Leaves out the time until the next step has ended, for a validation or an evaluation before it."""
        self._mark = None

    @property
    def tokens_rate(self) -> float | None:
        """Tokens a second over all devices; None before it is known."""
        return self.timing().get("tokens_per_second")

    def timing(self) -> dict[str, float]:
        """Returns the figures of a metrics line; {} before they are known."""
        seconds = sum(each for each, _ in self._taken)
        if seconds <= 0:
            return {}
        tokens, flops = sum(n for _, n in self._taken) / seconds, self.flops * len(self._taken) / seconds
        found = {
            "seconds_per_step": seconds / len(self._taken),
            "tokens_per_second": tokens,
            "flops_per_second": flops,
            "tokens_per_second_per_device": tokens / self.devices,
            "flops_per_second_per_device": flops / self.devices,
        }
        return found | ({"mfu": flops / self.devices / self.peak} if self.peak else {})
