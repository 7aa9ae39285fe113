"""The command `mllm`: train, evaluate and question a model, convert one from and to Hugging Face."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mllm_jax.errors import ConfigError, MllmError
from mllm_jax.inference.options import Options
from mllm_jax.inference.sampling import Sampling
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.training.config import Experiment
from mllm_jax.training.config_file import load_config
from mllm_jax.training.distributed import Hosts, end_together, join, leave

if TYPE_CHECKING:
    from rich.console import Console

USAGE = """mllm: multimodal LLMs in JAX

  mllm train CONFIG.py [--run-dir DIR] [--fresh] [--stages.0.steps 50 ...]  train, evaluate, write report.html
  mllm evaluate RUN [--tasks naming yes_no ...]                           a table, results.json, report.html
  mllm generate RUN --image a.png "What is this?"                         text
  mllm generate MODEL "Why is the sky blue?"                              text of a language model's folder
  mllm chat MODEL [--temperature 0.7 --top-p 0.9 ...]                     in the terminal
  mllm convert SRC DST [--to native|huggingface] [--dtype bfloat16]       Hugging Face <-> native, with a proof
  mllm embed MODEL --images DIR --text "a cat" --out vectors.npz          unit vectors of pictures and texts
  mllm plan CONFIG.py --topology v5e-256 [--stage instruct] [--search 8]  compiled for that slice: does it fit, how fast
  mllm models                                                             what `convert` and from_pretrained read

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
        hosts: where several processes train together; see launch/README.md.
        hang_seconds: when no step ends for so long, the stacks of all threads are told and the process ends; 0: never.
        profile: write a trace of a few steps into the run folder.
        compile_cache: keep compiled programs in the user's cache folder, so that a restart does not compile again.
    """

    experiment: Annotated[Experiment, OneName]
    run_dir: Path | None = None
    fresh: bool = False
    hosts: Hosts = Hosts()
    hang_seconds: float = 1800.0
    profile: bool = False
    compile_cache: bool = True


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
        run: a folder that `mllm train` made, or a model's: Hugging Face's, or what `mllm convert` wrote.
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


@dataclass(frozen=True)
class Chat:
    """Talks with a language model in the terminal.

    Attributes:
        model: a Hugging Face folder, or what `mllm convert` wrote.
        system: what stands before the conversation.
        dtype: what to compute and store in; as in the folder, if not given.
        max_length: tokens that the conversation may take; the model's own limit if not given.
        int8: store the linear kernels as int8.
    """

    model: tyro.conf.Positional[Path]
    system: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_length: int | None = None
    int8: bool = False
    options: Annotated[Options, OneName] = Options()
    sampling: Annotated[Sampling, OneName] = Sampling()


@dataclass(frozen=True)
class Convert:
    """Writes a model folder as one of the other kind, or in another dtype, and proves that nothing was lost.

    Tokenizer, chat template and generation settings go along.

    Attributes:
        source: a Hugging Face folder (config.json, safetensors), or a native one.
        target: the folder to write.
        to: what to write; the kind that the source is not, if not given.
        dtype: what to store; as in the source, if not given.
        overwrite: replace a model that is there.
    """

    source: tyro.conf.Positional[Path]
    target: tyro.conf.Positional[Path]
    to: Literal["native", "huggingface"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Embed:
    """Writes unit vectors of pictures and texts to a file, for use in search.

    The file holds `image_names`, `image_embeds`, `texts` and `text_embeds`; `numpy.load` opens it.

    Attributes:
        model: a Hugging Face folder of CLIP or SigLIP, or of one of their towers, or a native one; or a run of a dual
            encoder.
        images: picture files, and folders in which pictures lie at any depth.
        text: texts.
        out: the file to write, ending in .npz.
        batch_size: pictures or texts at a time.
        dtype: what to compute in; as in the folder, if not given.
        truncate: shorten texts that are too long instead of refusing them.
        skip_bad: leave out pictures that cannot be read, each with a warning.
        overwrite: replace a file that is there.
    """

    model: tyro.conf.Positional[Path]
    out: Path
    images: tuple[Path, ...] = ()
    text: tuple[str, ...] = ()
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    truncate: bool = False
    skip_bad: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Models:
    """Lists the models whose Hugging Face folders are read and written."""


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
    _use_cpu_devices(options.experiment)
    if options.compile_cache:
        from mllm_jax.training.compilation import keep_compiled

        keep_compiled()
    if not join(options.hosts):
        return _train(options)
    return end_together(lambda: _train(options), _refused)


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
        _evaluate(folder.path)
    return 0


def plan_command(arguments: list[str]) -> int:
    from mllm_jax.planning import command

    return command.plan_command(arguments, load_config, _console())


def evaluate_command(arguments: list[str]) -> int:
    options = tyro.cli(Evaluate, args=arguments, prog="mllm evaluate")
    _use_cpu_devices(_experiment_of(options.run))
    _evaluate(options.run, options.tasks)
    return 0


def generate_command(arguments: list[str]) -> int:
    options = tyro.cli(Generate, args=arguments, prog="mllm generate")
    if _is_model(options.run):
        from mllm_jax.inference.ask import ask

        asked = Options(max_new_tokens=options.max_new_tokens)
        print(ask(options.run, options.question, options.image, asked, options.sampling))
        return 0
    experiment = _experiment_of(options.run)
    if not isinstance(experiment.model, MultimodalConfig):
        raise ConfigError(
            f"{options.run}, which trained a {type(experiment.model).__name__.removesuffix('Config')}",
            "a model that generates text",
            "name another run; `mllm embed` compares pictures and texts with this one",
        )
    if experiment.model.family is not None:
        raise ConfigError(
            f"{options.run}, a run that trains a {experiment.model.family}",
            "its Hugging Face folder, with the processor of its own",
            f"write it first: mllm convert {options.run} FOLDER, then mllm generate FOLDER",
        )

    from mllm_jax.data.images import read_image, resize

    # The pictures first: a wrong path should not have to wait for the model.
    side = experiment.model.encoder.image_size
    pictures = tuple(resize(read_image(path), side) for path in options.image)
    _use_cpu_devices(experiment)

    from mllm_jax.inference.generate import Generator, Prompt
    from mllm_jax.training.run_folder import RunFolder
    from mllm_jax.training.weights import load_run

    experiment, model, params, tokenizer, mesh = load_run(RunFolder(options.run))
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    generator = Generator(model, params, tokenizer, mesh, batch_size=rows, max_new_tokens=options.max_new_tokens)
    print(generator.generate([Prompt(options.question, pictures)], options.sampling)[0])
    return 0


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a model to be loaded, not a training run."""
    from mllm_jax.checkpoints.native import is_native

    return is_native(folder) or any(folder.glob("*.safetensors"))


