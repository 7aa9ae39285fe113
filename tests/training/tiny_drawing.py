"""A tiny model that draws colours, and its data, for tests of models that produce media."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from toy_data import COLOURS, MODEL, SIZE

from mllm_jax.data.message import Example, Image, Message, Text
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.generators.schedulers.ddim import DDIM
from mllm_jax.generators.unet import UNetConfig, UNetDialect
from mllm_jax.models.output import Output
from mllm_jax.models.text_to_image import TextToImageConfig
from mllm_jax.output_projectors.query_connector import QueryConnectorConfig
from mllm_jax.output_projectors.transformer import TransformerMapperConfig

LENGTH, WIDTH = 6, 16  # of a caption
GENERATOR = TextToImageConfig(
    text_encoder=TextTowerConfig(max_length=LENGTH, hidden_size=WIDTH, num_layers=1, num_heads=2, mlp_size=32),
    unet=UNetConfig(
        sample_size=(SIZE,),
        in_channels=3,
        out_channels=3,
        channels=(8, 16),
        layers=(1, 1),
        num_heads=(2, 2),
        text_sizes=((WIDTH,),) * 2,
        depths=(1, 1),
        down_blocks=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_blocks=("CrossAttnUpBlock2D", "UpBlock2D"),
        dialect=UNetDialect(norm_groups=4, only_cross=(False,) * 2),
    ),
    vae=None,
    scheduler=DDIM(clip_sample=False),
)
MAPPER = TransformerMapperConfig(
    tokens=3, output_tokens=LENGTH, output_size=WIDTH, hidden_size=16, num_layers=1, num_heads=2, mlp_size=32
)
CONNECTOR = QueryConnectorConfig(tokens=LENGTH, output_size=WIDTH, num_layers=1, hidden_size=32, head_dim=16)


def drawing_model(queries: bool = False, **changes):
    """Returns a model that reads and draws images, with signal tokens and a mapper, or with queries and a connector."""
    output = Output(CONNECTOR if queries else MAPPER, GENERATOR, queries=queries)
    return replace(MODEL, outputs={"image": output}, **changes)


def shade(colour: str, number: int) -> np.ndarray:
    """Returns uint8[SIZE, SIZE, 3] of one value for each colour."""
    value = 20 * COLOURS.index(colour) + number
    return np.full((SIZE, SIZE, 3), value, np.uint8)


@dataclass(frozen=True)
class Drawings:
    """Requests to draw a colour, which are answered by an image, and questions about one, answered by its name."""

    size: int = 60
    name: str = "drawings"
    reads: bool = True  # whether some questions are about an image

    def build(self) -> DrawingSource:
        return DrawingSource(self)


class DrawingSource:
    def __init__(self, config: Drawings):
        self.config, self.name = config, config.name

    def __len__(self) -> int:
        return self.config.size

    def example(self, index: int) -> Example:
        colour = COLOURS[index % len(COLOURS)]
        image = shade(colour, index % 5)
        if index % 3 == 0 and self.config.reads:
            asked = (Image(image), Text("what colour"))
            return Example((Message("user", asked), Message("assistant", colour)))
        answer = (Text("here"), Image(image, caption=colour))
        messages = (Message("user", f"draw {colour}"), Message("assistant", answer))
        more = (Message("user", "again"), Message("assistant", (Image(image, caption=f"{colour} {colour}"),)))
        return Example(messages + more * (index % 2))

    def fingerprint(self) -> str:
        return repr(self.config)
