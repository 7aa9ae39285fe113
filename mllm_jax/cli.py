"""The command `mllm`: train, evaluate and question a model."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import runpy
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mllm_jax.errors import ConfigError, MllmError
from mllm_jax.inference.sampling import Sampling
from mllm_jax.training.config import Experiment

USAGE = """mllm: multimodal LLMs in JAX

  mllm train CONFIG.py [--run-dir DIR] [--fresh] [--stages.0.steps 50 ...]  train, evaluate, write report.html
  mllm evaluate RUN [--tasks naming yes_no ...]                           a table, results.json, report.html
  mllm generate RUN --image a.png "What is this?"                         text

`mllm COMMAND --help` lists a command's options."""

TRAIN_USAGE = """usage: mllm train CONFIG.py [OPTIONS]

The options are --run-dir DIR, --fresh and every field of the config. Name a config to list them:

  mllm train configs/quickstart.py --help"""

OneName = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Train:
    """Trains an experiment, or goes on with it, then evaluates it.

    Attributes:
        run_dir: where everything of the run lies; runs/<config name> if not given.
        fresh: start over, removing what an earlier run left in the folder.
    """

    experiment: Annotated[Experiment, OneName]
    run_dir: Path | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Evaluate:
    """Scores a run by its own config's evaluation.

    Attributes:
        run: a folder that `mllm train` made.
        tasks: only these tasks.
    """

    run: tyro.conf.Positional[Path]
    tasks: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Generate:
    """Answers a question, about pictures if any are given.

    Attributes:
        run: a folder that `mllm train` made.
        question: what to ask.
        image: picture files, in the order in which the question speaks of them.
        max_new_tokens: where an answer is cut off.
    """

    run: tyro.conf.Positional[Path]
    question: tyro.conf.Positional[str]
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    max_new_tokens: int = 32
    sampling: Annotated[Sampling, OneName] = Sampling()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {self.max_new_tokens}", "at least 1", "change --max-new-tokens")


def load_config(path: Path) -> Experiment:
    """The `Experiment` that `config()` of a Python file returns.

    Raises:
        ConfigError: no such file, no `config()` in it, or a config with a key that does not exist.
    """
    if not path.is_file():
        raise ConfigError(f"no config at {path}", "a Python file with `def config() -> Experiment`", "check the path")
    try:
        make = runpy.run_path(str(path)).get("config")
        if not callable(make):
            raise ConfigError(f"{path} without config()", "`def config() -> Experiment` in it", "add the function")
        experiment = make()
    except MllmError:
        raise
    except Exception as error:
        raise _config_error(path, error) from error
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"{path}: config() returns {type(experiment).__name__}", "an Experiment", "mend the file")
    return experiment


