"""DeepSeek-VL (arXiv 2403.05525): SigLIP, in the larger model beside SAM, a projector, LLaMA; a picture is one tile.

Read are folders of transformers' classes, such as deepseek-community's, not the authors' own `MultiModalityCausalLM`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mllm_jax.checkpoints.architectures import architecture, kind_of, nameless
from mllm_jax.checkpoints.config_json import check_written, stored_fields
from mllm_jax.checkpoints.options import Options
from mllm_jax.checkpoints.table import Table, families, linear, nested
from mllm_jax.data.image_processors import ImageProcessor, read_image_processor
from mllm_jax.data.image_steps import mismatch
from mllm_jax.data.images import Size
from mllm_jax.data.processing.layouts import TileLayout
from mllm_jax.data.processing.media import Media
from mllm_jax.encoders import sam, siglip_vision
from mllm_jax.encoders.siglip_sam import SiglipSamConfig, siglip_sam_weights
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.layers.requirements import Requirements
from mllm_jax.models.clip import CLIP_MEAN, CLIP_STD
from mllm_jax.models.multimodal import Branch, MultimodalConfig
from mllm_jax.models.parts import llm_table, read_llm, write_llm
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.projectors.paired import PairedProjectorConfig

SINGLE, HYBRID = "DeepseekVLForConditionalGeneration", "DeepseekVLHybridForConditionalGeneration"
_WHAT = "a DeepSeek-VL"


@dataclass(frozen=True)
class DeepseekVLConfig(MultimodalConfig):
    """What DeepSeek-VL's config.json says besides its parts.

    Attributes:
        image_token_id: of the token that stands for a picture and for each of its media tokens.
        preprocessing: "hub", as in transformers, or "original", as in the authors' repository: the shorter side of a
            picture is cut off to whole pixels where "hub" rounds; beside SAM, SigLIP's picture is made on the device,
            of SAM's pixels, bilinear with antialiasing and never rounded to bytes. No config.json says it.
    """

    family: str | None = HYBRID
    image_token_id: int = 100015
    preprocessing: str = "hub"

    def __post_init__(self):
        super().__post_init__()
        require = Requirements("DeepSeek-VL", self)
        require.one_of("family", (SINGLE, HYBRID))
        require.one_of("preprocessing", ("hub", "original"))
        parts = type(self.image.encoder).__name__, type(self.image.projector).__name__
        wanted = (SiglipSamConfig, PairedProjectorConfig) if self.hybrid else (ViTConfig, MLPProjectorConfig)
        require(
            isinstance(self.image.encoder, wanted[0]) and isinstance(self.image.projector, wanted[1]),
            f"{self.family} with encoder {parts[0]}, projector {parts[1]}",
            " and ".join(each.__name__ for each in wanted),
            "change the parts, or family",
        )
        require(
            not self.hybrid or self.image.projector.widths == self.image.encoder.widths,
            f"a projector for widths {getattr(self.image.projector, 'widths', None)}",
            f"the encoder's {getattr(self.image.encoder, 'widths', None)}",
            "change projector.widths",
        )

    @property
    def hybrid(self) -> bool:
        """Whether there is a SAM."""
        return self.family == HYBRID


# ---- pictures


class DeepseekVLLayout(TileLayout):
    """DeepSeek-VL's pictures: a square with margins of one colour; for the hybrid a large one and, below it, a small.

    Args:
        config: the model's.
        pictures: what prepares them.

    Raises:
        ConfigError: a processor that makes other pictures than the model reads.
    """

    def __init__(self, config: DeepseekVLConfig, pictures: ImageProcessor):
        sides = [config.image.encoder.image_size] + ([config.image.encoder.low.image_size] if config.hybrid else [])
        made = [pictures] + ([pictures.low] if pictures.low is not None else [])
        if [{each.output_size(7, 9), each.output_size(9, 7)} for each in made] != [{(side, side)} for side in sides]:
            raise mismatch(
                f"a {pictures.kind} that makes pictures of {[each.output_size(7, 9) for each in made]}",
                f"squares of {' and '.join(map(str, sides))} pixels, as the model reads",
            )
        self.config, self.pictures = config, replace(pictures, cuts_off=config.preprocessing == "original")
        self.image_token, self.tokens_a_tile = config.image_token_id, config.media_tokens

    def sized(self, size: Size) -> Media:
        self.pictures.require(size)
        return Media({}, np.full(self.tokens_a_tile, self.image_token), np.arange(self.tokens_a_tile), count=1)

    def image(self, picture: np.ndarray) -> Media:
        tile = self.pictures.prepare(picture)
        tile = self._both(tile) if self.config.hybrid else self.pictures.for_encoder(tile, self.config.image.encoder)
        return replace(self.sized(Size(*picture.shape[:2])), arrays={"images": tile[None]})

    def _both(self, large: np.ndarray) -> np.ndarray:
        """The hybrid's picture, see `SiglipSam`: bytes, or numbers from 0 to 1."""
        encoder, processor = self.config.image.encoder, self.pictures
        shown = [(large, processor, encoder.high)]
        if self.config.preprocessing == "hub":
            shown.append((processor.low.prepare(large), processor.low, encoder.low))
        parts = [made.for_encoder(pixels, tower) for pixels, made, tower in shown]
        if any(part.dtype != np.uint8 for part in parts):
            # Settings other than those that the towers' configs have: numbers that become theirs on the device.
            parts = [
                made.normalise(pixels) * np.float32(tower.image_std) + np.float32(tower.image_mean)
                for pixels, made, tower in shown
            ]
        if len(parts) == 1:
            return parts[0]
        margin = large.shape[1] - parts[1].shape[1]
        return np.concatenate([parts[0], np.pad(parts[1], [(0, 0), (0, margin), (0, 0)])])


