"""Line charts as inline SVG: small, static, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 12, 26
COLUMNS = 300  # buckets of points over the whole width: with more, two share a pixel


@dataclass(frozen=True)
class Line:
    """A curve: steps, values (NaN and infinity leave a gap) and the class that the style sheet colours."""

    steps: Sequence[float]
    values: Sequence[float]
    css: str


def ema(values: Sequence[float], span: float) -> list[float]:
    """Computes an exponential moving average over about `span` finite points, corrected for its start."""
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    smooth = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        smooth.append(total / weight if weight else math.nan)
    return smooth


def chart(label: str, lines: Sequence[Line], *, log: bool = False, marks: Sequence[tuple[float, str]] = ()) -> str:
    """Returns an SVG of curves over steps.

    Args:
        label: description of the chart, for screen readers.
        lines: the curves, drawn in this order.
        log: whether the value axis is logarithmic; only for values above zero.
        marks: (step, name) of vertical rules, such as the beginnings of stages.
    """
    steps = [x for line in lines for x in line.steps] + [x for x, _ in marks]
    values = [y for line in lines for y in line.values if math.isfinite(y)]
    first, last = _range(steps)
    low, high = _range([math.log10(y) for y in values] if log else values)
    margin = (high - low) * 0.05
    low, high = low - margin, high + margin

    def across(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    rows = _rows([(across(step), name) for step, name in marks])
    top = TOP + 11 * (max(rows) + 1) if rows else TOP

    def up(value: float) -> float:
        level = math.log10(value) if log else value
        return top + (high - level) / (high - low) * (HEIGHT - top - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for value in _log_ticks(low, high) if log else _ticks(low, high, 5):
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{_short(value)}</text>')
    for step in _ticks(first, last, 6):
        text = f'<text class="tick" x="{across(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_short(step)}</text>'
        parts.append(text)
    for (step, name), row in zip(marks, rows, strict=True):
        x, y = across(step), TOP + 11 * row
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x + 3:.1f}" y="{y}">{escape(name)}</text>')
    for line in lines:
        points = list(zip(line.steps, line.values, strict=True))
        for piece in _pieces(points):
            drawn = [(across(x), up(y)) for x, y in _thinned(piece, last - first)]
            if len(drawn) == 1:
                parts.append(f'<circle class="{line.css} dot" cx="{drawn[0][0]:.1f}" cy="{drawn[0][1]:.1f}" r="2.5"/>')
            else:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
                parts.append(f'<polyline class="{line.css}" points="{path}"/>')
    return "".join([*parts, "</svg>"])


def _rows(labels: Sequence[tuple[float, str]]) -> list[int]:
    """Returns each label's row above the curves, so that labels do not overlap; their x coordinates ascend."""
    ends: list[float] = []
    rows = []
    for x, name in labels:
        row = next((row for row, end in enumerate(ends) if end < x), len(ends))
        ends[row : row + 1] = [x + 6.5 * len(name) + 8]  # 6.5: a generous width of one letter of the tick font
        rows.append(row)
    return rows


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:  # a flat curve needs an axis with some height
        pad = abs(low) * 0.1 or 0.5
        return low - pad, high + pad
    return low, high


def _pieces(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Splits a curve at its non-finite values."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _thinned(points: list[tuple[float, float]], width: float) -> list[tuple[float, float]]:
    """Returns the lowest and the highest point of each of COLUMNS buckets over `width` steps, so that spikes stay."""
    columns = max(8, round(COLUMNS * (points[-1][0] - points[0][0]) / width))
    if len(points) <= 2 * columns:
        return points
    size = math.ceil(len(points) / columns)
    kept = [points[0]]
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return [*kept, points[-1]]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Returns at most `most` round numbers within [low, high]."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor >= rough)
    return [float(f"{n * step:.12g}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers between two powers of ten, given by their exponents; fewer a decade for a larger range."""
    if high - low < 0.7:
        return _ticks(10**low, 10**high, 5)
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    stride = max(1, math.ceil((high - low) / 6))
    exponents = range(math.floor(low), math.ceil(high) + 1, stride)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _short(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):g}{suffix}"
    return f"{value:.4g}"
