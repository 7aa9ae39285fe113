"""`mllm data`: examines a config's data before training. A subcommand is one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mllm_jax.cli.config_help import parsed
from mllm_jax.cli.console import console
from mllm_jax.errors import ConfigError
from mllm_jax.training.config import Experiment
from mllm_jax.training.config_file import load_config

if TYPE_CHECKING:
    from mllm_jax.data.suggest import Candidate
    from mllm_jax.training.suggest_rows import Suggestion

USAGE = """usage: mllm data suggest CONFIG.py [--sample 1000] [--stage NAME]

Measures a sample of each stage's data and proposes `length`, `rows` and `slots`: how full rows of some lengths become,
what share of the examples they shorten or refuse, and the line to paste into the config. Nothing is trained."""


@dataclass(frozen=True)
class Suggest:
    """Proposes the rows of each stage from a sample of its data.

    Attributes:
        sample: number of examples of each stage to measure.
        stage: only this stage.
    """

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    sample: int = 1000
    stage: str | None = None

    def __post_init__(self):
        if self.sample < 1:
            raise ConfigError(f"sample {self.sample}", "at least 1", "change --sample")
        names = [stage.name for stage in self.experiment.stages]
        if self.stage is not None and self.stage not in names:
            raise ConfigError(f"stage {self.stage!r}", f"one of {', '.join(names)}", "change --stage")


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        print(USAGE)
        return 0
    name, *rest = arguments
    if name not in SUBCOMMANDS:
        raise ConfigError(f"mllm data {name}", f"one of {', '.join(SUBCOMMANDS)}", "see `mllm data --help`")
    if not rest or rest[0].startswith("-"):
        if {"-h", "--help"} & set(rest):
            print(USAGE)
            return 0
        raise ConfigError(
            f"mllm data {name} without a config", f"mllm data {name} CONFIG.py", "name a config, before any option"
        )
    return SUBCOMMANDS[name](rest)


def suggest(arguments: Sequence[str]) -> int:
    """Prints the proposals of `mllm data suggest`."""
    options = parsed("data suggest", Suggest(load_config(Path(arguments[0]))), arguments)
    if options is None:
        return 0
    from dataclasses import replace

    from mllm_jax.training.suggest_rows import suggest as suggestions

    experiment = options.experiment
    numbers = {stage.name: number for number, stage in enumerate(experiment.stages)}
    if options.stage is not None:
        experiment = replace(experiment, stages=(experiment.stages[numbers[options.stage]],))
    for found in suggestions(experiment, options.sample):
        _show(found, numbers[found.stage])
    return 0


SUBCOMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"suggest": suggest}


def _show(found: Suggestion, number: int) -> None:
    from rich.table import Table

    from mllm_jax.data.units import in_words

    print(f"stage {found.stage}: {found.examples:,} examples measured")
    if found.bad:
        print(f"  {found.bad:,} more cannot be used, the first: {found.reason}")
    table = Table()
    for name in ("length", "slots", "rows filled", "shortened", "refused", ""):
        table.add_column(name, justify="left" if name in ("slots", "") else "right")

    def add(each: Candidate, mark: str) -> None:
        shares = (f"{100 * share:.1f} %" for share in (each.fill, each.shortened, each.refused))
        table.add_row(f"{each.length:,}", in_words(each.slots, found.unit), *shares, mark)

    add(found.now, "now")
    for each in found.found:
        add(each, "proposed" if each is found.proposed else "")
    console().print(table)
    length, rows, slots = found.proposed.length, found.rows, dict(found.proposed.slots)
    print(f"in the config:       Mixture(..., rows={rows}, length={length}, slots={slots})")
    typed = [f"--stages.{number}.data.rows {rows}", f"--stages.{number}.data.length {length}"]
    print(f"on the command line: {' '.join(typed)}")
    print()
