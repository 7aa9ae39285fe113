"""`mllm generate`: answers a question."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mllm_jax.cli.caches import keep_compiled_programs
from mllm_jax.cli.runs import assistant_of
from mllm_jax.data.images import read_image
from mllm_jax.data.message import Image, Message, Text
from mllm_jax.errors import ConfigError
from mllm_jax.generation.options import Answer, Options
from mllm_jax.generation.sampling import Sampling


@dataclass(frozen=True)
class Generate:
    """Answers a question, about images if any are given.

    Attributes:
        run: a folder that `mllm train` made, or a model's: Hugging Face's, or what `mllm convert` wrote.
        question: what to ask.
        image: image files, in the order in which the question speaks of them.
        max_new_tokens: the number of tokens after which an answer is cut off.
    """

    run: tyro.conf.Positional[Path]
    question: tyro.conf.Positional[str]
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    max_new_tokens: int = Options.max_new_tokens
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {self.max_new_tokens}", "at least 1", "change --max-new-tokens")


def run(arguments: list[str]) -> int:
    options = tyro.cli(Generate, args=arguments, prog="mllm generate")
    keep_compiled_programs()
    # The images first: a wrong path should not have to wait for the weights.
    images = [Image(read_image(path)) for path in options.image]
    assistant = assistant_of(options.run, by_layer=False)
    asked = (*images, Text(options.question)) if images else options.question
    prompt = assistant.prompt((Message("user", asked),))
    how = Options(max_new_tokens=options.max_new_tokens)
    return _show(assistant.complete([prompt], how, options.sampling)[0], options)


def _show(answer: Answer, options: Generate) -> int:
    print(answer.text, flush=True)
    if answer.reason == "length":
        count = len(answer.tokens)
        todo = "--max-new-tokens allows more" if count == options.max_new_tokens else "the model takes no longer text"
        print(f"(cut off after {count} tokens; {todo})", file=sys.stderr)
    return 0