def chat_command(arguments: list[str]) -> int:
    options = tyro.cli(Chat, args=arguments, prog="mllm chat")

    from mllm_jax.inference.chat import Conversation, chat
    from mllm_jax.inference.language import LanguageGenerator
    from mllm_jax.inference.quantize import summary

    generator = LanguageGenerator.load(
        options.model, dtype=options.dtype, int8=options.int8, max_length=options.max_length
    )
    if options.int8:
        print(summary(generator.quantization_errors))
    return chat(Conversation(generator, options.options, options.sampling, options.system))


def convert_command(arguments: list[str]) -> int:
    options = tyro.cli(Convert, args=arguments, prog="mllm convert")

    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and the host has the most room

    from mllm_jax.training.run_folder import RunFolder

    if (run := RunFolder(options.source)).is_trained():
        from mllm_jax.training.named import export_run

        export_run(run, options.target, dtype=options.dtype, overwrite=options.overwrite)
        print(f"{run.path} written to {options.target} as a Hugging Face folder")
        return 0

    from mllm_jax.models.convert import convert

    convert(options.source, options.target, to=options.to, dtype=options.dtype, overwrite=options.overwrite, say=print)
    return 0


def embed_command(arguments: list[str]) -> int:
    options = tyro.cli(Embed, args=arguments, prog="mllm embed")

    from mllm_jax.inference.embed import embed_to_file

    shapes = embed_to_file(
        partial(_embedder_of, options.model),
        options.out,
        images=options.images,
        texts=options.text,
        overwrite=options.overwrite,
        bad=(lambda error: print(f"warning: {error}", file=sys.stderr)) if options.skip_bad else None,
        batch_size=options.batch_size,
        dtype=options.dtype,
        truncate=options.truncate,
    )
    print(f"{options.out}: " + ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()))
    return 0


