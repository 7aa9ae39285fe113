"""Media that a model produces in its answers: their options on the command line, and their files."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mllm_jax.errors import ConfigError
from mllm_jax.models.protocol import produced

if TYPE_CHECKING:
    from mllm_jax.generation.media import Media
    from mllm_jax.generation.produce import Producing

LONGEST_NAME = 40  # characters of the prompt in a file's name


@dataclass(frozen=True)
class MediaOptions:
    """The media of answers, of a model that also produces images, videos or sounds.

    Attributes:
        produce: kinds of media, such as image, with which the answer begins even if the model would write none.
        incomplete: repair completes a medium that the model has only begun; report leaves it out and says so.
        steps: of the scheduler, for media.
        guidance: weight of the answer against the negative prompt, for media; up to 1 is none.
        negative: what media do not show.
        height: of media in pixels; default: as in the model's training.
        width: of media in pixels.
        scheduler: another scheduler than the model's, see `mllm generate` of a Stable Diffusion.
    """

    produce: tyro.conf.UseAppendAction[tuple[Literal["image", "video", "audio"], ...]] = ()
    incomplete: Literal["repair", "report"] = "repair"
    steps: int = 50
    guidance: float = 7.5
    negative: str = ""
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None

    def check(self, config: Any, out: Path | None) -> None:
        """Raises ConfigError: options for a model that produces no media, or a folder that is a file."""
        given = [f"--{field.name}" for field in fields(self) if getattr(self, field.name) != field.default]
        given += ["--out"] if out is not None else []
        if given and not produced(config):
            raise ConfigError(
                f"{', '.join(given)} for a model that writes text alone",
                "a model that produces media",
                "drop it, or name another",
            )
        if out is not None:
            require_folder(out)

    def producing(self) -> Producing:
        """Returns the options of answers."""
        from mllm_jax.generation.produce import Producing

        names = ("steps", "height", "width", "scheduler")
        drawing = {name: getattr(self, name) for name in names}
        drawing |= dict(guidance_scale=self.guidance, negative=self.negative or None)
        return Producing(self.produce, self.incomplete, drawing)


def require_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}, which is a file", "a folder", "name another")


def saved(medium: Media, folder: Path, prompt: str) -> Path:
    """Writes a medium into a folder under a free name; returns its path."""
    from mllm_jax.generation.media import SUFFIXES

    folder.mkdir(parents=True, exist_ok=True)
    path = free_name(folder, prompt, medium.metadata["seed"], SUFFIXES[medium.kind][0])
    medium.save(path)
    return path


def free_name(folder: Path, prompt: str, seed: str, suffix: str = ".png") -> Path:
    """Returns a path that does not exist, from the prompt and the seed."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:LONGEST_NAME].rstrip("-") or "image"
    path, number = folder / f"{words}-{seed}{suffix}", 1
    while path.exists():
        number += 1
        path = folder / f"{words}-{seed}-{number}{suffix}"
    return path


def with_paths(text: str, paths: list[tuple[str, Path]]) -> str:
    """Returns an answer's text with the path of each medium in the place of its mark.

    Args:
        paths: the kind and the path of each medium, in the order of the text.
    """
    counts: dict[str, int] = {}
    for kind, path in paths:
        counts[kind] = counts.get(kind, 0) + 1
        text = text.replace(f"<{kind} {counts[kind]}>", str(path), 1)
    return text
