"""`mllm chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mllm_jax.cli.media import MediaOptions, saved
from mllm_jax.cli.runs import assistant_of
from mllm_jax.generation.options import Options
from mllm_jax.generation.sampling import Sampling


@dataclass(frozen=True)
class Chat:
    """Talks with a model in the terminal; `/image FILE` shows it an image, `/video FILE` a video, `/audio FILE` plays
    it a sound.

    From a pipe, it answers each line.

    Attributes:
        model: a folder that `mllm train` made, or a model's folder from Hugging Face or `mllm convert`.
        system: the system message.
        dtype: of the computation and the parameters; default: as in the folder.
        max_length: maximum number of tokens of the conversation; default: the model's limit.
        int8: store the linear kernels as int8.
        out: folder for media that the model produces; default: the current one.
    """

    model: tyro.conf.Positional[Path]
    system: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_length: int | None = None
    int8: bool = False
    options: Annotated[Options, tyro.conf.arg(name="")] = Options()
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    making: Annotated[MediaOptions, tyro.conf.arg(name="")] = MediaOptions()
    out: Path | None = None


def run(arguments: list[str]) -> int:
    options = tyro.cli(Chat, args=arguments, prog="mllm chat")

    from mllm_jax.generation.conversation import Dialogue, chat
    from mllm_jax.generation.quantize import summary

    how = dict(dtype=options.dtype, int8=options.int8, max_length=options.max_length)
    assistant = assistant_of(options.model, check=partial(options.making.check, out=options.out), **how)
    if options.int8:
        print(summary(assistant.quantization_errors))
    producing = options.making.producing() if assistant.produces else None
    dialogue = Dialogue(assistant, options.options, options.sampling, options.system, producing)
    save = lambda medium, question: saved(medium, options.out or Path("."), question)  # noqa: E731
    return chat(dialogue, save=save, interactive=sys.stdin.isatty())