def _embedder_of(model: Path, *, images: bool, texts: bool, dtype: str | None, **options):
    from mllm_jax.inference.embed import Embedder
    from mllm_jax.training.run_folder import RunFolder

    if not RunFolder(model).is_trained():
        return Embedder.load(model, images=images, texts=texts, dtype=dtype, **options)
    if dtype is not None:
        raise ConfigError(f"--dtype {dtype} for a run", "a run computes as its config says", "leave out --dtype")
    _use_cpu_devices(_experiment_of(model))

    from mllm_jax.training.weights import load_run

    _, module, params, tokenizer, _ = load_run(RunFolder(model))
    return Embedder.trained(module, params, tokenizer, **options)


def models_command(arguments: list[str]) -> int:
    tyro.cli(Models, args=arguments, prog="mllm models")

    from rich.table import Table

    from mllm_jax.models.registry import supported_models

    table = Table("model", "architectures", "reads", "writes", "proven against")
    for row in supported_models():
        marks = ["yes" if able else "no" for able in (row.reading, row.writing)]
        table.add_row(row.name, "\n".join(row.architectures), *marks, row.oracle)
    _console().print(table)
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

    from mllm_jax.training.host import enough_threads, keep_freed_memory

    if experiment.cpu_devices:
        keep_freed_memory()
        enough_threads(experiment.cpu_devices)
    if experiment.cpu_devices and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", experiment.cpu_devices)


def _cache_dir() -> Path:
    """Where measured lengths are kept: beside the data."""
    return Path(os.environ.get("MLLM_DATA_DIR") or Path.home() / "tensorflow_datasets") / "mllm_jax_lengths"


def _evaluate(run: Path, tasks: tuple[str, ...] | None = None) -> None:
    import jax

    from mllm_jax.evaluation.run import evaluate_run
    from mllm_jax.evaluation.tables import table

    results = evaluate_run(run, tasks=tasks)
    if jax.process_index() == 0:
        _console().print(table(results))
        print(run / "report.html")


def _console() -> Console:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file or a pipe: nothing forces a table into 80 columns
        console.width = max(console.width, 120)
    return console


HELP = ("-h", "--help")
COMMANDS = {
    "train": train_command,
    "evaluate": evaluate_command,
    "generate": generate_command,
    "chat": chat_command,
    "convert": convert_command,
    "embed": embed_command,
    "models": models_command,
    "plan": plan_command,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; a refusal of the library is printed as one message, without a traceback, and exits with 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in HELP:
        print(USAGE)
        return 0
    plain, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        return _refused(partial(_command, arguments))
    finally:
        warnings.formatwarning = plain


def _command(arguments: list[str]) -> int:
    if arguments[0] not in COMMANDS:
        raise ConfigError(f"mllm {arguments[0]}", f"one of {sorted(COMMANDS)}", "see `mllm --help`")
    return COMMANDS[arguments[0]](arguments[1:])


def _refused(command: Callable[[], int]) -> int:
    """The command's exit code; where it refuses, the code for that, and the refusal on standard error."""
    try:
        return command()
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


if __name__ == "__main__":
    sys.exit(main())
