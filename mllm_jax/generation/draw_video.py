"""Drawing of videos: prompts and negative prompts to frames, with a Zeroscope."""

from __future__ import annotations

import numpy as np

from mllm_jax.errors import ConfigError
from mllm_jax.generation.draw import Drawer, Drawing
from mllm_jax.generation.media import Media
from mllm_jax.generation.options import Answer
from mllm_jax.models.text_to_video import TextToVideoConfig


class VideoDrawer(Drawer):
    """A model that draws videos, with its tokenizer; the arguments are those of `Drawer`."""

    made, axes = "videos", ("frames", "height", "width")
    refused = ("seconds", "start_image")

    @property
    def config(self) -> TextToVideoConfig:
        return self.model.config

    # ---- inside

    def _frames(self, how: Drawing) -> int:
        """Returns the number of frames of a video. Raises ConfigError: latents have another one."""
        given = np.shape(how.latents)[-4:-3]
        if how.frames is not None and given not in ((), (how.frames,)):
            raise ConfigError(
                f"frames {how.frames} beside latents of {given[0]}", "latents alone, or of that number", "drop frames"
            )
        return given[0] if given else how.frames or self.config.frames

    def _shape(self, how: Drawing, height: int, width: int) -> tuple[int, ...]:
        return self._frames(how), *super()._shape(how, height, width)

    def _size_shown(self, how: Drawing, height: int, width: int) -> dict[str, str]:
        return super()._size_shown(how, height, width) | dict(frames=str(self._frames(how)))

    def _answer(self, made: np.ndarray, how: Drawing, metadata: dict[str, str]) -> Answer:
        return Answer("<video 1>", (), media=(Media("video", made, self.config.rate, metadata),))
