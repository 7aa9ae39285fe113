"""The part of the Assistant that draws images, videos and sounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.generation.draw import Drawer, Drawing
from mllm_jax.generation.draw_sound import AudioLDM2Drawer
from mllm_jax.generation.draw_video import VideoDrawer
from mllm_jax.generation.options import Answer
from mllm_jax.generation.produce import DRAWERS as DRAWERS_OF_OUTPUTS
from mllm_jax.generation.produce import Producer
from mllm_jax.models.audioldm2 import AudioLDM2Config
from mllm_jax.models.registry import pretrained_config
from mllm_jax.models.stable_diffusion import StableDiffusionConfig
from mllm_jax.models.text_to_video import TextToVideoConfig

# The models that draw, by the class of their configs.
DRAWERS: dict[type, type[Drawer]] = {
    StableDiffusionConfig: Drawer,
    TextToVideoConfig: VideoDrawer,
    AudioLDM2Config: AudioLDM2Drawer,
}


class Draws:
    """The call `draw`, of an `Assistant` for a model in DRAWERS or for one that produces media in its answers."""

    model: nn.Module
    _drawer: Drawer | None
    _producer: Producer | None

    @property
    def drawer(self) -> Drawer | None:
        """The drawer of texts: the model's, or that of its generator of images, videos or sounds, the first it has.

        None: it draws no texts.
        """
        if self._producer is None:
            return self._drawer
        drawers = self._producer.drawers
        return next(drawers[modality] for modality in DRAWERS_OF_OUTPUTS if modality in drawers)

    def draw(
        self,
        prompts: str | Sequence[str],
        negative: str | Sequence[str] | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        seed: int | Sequence[int] = 0,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        seconds: float | None = None,
        latents: Any = None,
        noise: Any = None,
        start_image: Any = None,
        strength: float | None = None,
        on_step: Callable[[int, float, np.ndarray], Any] | None = None,
        *,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        scheduler: str | None = None,
        batch_size: int = 4,
    ) -> list[Answer]:
        """Draws images of texts, or videos or sounds.

        What is said of images holds for videos, whose arrays have frames too.

        An image depends on its own prompt and seed: it is the same alone and in any batch, up to rounding.

        Args:
            prompts: a text or a list of texts. What the text encoder cannot read is left out with a warning.
            negative: what the images do not show: one text, or one for each prompt.
            steps: of the scheduler.
            guidance_scale: weight of the prompt against the negative prompt (arXiv 2207.12598); up to 1 is no guidance.
            seed: of each prompt, or a list with one for each prompt; a prompt's images count up from its seed. Or a
                list with one for each image.
            count: images of each prompt.
            height, width: of the images in pixels, multiples of 8; None: as in the model's training.
            frames: of each video; None is 16, of which 8 are a second. Other models refuse it.
            seconds: of each sound. A sound's authors take 200 steps and a guidance_scale of 3.5 (AudioLDM-2); its
                latents are [time, mel bands, channels].
            latents: float[images, h, w, channels], the first noise of unit variance, before the scheduler's first
                scale; its shape fixes the size. None: from the seeds. Of videos: [videos, frames, h, w, channels], and
                likewise below.
            noise: float[n, images, h, w, channels], or without the first axis for n = 1: the other noises, in the order
                in which diffusers draws them. With a start image that is the noise of the distribution of its latents,
                and, without `latents`, the noise that is added to them; then one a step for a stochastic scheduler. The
                first of these may be left out: the latents are then the distribution's mean. None: from the seeds.
            start_image: an image, or one for each image, that drawing begins with: a path, the bytes of a file, a
                Pillow image, uint8[H, W, 3], or float[H, W, 3] in [0, 1]. It is resized to height and width; without
                them the images get its size. `latents` are then the noise that is added to it. Not for videos.
            strength: of the change of the start image: the share of the steps that is done. None is 0.8.
            on_step: called after each step with its number from 0, its timestep and the latents of the batch as
                float32[B, h, w, channels]; each batch counts from 0. An exception ends the drawing (over several
                devices at the end of the batch) and is raised.
            guidance_interval: shares of the steps at which guidance begins and ends (arXiv 2404.07724). Without it a
                step takes half the time, so (0, 0.5) is a quarter faster.
            scheduler: name of another scheduler, one of `mllm_jax.generators.schedulers.NAMES`, with the options of the
                folder's; None: the folder's.
            batch_size: images that are drawn together.

        Returns:
            An answer for each prompt and count, prompt by prompt, whose `media` is the image, the video or the sound,
            and whose text is its mark, "<image 1>", "<video 1>" or "<audio 1>".

        Raises:
            ConfigError: the model draws no images, an option is refused, or a size is no multiple.
            DataError: prompts, latents, noise or start images cannot be used; or a drawing became NaN.
        """
        if (drawer := self.drawer) is None:
            raise no_images(self.model.config)
        how = Drawing(
            negative, steps, guidance_scale, seed, count, height, width, frames, latents, noise, start_image, strength,
            guidance_interval, scheduler, batch_size, seconds,
        )  # fmt: skip
        return drawer.draw(prompts, how, on_step)


def drawer_of(folder: str | Path, **how: Any) -> Drawer:
    """Loads a folder's drawer; raises as `Drawer.load`. ConfigError: its model does not draw."""
    config = pretrained_config(folder)
    if type(config) not in DRAWERS:
        raise no_images(config)
    return DRAWERS[type(config)].load(folder, **how)


def no_images(config: Any) -> ConfigError:
    """Returns the error for a model that draws no images."""
    name = config.family or type(config).__name__.removesuffix("Config")
    return ConfigError(
        f"a {name}, asked to draw", "a Stable Diffusion or an AudioLDM-2", "name the folder of another model"
    )
