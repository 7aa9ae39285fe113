"""The first Qwen-VL (arXiv 2308.12966): a ViT-bigG, a resampler with 256 queries and the first Qwen.

Its folders have the architecture of the language model, `QWenLMHeadModel`, with a part `visual` in config.json. Their
tokenizer is Python code over qwen.tiktoken, which is never run here: the folder needs a tokenizer.json of the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mllm_jax.checkpoints.config_json import check_written, stored_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Table, Weight, beside, families, linear, nested
from mllm_jax.data.image_processors import ImageProcessor
from mllm_jax.data.images import Size
from mllm_jax.data.processing.layouts import TileLayout
from mllm_jax.data.processing.media import TEXT, PreparedMedia
from mllm_jax.encoders import qwen_vit_v1
from mllm_jax.encoders.qwen_vit_v1 import NORM_EPS, QwenViTV1Config
from mllm_jax.encoders.vit import VisionOutput
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.llms import qwen_v1
from mllm_jax.models.multimodal import Branch, MultimodalConfig
from mllm_jax.projectors.resampler import ResamplerConfig, ResamplerDialect

# Our names: Qwen-VL's repository has no class for the image encoder alone, and its folders name no architecture.
TOWER, WHOLE = "QWenVisionTransformer", "QWenVL"
_WHAT = "Qwen-VL's config.json"


# ---- ViT and resampler


@dataclass(frozen=True)
class QwenVLTowerConfig(WithCompute):
    """The config of the ViT and the resampler, without a language model: `VisionTransformer` of visual.py."""

    encoder: QwenViTV1Config = QwenViTV1Config()
    projector: ResamplerConfig = ResamplerConfig(output_size=4096)
    family: str = TOWER

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters."""
        parts = {"encoder_image": self.encoder, "projector_image": self.projector}
        return {name: within(part, self.compute) for name, part in parts.items()}

    def make(self) -> QwenVLTower:
        return QwenVLTower(self)


class QwenVLTower(nn.Module):
    """A module that maps pixels to media tokens."""

    config: QwenVLTowerConfig

    def setup(self):
        made = {name: part.make() for name, part in self.config.parts.items()}
        self.encoder_image, self.projector_image = made["encoder_image"], made["projector_image"]

    def __call__(self, pixels, output_hidden_states: bool = False) -> VisionOutput:
        """Encodes normalised pixels float[B, H, W, 3].

        Returns:
            VisionOutput with last_hidden_state [B, N, E], which the resampler reads, and pooler_output
            [B, num_queries, output_size], the media tokens, which are the reference's only output.

        Raises:
            DataError: images are not square, or no whole number of patches.
        """
        out = self.encoder_image(pixels, output_hidden_states)
        return out.replace(pooler_output=self.projector_image(out.last_hidden_state))


def read_tower(values: Mapping) -> QwenVLTowerConfig:
    """Reads the `visual` part of a Qwen-VL config.json, alone or within the whole; other entries are not read.

    Raises:
        ConfigError: the part is absent, or an option is not supported.
    """
    options = ConfigOptions(ConfigOptions(values, _WHAT).part("visual", {}) or values, f"the visual part of {_WHAT}")
    encoder = qwen_vit_v1.read_sizes(options)
    projector = ResamplerConfig(
        output_size=options.size("output_dim"),
        num_queries=options.size("n_queries", 256),
        dialect=ResamplerDialect(norm_eps=NORM_EPS),
    )
    options.skip("image_start_id")  # of images in the LLM's text
    options.done()
    return QwenVLTowerConfig(encoder, projector)


def write_tower(config: QwenVLTowerConfig) -> dict:
    """Writes the `visual` part. Raises ConfigError for sizes that the reference fixes, or another resampler."""
    encoder, projector = config.encoder, config.projector
    fixed = ResamplerConfig(projector.output_size, num_queries=projector.num_queries)
    fixed = replace(fixed, compute=projector.compute)
    default = QwenViTV1Config()
    given = (encoder.num_positions, encoder.image_mean, encoder.image_std, config.family)
    expected = (default.num_positions, default.image_mean, default.image_std, TOWER)
    if given != expected or projector != fixed:
        raise ConfigError(
            f"Qwen-VL's ViT with (positions, mean, std, family) {given} and {projector}",
            f"{expected} and {fixed}, which no option changes",
            "change them",
        )
    return dict(
        architectures=[TOWER],
        **qwen_vit_v1.write_sizes(encoder),
        n_queries=projector.num_queries,
        output_dim=projector.output_size,
    )


