"""The cost of each test file: CPU seconds of the process that runs it and of the processes that it starts."""

from __future__ import annotations

import resource
from collections import Counter
from pathlib import Path

import pytest

BUDGET = 90.0  # CPU seconds of a file
SLOW = 15.0  # CPU seconds of a file from which it belongs in slow.txt
LISTED = Path(__file__).with_name("slow.txt")
SHOWN = 5
NAME = "cpu_seconds"


def _spent() -> float:
    """Returns the CPU seconds of this process and of its children that have ended."""
    found = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def slow_files() -> list[str]:
    """Returns the files that `pytest -m "not slow"` leaves out as a whole."""
    return [line for line in LISTED.read_text().splitlines() if not line.startswith("#")]


class Costs:
    """Measures every test in the process that runs it; the session's first process prints the sums by file.

    Fixtures count for the first test that uses them. CPU time depends less than wall time on other processes. A file
    over its budget is printed and does not fail: no test may depend on a clock.
    """

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)  # before -m selects
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Marks all tests of a listed file."""
        listed = set(slow_files())
        for item in items:
            if item.nodeid.split("::")[0] in listed:
                item.add_marker("slow")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self.before = _spent()
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> None:
        """Adds the seconds of a test's setup, call and teardown to the report of each, also for pytest-xdist."""
        now = _spent()
        item.user_properties[:] = [pair for pair in item.user_properties if pair[0] != NAME]
        item.user_properties.append((NAME, now - self.before))
        self.before = now

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.files[report.nodeid.split("::")[0]] += dict(report.user_properties).get(NAME, 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        if hasattr(config, "workerinput") or not self.files:
            return
        total = sum(self.files.values())
        over = sum(cost > BUDGET for cost in self.files.values())
        show = terminalreporter.write_line
        terminalreporter.section("costs")
        show(f"{total:.0f} CPU seconds in {len(self.files)} files, {over} of them over the budget of {BUDGET:.0f}")
        for name, cost in self.files.most_common(None if config.option.verbose else SHOWN):
            show(f"{cost:8.1f}  {name}")
        listed = set(slow_files())
        for name, cost in sorted(self.files.items()):
            if cost > 2 * SLOW and name not in listed:  # beside other work a file costs up to twice as much
                show(f"{name} took {cost:.0f} CPU seconds; above {SLOW:.0f} it belongs in {LISTED.name}")
