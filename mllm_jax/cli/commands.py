"""The command `mllm`: finds the requested command, one file each, and runs it."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial

from mllm_jax import __version__
from mllm_jax.cli.arguments import check_arguments
from mllm_jax.cli.console import refused
from mllm_jax.errors import ConfigError
from mllm_jax.sharding.platform import choose_platform, quiet_loader

USAGE = """mllm: multimodal LLMs in JAX

  mllm train CONFIG.py [--run-dir DIR] [--fresh] [--stages.0.steps 50 ...]  train, evaluate, write report.html
  mllm evaluate RUN [--tasks naming yes_no ...]                           a table, results.json, report.html
  mllm evaluate MODEL --questions FILE [--media DIR] [--out DIR]          a table, predictions.jsonl
  mllm generate RUN --image a.png "What is this?"                         text
  mllm generate MODEL "Why is the sky blue?"                              text of a language model's folder
  mllm generate MODEL --prompts FILE|DIR --out answers.jsonl              many answers; the same command continues
  mllm generate SD_FOLDER "a red cat" [--steps 20 --count 4 --out DIR]     PNG files; --help after the folder says more
  mllm transcribe FILE|DIR|- ... --model WHISPER [--format srt --out DIR]  the speech of recordings of any length
  mllm chat MODEL [--temperature 0.7 --top-p 0.9 ...]                     in the terminal
  mllm convert SRC DST [--to native|huggingface] [--dtype bfloat16]       Hugging Face <-> native, with a proof
  mllm embed MODEL --images DIR --text "a cat" --out vectors.npz          unit vectors of images and texts
  mllm plan CONFIG.py --topology v5e-256 [--stage instruct] [--search 8]  compiled for that slice: does it fit, how fast
  mllm data suggest CONFIG.py [--sample 1000]                             rows that suit the data: length, slots, fill
  mllm models                                                             what `convert` and from_pretrained read

`mllm COMMAND --help` lists a command's options, `mllm --version` prints the version."""

HELP = ("-h", "--help")
# Each is a module of this folder with `run(arguments)`; the text is printed while it loads.
COMMANDS = {
    "train": "reading the config, preparing the data, compiling: the first loss follows",
    "evaluate": "loading the model and its questions",
    "generate": "loading the model",
    "transcribe": "loading the model",
    "chat": "loading the model",
    "convert": "reading the model",
    "embed": "loading the model",
    "plan": "reading the config",
    "data": "reading the config and a sample of its data",
    "models": None,
}
PROCESS = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")  # the index of a process in a run of several


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; a refusal of the library is printed as one message, without a traceback, with exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    plain, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        return refused(partial(_command, arguments))
    finally:
        warnings.formatwarning = plain


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in HELP:
        print(USAGE)
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"mllm_jax {__version__}")
        return 0
    check_arguments(arguments)
    name, *rest = arguments
    if name not in COMMANDS:
        raise ConfigError(f"mllm {name}", f"one of {sorted(COMMANDS)}", "see `mllm --help`")
    _begin(name, rest)
    # transformers would print that PyTorch is missing, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    choose_platform()
    if not any(name in os.environ for name in PROCESS):  # of a run of several, the log says which process is missing
        quiet_loader()
    return importlib.import_module(f"mllm_jax.cli.{name}").run(rest)


def _begin(command: str, arguments: Sequence[str]) -> None:
    """Prints the first line, before imports that take seconds.

    The output of `generate`, `transcribe` and `chat` is the answer, so their line goes to standard error, and only to
    a terminal.
    """
    doing = COMMANDS[command]
    if doing is None or not arguments or arguments[0].startswith("-") or {*HELP, "--help-all"} & set(arguments):
        return
    if any(os.environ.get(name, "0") != "0" for name in PROCESS):
        return
    file = sys.stderr if command in ("generate", "transcribe", "chat") else sys.stdout
    if file is sys.stdout or file.isatty():
        print(f"mllm {command} {arguments[0]}: {doing}", file=file, flush=True)
