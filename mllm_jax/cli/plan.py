"""`mllm plan`: compiles a stage's step for a TPU slice and reports its cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mllm_jax.cli.config_help import parsed
from mllm_jax.cli.console import console
from mllm_jax.errors import ConfigError
from mllm_jax.training.config import Experiment
from mllm_jax.training.config_file import load_config

USAGE = """usage: mllm plan CONFIG.py --topology v5e-256 [OPTIONS]

Compiles a stage's training step for a TPU slice, without a TPU, data or weights, and prints memory, FLOPs, collectives
and a roofline. The options are --topology (v4-, v5e-, v5p-, v6e-, v7x- slices, 2xv5e-256 for several, 8xh100 for an
estimate on GPUs), --stage NAME, --json FILE, --search N, and every field of the config, such as --mesh.data 1
--mesh.fsdp -1. Name a config to list them:

  mllm plan configs/llava15_7b.py --help"""


@dataclass(frozen=True)
class PlanCommand:
    """Compiles a stage's step for a TPU slice on this machine and reports its cost.

    Attributes:
        topology: such as v5e-256, v5p-128 or 2xv6e-256; 8xh100: an estimate without compiling.
        stage: name of the stage; default: the last.
        json: a file for all figures.
        search: number of meshes, remat policies and numbers of pieces to try; the best are printed.
    """

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    topology: str
    stage: str | None = None
    json: Path | None = None
    search: int = 0

    def __post_init__(self):
        if self.search < 0:
            raise ConfigError(f"search {self.search}", "0 or more", "change --search")


def run(arguments: list[str]) -> int:
    """Runs the command.

    Returns:
        the exit code: 0 if the step fits or may fit, 1 if it does not.
    """
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        print(USAGE)
        return 0
    if arguments[0].startswith("-"):
        raise ConfigError(
            f"mllm plan {arguments[0]} without a config",
            "mllm plan configs/llava15_7b.py --topology v5e-256",
            "name a config file, before any option",
        )
    default = PlanCommand(load_config(Path(arguments[0])), tyro.MISSING)
    if (options := parsed("plan", default, arguments)) is None:
        return 0

    import jax

    jax.config.update("jax_platforms", "cpu")  # compiling needs no device

    from mllm_jax.planning.plan import make_plan
    from mllm_jax.planning.plan_report import show, show_search
    from mllm_jax.planning.search import search
    from mllm_jax.planning.topologies import topology

    where = topology(options.topology)
    if options.search:
        best, tried = search(options.experiment, where, options.stage, limit=options.search)
        show_search(best[:5], tried, console())
        plan = best[0] if best else tried[-1]
    else:
        plan = make_plan(options.experiment, where, options.stage)
    show(plan, console())
    if options.json is not None:
        plan.write(options.json)
    return 0 if plan.fits is not False else 1
