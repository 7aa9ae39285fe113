"""`mllm generate`: answers a question."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mllm_jax.cli.caches import keep_compiled_programs
from mllm_jax.cli.runs import experiment_of, is_model
from mllm_jax.errors import ConfigError
from mllm_jax.inference.options import Completion, Options
from mllm_jax.inference.sampling import Sampling
from mllm_jax.models.multimodal import MultimodalConfig


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
    if is_model(options.run):
        from mllm_jax.inference.ask import ask

        asked = Options(max_new_tokens=options.max_new_tokens)
        return _show(ask(options.run, options.question, options.image, asked, options.sampling), options)
    experiment = experiment_of(options.run)
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

    # The images first: a wrong path should not have to wait for the model.
    side = experiment.model.encoder.image_size
    images = tuple(resize(read_image(path), side) for path in options.image)

    from mllm_jax.inference.generate import Generator, Prompt
    from mllm_jax.training.operations.run_folder import RunFolder
    from mllm_jax.training.weights import load_run

    experiment, model, params, tokenizer, mesh = load_run(RunFolder(options.run))
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    generator = Generator(
        model, params, tokenizer, mesh, batch_size=rows, max_new_tokens=options.max_new_tokens, by_layer=False
    )
    return _show(generator.complete([Prompt(options.question, images)], options.sampling)[0], options)


def _show(answer: Completion, options: Generate) -> int:
    print(answer.text, flush=True)
    if answer.finish == "length":
        count = len(answer.ids)
        todo = "--max-new-tokens allows more" if count == options.max_new_tokens else "the model takes no longer text"
        print(f"(cut off after {count} tokens; {todo})", file=sys.stderr)
    return 0
