"""`mllm train`: trains an experiment, or continues it, and evaluates it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mllm_jax.checkpoints.run import RunFolder, is_run
from mllm_jax.cli.caches import keep_compiled_programs, lengths_folder
from mllm_jax.cli.config_help import parsed
from mllm_jax.cli.console import refused
from mllm_jax.cli.evaluate import evaluate
from mllm_jax.cli.runs import use_cpu_devices
from mllm_jax.errors import ConfigError
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.training.config import Experiment
from mllm_jax.training.config_file import load_config
from mllm_jax.training.operations.distributed import Hosts, end_together, join, leave
from mllm_jax.training.operations.wandb import Wandb, require_wandb

USAGE = """usage: mllm train CONFIG.py [OPTIONS]

The options are --run-dir DIR, --fresh and every field of the config. Name a config to list them:

  mllm train configs/quickstart.py --help

A run's folder may replace its config: mllm train runs/quickstart continues that run."""


@dataclass(frozen=True)
class Train:
    """Trains an experiment, or continues it, then evaluates it.

    Attributes:
        run_dir: the folder of the run; default: runs/<config name>.
        fresh: start over, removing what an earlier run left in the folder.
        hosts: the processes that train together; see launch/README.md.
        hang_seconds: if no step ends for this long, print the stack of every thread and exit; 0: never.
        profile: write a trace of a few steps into the run folder.
        self_contained: copy the weights of `Pretrained` parts into the run folder.
        wandb: a project of Weights & Biases that receives the metrics too; pip install 'mllm-jax[wandb]'.
        compile_cache: keep compiled programs in the user's cache folder for the next start.
    """

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    fresh: bool = False
    hosts: Hosts = Hosts()
    hang_seconds: float = 1800.0
    profile: bool = False
    self_contained: bool = False
    wandb: str | None = None
    compile_cache: bool = True


def run(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help", "--help-all"):
        print(USAGE)
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(
            " ".join(["mllm train", *arguments[:1], "without a config"]),
            "mllm train configs/quickstart.py",
            "name a config file, before any option",
        )
    if any(argument.partition("=")[0] == "--wandb" for argument in arguments):
        require_wandb()  # checked before anything is loaded
    default = _default(Path(arguments[0]))
    if (options := parsed("train", default, arguments)) is None:
        return 0
    use_cpu_devices(options.experiment, options.hosts, say=True)
    if options.compile_cache:
        keep_compiled_programs()
    if not join(options.hosts):
        return _train(options)
    return end_together(lambda: _train(options), refused)


def _default(path: Path) -> Train:
    """Returns the default options for a config file, or for a run's folder, which holds its config."""
    if is_run(path):
        return Train(RunFolder(path).experiment(), run_dir=path)
    return Train(load_config(path))


def _train(options: Train) -> int:
    import jax

    from mllm_jax.evaluation.report import write_report
    from mllm_jax.training.loop import train
    from mllm_jax.training.operations.stopping import Interrupted, heed_no_notice

    experiment = options.experiment
    folder = RunFolder(options.run_dir or Path("runs") / experiment.name)
    done = not options.fresh and is_run(folder.path) and not folder.unfinished(experiment)
    try:
        train(
            experiment,
            folder.path,
            fresh=options.fresh,
            cache_dir=lengths_folder(),
            hang_seconds=options.hang_seconds,
            profile=options.profile,
            self_contained=options.self_contained,
            sinks=() if options.wandb is None else (Wandb(options.wandb),),
        )
    except Interrupted as stop:  # on all processes after the same step
        print(stop, file=sys.stderr)
        leave()
        return 130
    heed_no_notice()
    first = jax.process_index() == 0
    if done and first:
        print(f"nothing to train: all stages of {folder.path} are done")
    if experiment.evaluation:
        evaluate(folder.path)
    elif first:
        print(write_report(folder.path))
    if first:
        print(f"next: {_next(experiment, folder.path)}")
    return 0


EXAMPLES = {"image": "--image cat.png ", "video": "--video cat.mp4 ", "audio": "--audio cat.wav "}


def _next(experiment: Experiment, run: Path) -> str:
    """Suggests a use of the trained model: a command, or a config that begins with it."""
    if isinstance(experiment.model, DualEncoderConfig):
        return f'mllm embed {run} --images FOLDER --text "a cat" --out vectors.npz'
    if isinstance(experiment.model, MultimodalConfig):
        asked = next((EXAMPLES[modality] for modality in EXAMPLES if modality in experiment.model.inputs), "")
        return f'mllm generate {run} {asked}"What is this?"'
    return f"a config that begins with it: Pretrained(part, {str(run)!r}, stage={experiment.stages[-1].name!r})"
