"""Drawing: prompts, negative prompts and start images to images, with a text-to-image generator."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mllm_jax.checkpoints.fingerprint import short_fingerprint
from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.processing.captions import Captions
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.diffusion import OnStep, Sampler, SamplerInputs, SamplingPlan, calls
from mllm_jax.generation.media import Media
from mllm_jax.generation.options import Answer
from mllm_jax.generation.rows import rows_for
from mllm_jax.generation.start_image import start_image
from mllm_jax.generation.warn import warn_user
from mllm_jax.generators.schedulers import Scheduler, by_name
from mllm_jax.models.registry import from_pretrained
from mllm_jax.models.text_to_image import TextToImageConfig
from mllm_jax.version import __version__

TOKENIZER = "tokenizer"  # the subfolder of a pipeline
UNIT = 8  # pixels of which sides are multiples, as diffusers asks
LARGEST_SEED = 2**32 - 1
STRENGTH = 0.8  # of an image that starts from another one, if nothing else is asked for


@dataclass(frozen=True)
class Drawing:
    """The options of a drawing; see `Draws.draw`."""

    negative: str | Sequence[str] | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    seed: int | Sequence[int] = 0
    count: int = 1
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    latents: Any = None
    noise: Any = None
    start_image: Any = None
    strength: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    scheduler: str | None = None
    batch_size: int = 4
    seconds: float | None = None

    def __post_init__(self):
        for name in ("steps", "count", "batch_size", *(["frames"] if self.frames is not None else [])):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ConfigError(f"{name}={value!r}", "a whole number from 1", f"change {name}")
        if not math.isfinite(self.guidance_scale):
            raise ConfigError(f"guidance_scale={self.guidance_scale}", "a number, such as 7.5", "change it")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise ConfigError(
                f"guidance_interval={self.guidance_interval}",
                "the shares of the steps at which guidance begins and ends, from 0 to 1",
                "change it",
            )
        if self.strength is not None and self.start_image is None:
            raise ConfigError(
                f"strength={self.strength} without a start image", "strength with start_image", "give it, or drop it"
            )
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ConfigError(f"strength={self.strength}", "above 0, up to 1", "change it")

    @property
    def change(self) -> float:
        """The strength."""
        return STRENGTH if self.strength is None else self.strength

    @property
    def guided(self) -> bool:
        """Returns whether any step has guidance; a scale up to 1 is none, as in diffusers."""
        return self.guidance_scale > 1 and self.guidance_interval[0] < self.guidance_interval[1]


class Drawer:
    """A model that draws, with its tokenizer.

    Args:
        model, params: a `TextToImage`, such as `mllm_jax.from_pretrained` gives of a Stable Diffusion.
        captions: the conversion of texts for its text encoder.
        mesh: over which params are sharded, or None.
    """

    made, axes = "images", ("height", "width")
    refused = ("frames", "seconds")  # options of other kinds of models

    def __init__(self, model: nn.Module, params: dict | None, captions: Any, *, mesh: Mesh | None = None):
        self.model, self.params, self.mesh = model, params, mesh
        self._sampler, self.captions = Sampler(model, params, mesh), captions

    @classmethod
    def load(cls, folder: str | Path, *, mesh: Mesh | None = None, dtype: Any = None) -> Drawer:
        """Loads a folder. Raises as `mllm_jax.from_pretrained`; DataError: it has no tokenizer."""
        tokenizer = ChatTokenizer.load(Path(folder) / TOKENIZER)
        if tokenizer.pad_token_id is None or tokenizer.bos_token_id is None:
            raise DataError(
                f"{folder}: a tokenizer without a padding token, or without a beginning of text",
                "CLIP's tokenizer",
                "restore the folder's tokenizer",
            )
        model, params = from_pretrained(folder, dtype=dtype, mesh=mesh)
        return cls(model, params, model.config.captions([tokenizer]), mesh=mesh)

    def with_params(self, params: dict) -> Drawer:
        """Returns the same with other parameters; both share the compiled program."""
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)
        other.params, other._sampler = params, self._sampler.of(params)
        return other

    def _require(self, how: Drawing) -> None:
        """Raises ConfigError for an option of another kind of model."""
        for name in self.refused:
            if (value := getattr(how, name)) is not None:
                shown = f"{name}={value}" if isinstance(value, (int, float, str)) else name
                raise ConfigError(f"{shown} for a model that draws {self.made}", "one that has it", f"drop {name}")

    @property
    def config(self) -> TextToImageConfig:
        return self.model.config

    @cached_property
    def fingerprint(self) -> str:
        """A short checksum of the parameters."""
        return short_fingerprint(self.params)

    def draw(self, prompts: str | Sequence[str], how: Drawing, on_step: OnStep | None = None) -> list[Answer]:
        """Returns an answer for each prompt and count; see `Draws.draw`."""
        self._require(how)
        texts = _texts(prompts)
        negatives, seeds = _negatives(how.negative, len(texts)), _seeds(how.seed, len(texts), how.count)
        tokens, without = self._encoded(texts, negatives if how.guided else None)
        read = dict(tokens=_repeated(tokens, how.count), negatives=_repeated(without, how.count))
        return self._draw(read, texts, negatives, seeds, how, on_step)

    def draw_conditions(
        self, conditions: Any, texts: Sequence[str], how: Drawing, on_step: OnStep | None = None
    ) -> list[Answer]:
        """Returns an answer for each condition that an output projector has made, instead of the text encoder.

        Args:
            conditions: float32[n, L, E], or a tuple of these for a generator with several conditions.
            texts: what they stand for, for the metadata.
            how: its count is 1.
        """
        self._require(how)
        negatives, seeds = _negatives(how.negative, len(texts)), _seeds(how.seed, len(texts), 1)
        without = self._encoded(negatives, None)[0] if how.guided else None
        read = dict(tokens=None, negatives=without, conditions=jax.tree.map(np.asarray, conditions))
        return self._draw(read, texts, negatives, seeds, how, on_step)

    def _draw(
        self,
        read: dict[str, Any],
        texts: Sequence[str],
        negatives: Sequence[str],
        seeds: list[int],
        how: Drawing,
        on_step: OnStep | None,
    ) -> list[Answer]:
        """Returns an answer for each text and count.

        Args:
            read: the arrays of `SamplerInputs` that the images are drawn of.
        """
        images = len(seeds)
        if how.negative and not how.guided:
            warn_user(f"the negative prompt has no effect with guidance_scale={how.guidance_scale}")
        scheduler, first, total = self.schedule(how)
        start, (height, width) = self._start_and_size(how, images)
        shape = self._shape(how, height, width)
        edges = [round(share * total) for share in how.guidance_interval] if how.guided else [0, 0]
        plan = SamplingPlan(scheduler, how.steps, shape, first, (edges[0], edges[1]), on_step is not None)
        arrays = dict(
            **read,
            seeds=np.array(seeds, np.uint32),
            start=start,
            **self._noises(how, plan, images, total - first),
        )
        drawn = self._drawn(arrays, plan, how, on_step)
        about = dict(
            steps=str(how.steps),
            guidance=f"{how.guidance_scale:g}",
            scheduler=scheduler.class_name,
            model=self.fingerprint,
            version=f"mllm_jax {__version__}",
            **self._size_shown(how, height, width),
        )
        if start is not None:
            about["strength"] = f"{how.change:g}"
        own = [
            dict(prompt=texts[i // how.count], negative=negatives[i // how.count], seed=str(seed)) | about
            for i, seed in enumerate(seeds)
        ]
        return [self._answer(made, how, metadata) for made, metadata in zip(drawn, own, strict=True)]

    def schedule(self, how: Drawing) -> tuple[Scheduler, int, int]:
        """Returns the scheduler, the model's first call, above 0 with a start image, and the number of all calls."""
        scheduler, first = self.config.scheduler, 0
        if how.scheduler is not None:
            scheduler = self.config.sampler(by_name(how.scheduler, scheduler))
        total = calls(scheduler, how.steps)
        if how.start_image is not None:
            first = scheduler.first_step(how.steps, how.change)
        return scheduler, first, total

    # ---- inside

    @property
    def factor(self) -> int:
        """Pixels of an image's side for each position of its latents."""
        return self.config.factor

    def _drawn(
        self, arrays: dict[str, Any], plan: SamplingPlan, how: Drawing, on_step: OnStep | None
    ) -> list[np.ndarray]:
        """Draws in batches; the rows of a batch without an image repeat its last one."""
        images, found = len(arrays["seeds"]), []
        mean = arrays.pop("mean")
        for begin in range(0, images, how.batch_size):
            count = min(how.batch_size, images - begin)
            rows = np.minimum(np.arange(begin, begin + rows_for(count, how.batch_size)), begin + count - 1)
            batch = {
                name: jax.tree.map(partial(np.take, indices=rows, axis=1 if name == "noise" else 0), array)
                for name, array in arrays.items()
            }
            watched = None if on_step is None else lambda i, t, latents, n=count: on_step(i, t, latents[:n])
            asked = SamplerInputs(guidance=np.float32(how.guidance_scale), mean=mean, **batch)
            found += list(self._sampler(asked, plan, watched)[:count])
        if wrong := [i for i, image in enumerate(found) if not np.isfinite(image).all()]:
            raise DataError(
                f"{self.made[:-1]} {wrong[0] + 1} of {images}, whose latents became NaN or infinite",
                "finite numbers",
                "compute in float32 (dtype), lower guidance_scale, or check the weights",
            )
        return found

    def _answer(self, made: np.ndarray, how: Drawing, metadata: dict[str, str]) -> Answer:
        return Answer("<image 1>", (), media=(Media("image", made, metadata=metadata),))

    def _size_shown(self, how: Drawing, height: int, width: int) -> dict[str, str]:
        return dict(size=f"{width}x{height}")

    def _shape(self, how: Drawing, height: int, width: int) -> tuple[int, ...]:
        """Returns the shape of the latents of one image."""
        return height // self.factor, width // self.factor, self.config.unet.in_channels

    def _encoded(self, texts: list[str], negatives: list[str] | None) -> tuple[Any, Any]:
        """Returns `tokens` and `negatives` of `SamplerInputs`, with a row for each text."""
        rows = [
            None if each is None else np.array([self._tokens(text) for text in each]) for each in (texts, negatives)
        ]
        return rows[0], rows[1]

    def _tokens(self, text: str) -> np.ndarray:
        """Returns int32[L] of a text."""
        return self.captions.pad(ids_of(text, self.captions, self.config.text_encoder.vocab_size))

    def _start_and_size(self, how: Drawing, images: int) -> tuple[np.ndarray | None, tuple[int, int]]:
        """Returns the start images float32[B, H, W, 3], or None, and height and width."""
        asked, own = [how.height, how.width], self._own_size()
        self._require_size(asked, own)
        if how.latents is not None:
            given = [self.factor * side for side in np.shape(how.latents)[-3:-1]]
            for name, side, held in zip(("height", "width"), asked, given, strict=False):
                if side is not None and side != held:
                    raise ConfigError(
                        f"{name} {side} beside latents of {held}", "latents alone, or of that size", f"drop {name}"
                    )
            asked = given if len(given) == 2 else asked
        if how.start_image is None:
            height, width = (side or default for side, default in zip(asked, own, strict=True))
            return None, (height, width)
        several = isinstance(how.start_image, (list, tuple))
        given = list(how.start_image) if several else [how.start_image]
        if several and len(given) != images:
            raise DataError(f"{len(given)} start images for {images} images", "one, or one for each", "change the list")
        found = [start_image(image, *asked, self.factor) for image in given]
        if len({image.shape for image in found}) > 1:
            raise DataError("start images of several sizes", "height and width beside them", "give height and width")
        array = np.stack(found if several else found * images)
        return array, array.shape[1:3]

    def _own_size(self) -> tuple[int, int]:
        if self.config.image_size is not None:
            return self.config.image_size, self.config.image_size
        sides = self.config.unet.height_and_width or (64, 64)
        return sides[0] * self.factor, sides[1] * self.factor

    def _require_size(self, asked: Sequence[int | None], own: tuple[int, int]) -> None:
        """Raises ConfigError for a side that is neither a multiple nor the model's own, with the nearest multiple."""
        unit = math.lcm(UNIT, self.factor)
        for name, side, default in zip(("height", "width"), asked, own, strict=True):
            if side in (None, default):
                continue
            if isinstance(side, bool) or not isinstance(side, (int, np.integer)) or side % unit or side < unit:
                near = max(unit, round(side / unit) * unit)
                raise ConfigError(f"{name} {side}", f"a multiple of {unit}", f"the nearest is {near}")

    def _noises(self, how: Drawing, plan: SamplingPlan, images: int, steps: int) -> dict[str, Any]:
        """Returns the arrays of `SamplerInputs` that hold given noise."""
        shape, started = plan.latents, how.start_image is not None
        axes = ", ".join((self.made, *self.axes, "channels"))
        given = dict(latents=None, posterior=None, noise=None, mean=False)
        if how.latents is not None:
            array = _numbers("latents", how.latents)
            array = array[None] if array.ndim == len(shape) else array
            wanted = (images, *shape)
            if array.shape != wanted:
                raise DataError(f"latents {list(array.shape)}", f"{list(wanted)}: {axes}", "change them")
            given["latents"], given["mean"] = array, how.noise is None
        if how.noise is None:
            return given
        array = _numbers("noise", how.noise)
        array = array[None] if array.ndim == len(shape) + 1 else array
        names = ["posterior", "latents"] if started else []
        names = names[:1] if started and how.latents is not None else names
        most = len(names) + steps * plan.scheduler.stochastic
        allowed = (most, most - 1) if started and most > 1 else (most,)
        if array.shape[1:] != (images, *shape) or len(array) not in allowed or not most:
            raise DataError(
                f"noise {list(array.shape)}",
                f"{list((most, images, *shape))}: noises, {axes}"
                if most
                else f"none: a {plan.scheduler.class_name} without a start image draws no noise",
                "change it; latents are the first noise",
            )
        if len(array) < most:
            names, given["mean"] = names[1:], True
        for name in names:
            given[name], array = array[0], array[1:]
        given["noise"] = array if plan.scheduler.stochastic else None
        return given