def resampler_weights(c: ResamplerConfig, feature_size: int) -> tuple[Weight, ...]:
    """Returns the resampler's weights under the names of visual.py, where its only layer has no number.

    Args:
        feature_size: width of its input.
    """
    layer, attention, heads = "layers", "attn_pool.attn", {"h": c.head_dim}
    weights = [
        Weight("attn_pool.query", "query"),
        Weight("attn_pool.pos_embed", "positions"),
        Weight("proj", "projection/kernel"),
        Weight(f"{attention}.out_proj.weight", f"{layer}/out/kernel", "e (n h) -> 1 n h e", heads),
        Weight(f"{attention}.out_proj.bias", f"{layer}/out/bias", "e -> 1 e"),
    ]
    for name, path, pattern in (
        ("attn_pool.ln_q", f"{layer}/query_norm", "e -> 1 e"),
        ("attn_pool.ln_kv", f"{layer}/kv_norm", "e -> 1 e"),
        ("ln_post", "output_norm", ""),
    ):
        weights.append(Weight(f"{name}.weight", f"{path}/scale", pattern))
        weights.append(Weight(f"{name}.bias", f"{path}/bias", pattern))
    if feature_size != c.width:
        weights += linear("attn_pool.kv_proj", "kv_projection", bias=False)
    for kind, ours, pattern in (("weight", "kernel", "(n h) e -> 1 e n h"), ("bias", "bias", "(n h) -> 1 n h")):
        stored = [(f"{attention}.in_proj_{kind}", f"{layer}/{part}/{ours}", c.width) for part in "qkv"]
        weights += beside(stored, pattern, heads)
    return tuple(weights)


def vision_weights(encoder: QwenViTV1Config, projector: ResamplerConfig, name: str = "") -> tuple[Weight, ...]:
    """Returns the weights of both parts, with the prefix `name`."""
    resampler = Table(resampler_weights(projector, encoder.hidden_size))
    return nested(qwen_vit_v1.table(encoder), name, "encoder_image/") + nested(resampler, name, "projector_image/")


def tower_table(config: QwenVLTowerConfig) -> Table:
    """Returns the weights of ViT and resampler; those of the LLM in a whole model's folder are ignored."""
    spellings = (
        (r"^(?:transformer\.)?visual\.", ""),
        (r"^(?:transformer\.(?:wte|h|ln_f|rotary_emb)|lm_head)\..+$", "language_model"),
    )
    return Table(vision_weights(config.encoder, config.projector), spellings, ("language_model",))


