"""`mllm generate` with a model that draws: writes images, videos or sounds of a prompt, and prints their paths."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal

import tyro

from mllm_jax.checkpoints.components import CONFIG
from mllm_jax.checkpoints.native import is_native, read_native_config
from mllm_jax.checkpoints.run import is_run
from mllm_jax.cli.caches import keep_compiled_programs
from mllm_jax.cli.media import require_folder, saved, with_paths
from mllm_jax.cli.progress import Count
from mllm_jax.errors import ConfigError


@dataclass(frozen=True)
class Draw:
    """Draws images or videos of a prompt, writes PNG or MP4 files with all settings inside, and prints the paths.

    With an AudioLDM-2 it writes sounds as WAV files.

    Attributes:
        model: folder of a Stable Diffusion, a Zeroscope or an AudioLDM-2, from diffusers or `mllm convert`.
        prompt: what the images show.
        negative: what they do not show.
        steps: of the scheduler.
        guidance: weight of the prompt against the negative prompt; up to 1 is none.
        guidance_interval: shares of the steps at which guidance begins and ends; a step without it is twice as fast.
        seed: of the first image; the others count up.
        count: number of images.
        height: of the images in pixels; default: as in the model's training.
        width: of the images in pixels.
        frames: of a video, 8 a second; default: 16.
        seconds: of the sounds; default: as in the model's training.
        start_image: an image file that drawing begins with.
        strength: of the change of the start image, above 0 to 1; default: 0.8.
        scheduler: another scheduler than the folder's: ddpm, ddim, pndm, euler, euler_ancestral or dpm++.
        batch_size: number of images that are drawn together.
        dtype: of the computation; default: as stored.
        out: folder for the files.
    """

    model: tyro.conf.Positional[Path]
    prompt: tyro.conf.Positional[str]
    negative: str = ""
    steps: int = 50
    guidance: float = 7.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    count: int = 1
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    seconds: float | None = None
    start_image: Path | None = None
    strength: float | None = None
    scheduler: str | None = None
    batch_size: int = 4
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    out: Path = Path(".")


def draws(arguments: Sequence[str]) -> bool:
    """Returns whether the first folder of a model among the arguments is of one that draws."""
    from mllm_jax.models.pipelines import PipelineConfig, is_pipeline

    for folder in map(Path, filter(os.path.isdir, arguments)):
        if is_native(folder):
            return isinstance(read_native_config(folder), PipelineConfig)
        if is_pipeline(folder) or is_run(folder) or (folder / CONFIG).is_file():
            return is_pipeline(folder)
    return False


def refuse_options(arguments: Sequence[str], known: type, others: type, what: str, listed: str) -> None:
    """Raises ConfigError for an option of the other kind of model.

    Args:
        known, others: the options of this kind, and of the other.
        what: this kind of model.
        listed: the command that lists the options of this kind.
    """
    foreign = _names(others) - _names(known)
    for word in arguments:
        option = re.sub("^--no-", "--", word.partition("=")[0].replace("_", "-"))
        if option in foreign:
            given = word.partition("=")[0]
            raise ConfigError(
                f"{given} for {what}", f"the options that {listed} lists", "drop it, or name another folder"
            )


def _names(options: type) -> set[str]:
    """Returns the options of a dataclass, and of those that it holds."""
    found = set()
    for field in fields(options):
        inner = type(field.default)
        found |= _names(inner) if is_dataclass(inner) else {f"--{field.name.replace('_', '-')}"}
    return found


def run(arguments: list[str]) -> int:
    options = tyro.cli(Draw, args=arguments, prog="mllm generate")
    check(options)
    keep_compiled_programs()

    from mllm_jax.generation.draw import Drawing
    from mllm_jax.generation.draws import drawer_of

    shared = {field.name for field in fields(Drawing)} & {field.name for field in fields(Draw)}
    given = {name: getattr(options, name) for name in shared} | dict(negative=options.negative or None)
    how = Drawing(guidance_scale=options.guidance, **given)
    drawer = drawer_of(options.model, dtype=options.dtype)
    _, first, calls = drawer.schedule(how)
    done = itertools.count(1)
    with Count("steps", (calls - first) * -(-how.count // how.batch_size)) as progress:
        answers = drawer.draw(options.prompt, how, lambda *_: progress.update(next(done)))
    for answer in answers:
        (medium,) = answer.media
        path = saved(medium, options.out, options.prompt)
        print(with_paths(answer.text, [(medium.kind, path)]), flush=True)
    return 0


def check(options: Draw) -> None:
    """Refuses what needs no weights to be refused."""
    from mllm_jax.data.images import image_size
    from mllm_jax.data.packages import media_package
    from mllm_jax.generators.schedulers import NAMES
    from mllm_jax.models.registry import pretrained_config

    modality = pretrained_config(options.model).modality
    if modality != "image":
        media_package("av" if modality == "video" else "soundfile", f"writing {modality}")
    if options.start_image is not None:
        image_size(options.start_image)
    if options.scheduler is not None and options.scheduler not in NAMES:
        raise ConfigError(f"--scheduler {options.scheduler}", f"one of {', '.join(NAMES)}", "choose one of them")
    require_folder(options.out)
