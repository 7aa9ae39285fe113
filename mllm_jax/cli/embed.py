"""`mllm embed`: vectors of images and texts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from mllm_jax.cli.caches import keep_compiled_programs
from mllm_jax.cli.runs import experiment_of, use_cpu_devices
from mllm_jax.errors import ConfigError


@dataclass(frozen=True)
class Embed:
    """Writes unit vectors of images and texts to a file, for search.

    The file holds `image_names`, `image_embeds`, `texts` and `text_embeds`; `numpy.load` opens it.

    Attributes:
        model: a Hugging Face folder of CLIP or SigLIP, or of one of their encoders, or a native one; or a run of a dual
            encoder.
        images: image files, and folders of images, with their subfolders.
        text: texts.
        out: the file to write, ending in .npz.
        batch_size: number of images or texts at a time.
        dtype: of the computation; default: as in the folder.
        truncate: shorten texts that are too long instead of refusing them.
        skip_bad: leave out images that cannot be read, with a warning for each.
        overwrite: replace an existing file.
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


def run(arguments: list[str]) -> int:
    options = tyro.cli(Embed, args=arguments, prog="mllm embed")
    keep_compiled_programs()

    from mllm_jax.generation.embed import embed_to_file

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
    from mllm_jax.checkpoints.run import RunFolder
    from mllm_jax.generation.embed import Embedder

    if not RunFolder(model).is_trained():
        return Embedder.load(model, images=images, texts=texts, dtype=dtype, **options)
    if dtype is not None:
        raise ConfigError(f"--dtype {dtype} for a run", "a run computes as its config says", "leave out --dtype")
    use_cpu_devices(experiment_of(model))

    from mllm_jax.models.run_weights import load_run

    _, module, params, processor, _ = load_run(RunFolder(model))
    return Embedder.trained(module, params, processor.tokenizer, **options)