def tower_sample(config: QwenVLTowerConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    side = config.encoder.image_size
    return (jnp.zeros((1, side, side, 3)),)


# ---- the whole model


@dataclass(frozen=True)
class QwenVLV1Config(MultimodalConfig):
    """The config of the first Qwen-VL.

    Attributes:
        image_start_id: of the token before an image; the next id is the token after it, the one after that fills the
            positions of its media tokens.
    """

    family: str | None = WHOLE
    image_start_id: int = 151857

    def __post_init__(self):
        super().__post_init__()
        parts = type(self.image.encoder).__name__, type(self.image.projector).__name__, self.llm.family
        wanted = QwenViTV1Config.__name__, ResamplerConfig.__name__, qwen_v1.ARCHITECTURE
        if parts != wanted or self.family != WHOLE:
            raise ConfigError(
                f"Qwen-VL, family {self.family!r}, of {' and '.join(map(str, parts))}",
                f"family {WHOLE!r} of {' and '.join(wanted)}",
                "change the part, or compose a MultimodalConfig",
            )


class QwenVLV1Layout(TileLayout):
    """A layout of images resized to squares; 256 positions between a start token and an end token.

    In a text an image is `<img>its name</img>`, or `<img>` alone. The authors' code opens the file of that name; here
    images are given, and the name is left out.
    """

    def __init__(self, config: QwenVLV1Config):
        encoder = config.image.encoder
        side = (encoder.image_size, encoder.image_size)
        # Their code resizes with Pillow, bicubic, and has no preprocessor_config.json.
        self.image_processor = ImageProcessor(TOWER, side, mean=encoder.image_mean, std=encoder.image_std)
        self.config, self.image_token, self.tokens_a_tile = config, config.image_start_id, config.media_tokens
        self.end, self.filling = config.image_start_id + 1, config.image_start_id + 2

    def sized(self, size: Size) -> PreparedMedia:
        self.image_processor.require(size)
        count = self.tokens_a_tile
        tokens = np.array([self.image_token, *[self.filling] * count, self.end])
        return PreparedMedia({}, tokens, np.array([TEXT, *range(count), TEXT]), count=1)

    def image(self, image: np.ndarray) -> PreparedMedia:
        tile = self.image_processor.for_encoder(self.image_processor.prepare(image), self.config.image.encoder)
        return replace(self.sized(Size(*image.shape[:2])), arrays={"images": tile[None]})

    def without_names(self, ids: Sequence[int]) -> list[int]:
        kept, name_ends = [], -1
        for index, token in enumerate(ids):
            if index <= name_ends:
                continue
            kept.append(token)
            edges = (i for i in range(index + 1, len(ids)) if ids[i] in (self.image_token, self.end))
            if token == self.image_token and (edge := next(edges, None)) is not None and ids[edge] == self.end:
                name_ends = edge
        return kept


def layout(config: QwenVLV1Config, folder: Path) -> QwenVLV1Layout:
    """Returns the layout of a model, for which config.json suffices."""
    return QwenVLV1Layout(config)


def from_hf_config(values: dict) -> QwenVLV1Config:
    """Reads config.json of Qwen-VL or Qwen-VL-Chat; each option is honoured or refused by name."""
    if not ConfigOptions(values, _WHAT).part("visual", {}):
        raise ConfigError(f"{_WHAT} without a part 'visual'", "the image encoder's sizes", "restore it from its origin")
    tower = read_tower(values)
    return QwenVLV1Config(
        inputs={"image": Branch(tower.encoder, tower.projector)},
        llm=qwen_v1.from_hf_config({name: value for name, value in values.items() if name != "visual"}),
        image_start_id=ConfigOptions(values["visual"], f"the visual part of {_WHAT}").id("image_start_id", ...),
    )


def to_hf_config(config: QwenVLV1Config) -> dict:
    """Writes config.json; refuses options that the family does not have."""
    c = config
    visual = write_tower(QwenVLTowerConfig(c.image.encoder, c.image.projector)) | dict(image_start_id=c.image_start_id)
    visual.pop("architectures")
    written = qwen_v1.to_hf_config(c.llm) | dict(visual=visual)
    return check_written(c, written, from_hf_config, "a Qwen-VL", _facts)


def _facts(c: QwenVLV1Config) -> dict:
    """Returns the values of the whole model that config.json must keep; the parts check their own."""
    return stored_fields(c, "inputs", "llm") | dict(connection=c.image.connection)


def table(config: QwenVLV1Config) -> Table:
    llm = qwen_v1.table(config.llm)
    vision = vision_weights(config.image.encoder, config.image.projector, "transformer.visual.")
    return Table((*vision, *nested(llm, "", "llm/")), llm.spellings, llm.ignored)


FAMILIES = (
    *families(
        {TOWER: "Qwen-VL (first) ViT and resampler"},
        from_hf=read_tower,
        to_hf=write_tower,
        table=tower_table,
        sample=tower_sample,
        oracle="recorded outputs of Qwen-VL-Chat's visual.py",
    ),
    *families(
        {WHOLE: "Qwen-VL (first)"},
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        oracle="its tower's recorded outputs, and Qwen2ForCausalLM with the weights renamed",
        layout=layout,
    ),
)
