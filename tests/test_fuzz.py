"""Bad input of every kind is refused in words or read; `python tests/fuzz.py --cases 10000` runs more of it."""

from __future__ import annotations

import fuzz
import pytest

# Longer than `python tests/fuzz.py` waits: this process has run a thousand tests, whose garbage it collects meanwhile.
LIMITS = (30.0, 240.0)


@pytest.mark.parametrize("kind", fuzz.kinds())
def test_nothing_is_unhandled(kind):
    result = fuzz.run(kind, 300, limits=LIMITS)
    assert not result.faults, "\n".join(result.faults[: fuzz.SHOWN])
    assert result.counts["refused"] > 100 and result.counts.total() == 300, result.counts
