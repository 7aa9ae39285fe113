"""Feeds the library bad input of several kinds: `python tests/fuzz.py --cases 10000 --kinds config safetensors`.

Prints how many cases of each kind were refused (an MllmError), accepted and unhandled (any other exception, or more
than LIMIT seconds of work, or WAIT on the clock), with the first unhandled ones, and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# Seconds for one case: of work, which a busy machine does not lengthen, and on the clock.
LIMIT, WAIT = 5.0, 60.0
TIMERS = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
SHOWN = 5
HERE = Path(__file__).parent


class TooLong(BaseException):
    """A case took more than its seconds. It is no Exception, so that no library catches it."""


@dataclass
class Result:
    """The outcomes of one kind's cases."""

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def kinds() -> list[str]:
    """Returns the kinds: the files in tests/fuzzing."""
    return sorted(path.stem for path in (HERE / "fuzzing").glob("*.py") if not path.stem.startswith("_"))


def run(kind: str, cases: int, seed: int = 0, limits: tuple[float, float] = (LIMIT, WAIT)) -> Result:
    """Runs cases of one kind; equal seeds give equal cases.

    Args:
        limits: seconds for one case, of work (by all threads of the process) and on the clock.
    """
    result, begun = Result(), time.perf_counter()
    before = {number: signal.signal(number, _stop) for number in TIMERS.values()}
    try:
        for description, case in importlib.import_module(f"fuzzing.{kind}").cases(np.random.default_rng(seed), cases):
            outcome, fault = _outcome(case, limits)
            result.counts[outcome] += 1
            if fault:
                # In ASCII: a test's report is UTF-8, which cannot encode half a character.
                result.faults.append(ascii_of(f"{description}\n{fault}"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    result.seconds = time.perf_counter() - begun
    return result


def ascii_of(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def _outcome(case: Callable[[], object], limits: tuple[float, float]) -> tuple[str, str]:
    """Returns the outcome of a case, and the last calls of an unhandled one."""
    from mllm_jax.errors import MllmError

    _armed.append(limits)
    for timer, seconds in zip(TIMERS, limits, strict=True):
        signal.setitimer(timer, seconds)
    try:
        case()
        return "accepted", ""
    except MllmError:
        return "refused", ""
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "unhandled", traceback.format_exc(limit=-6)
    finally:
        _armed.clear()  # a later signal stops nothing
        for timer in TIMERS:
            signal.setitimer(timer, 0)


_armed: list[tuple[float, float]] = []  # the limits of the case that is running


def _stop(*_) -> None:
    if _armed:
        work, clock = _armed[-1]
        raise TooLong(f"more than {work} s of work or {clock} s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--kinds", nargs="+", default=kinds(), choices=kinds())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limits", type=float, nargs=2, default=(LIMIT, WAIT), metavar=("WORK", "CLOCK"))
    parser.add_argument("--shown", type=int, default=SHOWN, help="how many unhandled cases to print")
    asked = parser.parse_args(arguments)
    unhandled = 0
    print(f"{'kind':<14}{'cases':>8}{'refused':>9}{'accepted':>10}{'unhandled':>11}{'s':>8}")
    for kind in asked.kinds:
        result = run(kind, asked.cases, asked.seed, tuple(asked.limits))
        counts = result.counts
        columns = f"{counts['refused']:>9}{counts['accepted']:>10}{counts['unhandled']:>11}{result.seconds:>8.0f}"
        print(f"{kind:<14}{counts.total():>8}{columns}", flush=True)
        print(*result.faults[: asked.shown], sep="\n", end="\n" if result.faults else "", file=sys.stderr)
        unhandled += counts["unhandled"]
    return int(unhandled > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())