def layout(config: DeepseekVLConfig, folder: Path) -> DeepseekVLLayout:
    """The layout of a model in a folder with its processor's settings."""
    return DeepseekVLLayout(config, read_image_processor(folder))


# ---- Hugging Face folders


def from_hf_config(values: dict) -> DeepseekVLConfig:
    """config.json of either kind, every option honoured or refused by name."""
    family = architecture(values, SINGLE, HYBRID)
    what = f"config.json of {family}"
    options = Options(values, what)
    text = options.part("text_config")
    text.setdefault("model_type", "llama")
    # The whole model's word goes before the part's; where it says nothing, old files mean what the part says.
    tied = options.flag("tie_word_embeddings", Options(text, what).flag("tie_word_embeddings", False))
    llm = read_llm(text | {"tie_word_embeddings": tied}, what)
    encoder = low = _read_siglip(options.part("vision_config"), what)
    projector = MLPProjectorConfig(llm.hidden_size)
    if family == HYBRID:
        high = _read_sam(options.part("high_res_vision_config"), what)
        # transformers' class has no option for these widths.
        encoder = SiglipSamConfig(low, high, (2 * high.output_channels, 4 * high.output_channels))
        projector = PairedProjectorConfig(llm.hidden_size, encoder.widths)
    token = options.id("image_token_id", 100015)
    options.skip("bos_token_id", "eos_token_id", "pad_token_id")
    options.done()
    return DeepseekVLConfig({"image": Branch(encoder, projector)}, llm, family=family, image_token_id=token)


def _part(values: dict, kind: str, what: str) -> dict:
    """A tower's options, if it is that kind of tower."""
    if values.get("model_type", kind) != kind:
        raise ConfigError(f"{what}: a tower {values['model_type']!r}", kind, "convert another checkpoint")
    return nameless(values)


def _read_siglip(values: dict, what: str) -> ViTConfig:
    return siglip_vision.FAMILY.from_hf(_part(values, "siglip_vision_model", what))


def _read_sam(values: dict, what: str) -> sam.SamConfig:
    # The conversion of the authors' weights wrote this word, which the class does not know and mlp_ratio means too.
    values = {name: value for name, value in values.items() if name != "intermediate_size"}
    read = sam.from_hf_config(_part(values, "sam_vision_model", what))
    return replace(read, image_mean=CLIP_MEAN, image_std=CLIP_STD)


def to_hf_config(config: DeepseekVLConfig) -> dict:
    """The inverse; refuses switches that the family does not have."""
    c = config
    written = dict(
        **kind_of(c.family),
        text_config=write_llm(c.llm, _WHAT),
        vision_config=siglip_vision.FAMILY.to_hf(c.image.encoder.low if c.hybrid else c.image.encoder),
        tie_word_embeddings=c.llm.tie_word_embeddings,
        image_token_id=c.image_token_id,
    )
    if c.hybrid:
        written |= dict(high_res_vision_config=sam.to_hf_config(c.image.encoder.high))
    return check_written(c, written, from_hf_config, _WHAT, _facts)


def _facts(c: DeepseekVLConfig) -> dict:
    """What a config.json has to say of the whole; the parts have seen to themselves."""
    p = c.image.projector
    projector = stored_fields(p) | (dict(hidden_size=p.hidden_size or p.output_size) if not c.hybrid else {})
    downsample = c.image.encoder.downsample if c.hybrid else ()
    parts = dict(connection=c.image.connection, projector=projector, encoder=downsample)
    return stored_fields(c, "inputs", "llm", "preprocessing") | parts


def table(config: DeepseekVLConfig) -> Table:
    c = config
    tower = siglip_vision.FAMILY.table(c.image.encoder.low if c.hybrid else c.image.encoder)
    llm = llm_table(c.llm, _WHAT)
    if c.hybrid:
        weights = list(nested(Table(tuple(siglip_sam_weights(c.image.encoder))), "model.", "encoder_image/"))
        maps = dict(high_res_vision_proj="first", vision_proj="second", proj="out")
    else:
        weights = list(nested(tower, "model.vision_model.", "encoder_image/"))
        maps = dict(linear1="linear_1", linear2="linear_2")
    for hub, ours in maps.items():
        weights += linear(f"model.aligner.{hub}", f"projector_image/{ours}")
    weights += [dataclasses.replace(w, name=_in_llm(w.name), path=f"llm/{w.path}") for w in llm.weights]
    ignored = [f"model.vision_model.{name}" for name in tower.ignored] + [_in_llm(name) for name in llm.ignored]
    spellings = (
        (r"^model\.vision_model\.(embeddings|encoder|post_layernorm|head)\.", r"model.vision_model.vision_model.\1."),
    )
    return Table(tuple(weights), spellings, tuple(ignored))


def _in_llm(name: str) -> str:
    """A name of the LLM's own folder: all but its head lies deeper here."""
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


FAMILIES = families(
    {SINGLE: "DeepSeek-VL", HYBRID: "DeepSeek-VL with SAM"},
    from_hf=from_hf_config,
    to_hf=to_hf_config,
    table=table,
    layout=layout,
)
