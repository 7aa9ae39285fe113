"""Speed: tokens and FLOPs a second of the last steps."""

from __future__ import annotations

import time


class Meter:
    """Speed over the last steps; the first step, which compiles, is left out."""

    def __init__(self, flops: int, window: int = 50):
        self.flops, self.window = flops, window
        self.marks: list[tuple[float, int]] = []
        self.tokens_rate: float | None = None
        self.flops_rate: float | None = None

    def tick(self, tokens: int) -> None:
        self.marks = [*self.marks[-self.window :], (time.monotonic(), tokens)]
        if len(self.marks) > 1:
            seconds = self.marks[-1][0] - self.marks[0][0]
            self.tokens_rate = sum(tokens for _, tokens in self.marks[1:]) / seconds
            self.flops_rate = self.flops * (len(self.marks) - 1) / seconds

    def timing(self) -> dict[str, float]:
        if self.tokens_rate is None:
            return {}
        return {"tokens_per_second": self.tokens_rate, "flops_per_second": self.flops_rate}