def _config_error(path: Path, error: Exception) -> ConfigError:
    """What went wrong in a config and at which of its lines; of an unknown key also the nearest that exists."""
    frames = list(traceback.walk_tb(error.__traceback__))
    lines = [line for frame, line in frames if frame.f_code.co_filename == str(path)]
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    unknown = re.match(r"(\S+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unknown and (fields := _fields(unknown[1], frames)):
        name, key = unknown.groups()
        near = difflib.get_close_matches(key, fields, n=1)
        todo = f"did you mean {near[0]!r}?" if near else "remove it"
        return ConfigError(f"{where}: {name} has no field {key!r}", f"some of {', '.join(fields)}", todo)
    given = f"{where}: {type(error).__name__}: {error}"
    return ConfigError(given, "a config() that builds an Experiment", "mend the file")


def _fields(name: str, frames: list) -> list[str]:
    """The fields of the dataclass of this name that a config or this package has; none if there is no such class."""
    places = [frame.f_globals for frame, _ in frames]
    places += [vars(module) for key, module in list(sys.modules.items()) if key.startswith("mllm_jax.")]
    kind = next((place[name] for place in places if name in place), None)
    return [field.name for field in dataclasses.fields(kind) if field.init] if dataclasses.is_dataclass(kind) else []


def train_command(arguments: list[str]) -> int:
    if arguments and arguments[0] in HELP:
        print(TRAIN_USAGE)
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
    experiment = options.experiment
    _use_cpu_devices(experiment)

    from mllm_jax.training.loop import Interrupted, train

    try:
        folder = train(
            experiment, options.run_dir or Path("runs") / experiment.name, fresh=options.fresh, cache_dir=_cache_dir()
        )
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    if experiment.evaluation is not None:
        _evaluate(folder.path)
    return 0


def evaluate_command(arguments: list[str]) -> int:
    options = tyro.cli(Evaluate, args=arguments, prog="mllm evaluate")
    _use_cpu_devices(_experiment_of(options.run))
    _evaluate(options.run, options.tasks)
    return 0


def generate_command(arguments: list[str]) -> int:
    options = tyro.cli(Generate, args=arguments, prog="mllm generate")
    experiment = _experiment_of(options.run)

    from mllm_jax.data.images import read_image, resize

    # The pictures first: a wrong path should not have to wait for the model.
    side = experiment.model.encoder.image_size
    pictures = tuple(resize(read_image(path), side) for path in options.image)
    _use_cpu_devices(experiment)

    from mllm_jax.inference.generate import Generator, Prompt
    from mllm_jax.training.loop import load_run
    from mllm_jax.training.run_folder import RunFolder

    experiment, model, params, tokenizer, mesh = load_run(RunFolder(options.run))
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    generator = Generator(model, params, tokenizer, mesh, batch_size=rows, max_new_tokens=options.max_new_tokens)
    print(generator.generate([Prompt(options.question, pictures)], options.sampling)[0])
    return 0


def _experiment_of(run: Path) -> Experiment:
    from mllm_jax.training.run_folder import RunFolder

    folder = RunFolder(run)
    experiment = folder.experiment()
    if unfinished := folder.unfinished(experiment):
        print(f"warning: {run} is trained in part: no stage {', '.join(unfinished)} yet", file=sys.stderr)
    return experiment


def _use_cpu_devices(experiment: Experiment) -> None:
    """Presents the CPU as several devices, before anything has touched a device; XLA_FLAGS have the last word."""
    import jax

    from mllm_jax.training.host import keep_freed_memory

    if experiment.cpu_devices:
        keep_freed_memory()
    if experiment.cpu_devices and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", experiment.cpu_devices)


def _cache_dir() -> Path:
    """Where measured lengths are kept: beside the data."""
    return Path(os.environ.get("MLLM_DATA_DIR") or Path.home() / "tensorflow_datasets") / "mllm_jax_lengths"


def _evaluate(run: Path, tasks: tuple[str, ...] | None = None) -> None:
    import jax
    from rich.console import Console

    from mllm_jax.evaluation.run import evaluate_run
    from mllm_jax.evaluation.tables import table

    results = evaluate_run(run, tasks=tasks)
    if jax.process_index() == 0:
        console = Console()
        if not console.is_terminal:  # a file or a pipe: nothing forces the table into 80 columns
            console.width = max(console.width, 120)
        console.print(table(results))
        print(run / "report.html")


HELP = ("-h", "--help")
COMMANDS = {"train": train_command, "evaluate": evaluate_command, "generate": generate_command}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; a refusal of the library is printed as one message, without a traceback, and exits with 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in HELP:
        print(USAGE)
        return 0
    plain, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        if arguments[0] not in COMMANDS:
            raise ConfigError(f"mllm {arguments[0]}", f"one of {sorted(COMMANDS)}", "see `mllm --help`")
        return COMMANDS[arguments[0]](arguments[1:])
    except MllmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # no bug of ours: a disk, a file or a permission
        refusal = MllmError(
            f"{type(error).__name__}: {error}",
            "files and folders that can be read and written, with room on the disk",
            "mend that, then start the same command again",
        )
        print(refusal, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was saved before stays", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = plain


if __name__ == "__main__":
    sys.exit(main())
