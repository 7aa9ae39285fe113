"""The command `mllm`: finds what was asked for among the commands, one file each, and runs it."""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import partial

from mllm_jax.cli.console import refused
from mllm_jax.errors import ConfigError

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

HELP = ("-h", "--help")
COMMANDS = ("train", "evaluate", "generate", "chat", "convert", "embed", "models", "plan")  # each a module beside this


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; a refusal of the library is printed as one message, without a traceback, and exits with 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in HELP:
        print(USAGE)
        return 0
    plain, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        return refused(partial(_command, arguments))
    finally:
        warnings.formatwarning = plain


def _command(arguments: list[str]) -> int:
    if arguments[0] not in COMMANDS:
        raise ConfigError(f"mllm {arguments[0]}", f"one of {sorted(COMMANDS)}", "see `mllm --help`")
    return importlib.import_module(f"mllm_jax.cli.{arguments[0]}").run(arguments[1:])