def ids_of(text: str, captions: Captions, vocab_size: int) -> list[int]:
    """Returns the ids of a text, cut to what its encoder reads with a warning that names what is cut.

    Raises:
        DataError: an id that the text encoder does not have.
    """
    ids, left_out = captions.read(text)
    if left_out:
        warn_user(f"the text encoder reads {captions.longest} tokens; the end of the prompt is left out: {left_out!r}")
    if strange := [i for i in ids if i >= vocab_size]:
        raise DataError(
            f"a prompt with the token {strange[0]}",
            f"tokens from 0 to {vocab_size - 1}",
            "take the tokenizer that belongs to the model",
        )
    return ids


def _repeated(tree: Any, count: int) -> Any:
    """Repeats each row of arrays."""
    return jax.tree.map(lambda array: np.repeat(array, count, axis=0), tree)


def _texts(prompts: str | Sequence[str]) -> list[str]:
    texts = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"the prompts {prompts!r:.100}", "a text, or a list of texts", "give one or more")
    return texts


def _negatives(negative: str | Sequence[str] | None, prompts: int) -> list[str]:
    if negative is None or isinstance(negative, str):
        return [negative or ""] * prompts
    if len(negative) != prompts or not all(isinstance(text, str) for text in negative):
        raise DataError(
            f"{len(negative)} negative prompts for {prompts} prompts", "a text, or one for each", "change them"
        )
    return list(negative)


def _seeds(seed: int | Sequence[int], prompts: int, count: int) -> list[int]:
    """Returns a seed for each image: prompt by prompt, and counting up from a prompt's seed."""
    given = list(seed) if np.ndim(seed) else [seed] * prompts
    if len(given) == prompts:
        given = [one + i for one in given for i in range(count)]
    right = all(isinstance(one, (int, np.integer)) and 0 <= one <= LARGEST_SEED for one in given)
    if len(given) != prompts * count or not right:
        raise ConfigError(
            f"seed={seed!r:.100} for {prompts} prompt(s) of {count} image(s)",
            f"a whole number from 0 to {LARGEST_SEED:,}, a list with one for each prompt, or with one for each image",
            "change seed",
        )
    return [int(one) for one in given]


def _numbers(name: str, given: Any) -> np.ndarray:
    array = np.asarray(given, np.float32)
    if not np.isfinite(array).all():
        raise DataError(f"{name} with NaN or infinity", "finite numbers", "draw them again")
    return array
