"""`mllm train`: trains an experiment, or goes on with it, and evaluates it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mllm_jax.cli.console import refused
from mllm_jax.cli.evaluate import evaluate
from mllm_jax.cli.runs import use_cpu_devices
from mllm_jax.errors import ConfigError
from mllm_jax.training.config import Experiment
from mllm_jax.training.config_file import load_config
from mllm_jax.training.distributed import Hosts, end_together, join, leave

USAGE = """usage: mllm train CONFIG.py [OPTIONS]

The options are --run-dir DIR, --fresh and every field of the config. Name a config to list them:

  mllm train configs/quickstart.py --help"""


@dataclass(frozen=True)
class Train:
    """Trains an experiment, or goes on with it, then evaluates it.

    Attributes:
        run_dir: where everything of the run lies; runs/<config name> if not given.
        fresh: start over, removing what an earlier run left in the folder.
        hosts: where several processes train together; see launch/README.md.
        hang_seconds: when no step ends for so long, the stacks of all threads are told and the process ends; 0: never.
        profile: write a trace of a few steps into the run folder.
        compile_cache: keep compiled programs in the user's cache folder, so that a restart does not compile again.
    """

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    fresh: bool = False
    hosts: Hosts = Hosts()
    hang_seconds: float = 1800.0
    profile: bool = False
    compile_cache: bool = True


def run(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(
            " ".join(["mllm train", *arguments[:1], "without a config"]),
            "mllm train configs/quickstart.py",
            "name a config file, before any option",
        )
    path = Path(arguments[0])
    default = Train(load_config(path))
    options = tyro.cli(
        Train, args=arguments[1:], default=default, prog=f"mllm train {path}", config=(tyro.conf.AvoidSubcommands,)
    )
    use_cpu_devices(options.experiment)
    if options.compile_cache:
        from mllm_jax.training.compilation import keep_compiled

        keep_compiled()
    if not join(options.hosts):
        return _train(options)
    return end_together(lambda: _train(options), refused)


def _train(options: Train) -> int:
    from mllm_jax.training.loop import Interrupted, train
    from mllm_jax.training.stopping import heed_no_notice

    experiment = options.experiment
    try:
        folder = train(
            experiment,
            options.run_dir or Path("runs") / experiment.name,
            fresh=options.fresh,
            cache_dir=_cache_dir(),
            hang_seconds=options.hang_seconds,
            profile=options.profile,
        )
    except Interrupted as stop:  # on all processes after the same step
        print(stop, file=sys.stderr)
        leave()
        return 130
    heed_no_notice()
    if experiment.evaluation is not None:
        evaluate(folder.path)
    return 0


def _cache_dir() -> Path:
    """Where measured lengths are kept: beside the data."""
    return Path(os.environ.get("MLLM_DATA_DIR") or Path.home() / "tensorflow_datasets") / "mllm_jax_lengths"
