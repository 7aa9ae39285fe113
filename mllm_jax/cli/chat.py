"""`mllm chat`: a conversation in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mllm_jax.cli.runs import is_run
from mllm_jax.errors import ConfigError
from mllm_jax.inference.options import Options
from mllm_jax.inference.sampling import Sampling


@dataclass(frozen=True)
class Chat:
    """Talks with a language model in the terminal.

    Attributes:
        model: a language model's Hugging Face folder, or what `mllm convert` wrote.
        system: the system message.
        dtype: of the computation and of the parameters; as in the folder, if not given.
        max_length: tokens that the conversation may take; the model's own limit if not given.
        int8: store the linear kernels as int8.
    """

    model: tyro.conf.Positional[Path]
    system: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_length: int | None = None
    int8: bool = False
    options: Annotated[Options, tyro.conf.arg(name="")] = Options()
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()


def run(arguments: list[str]) -> int:
    options = tyro.cli(Chat, args=arguments, prog="mllm chat")

    from mllm_jax.inference.chat import Conversation, chat
    from mllm_jax.inference.language import LanguageGenerator, require_language
    from mllm_jax.inference.quantize import summary
    from mllm_jax.models.registry import pretrained_config

    if is_run(options.model):
        raise ConfigError(
            f"{options.model}, the folder of a run",
            "the folder of a language model",
            f'ask it one question at a time: mllm generate {options.model} --image cat.png "What is this?"',
        )
    require_language(pretrained_config(options.model), options.model)
    generator = LanguageGenerator.load(
        options.model, dtype=options.dtype, int8=options.int8, max_length=options.max_length
    )
    if options.int8:
        print(summary(generator.quantization_errors))
    return chat(Conversation(generator, options.options, options.sampling, options.system))
