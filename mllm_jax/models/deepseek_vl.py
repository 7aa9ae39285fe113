"""DeepSeek-VL (arXiv 2403.05525): SigLIP, in the larger model also SAM, a projector, LLaMA; an image is one tile.

Supports folders of transformers' classes, such as deepseek-community's, not the authors' `MultiModalityCausalLM`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mllm_jax.checkpoints.architectures import architecture, kind_of, nameless
from mllm_jax.checkpoints.config_json import check_written, stored_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Table, families, linear, nested
from mllm_jax.data.image_processors import ImageProcessor, read_image_processor
from mllm_jax.data.image_steps import mismatch
from mllm_jax.data.images import Size
from mllm_jax.data.processing.layouts import TileLayout
from mllm_jax.data.processing.media import PreparedMedia
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
    """The config of DeepSeek-VL.

    Attributes:
        image_token_id: of the token that stands for an image and for each of its media tokens.
        preprocessing: "hub", as in transformers, or "original", as in the authors' repository, which rounds the shorter
            side of an image down, where "hub" rounds to the nearest. With SAM, "original" also makes SigLIP's image on
            the device from SAM's pixels, bilinear with antialiasing, never rounded to bytes. No config.json has it.
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
        """True if the model has a SAM."""
        return self.family == HYBRID


# ---- images


class DeepseekVLLayout(TileLayout):
    """A layout of square images with margins of one colour; the hybrid reads a large one and below it a small one.

    Args:
        config: the model's.
        image_processor: the image processor.

    Raises:
        ConfigError: the processor makes other images than the model reads.
    """

    def __init__(self, config: DeepseekVLConfig, image_processor: ImageProcessor):
        sides = [config.image.encoder.image_size] + ([config.image.encoder.low.image_size] if config.hybrid else [])
        made = [image_processor] + ([image_processor.low] if image_processor.low is not None else [])
        if [{each.output_size(7, 9), each.output_size(9, 7)} for each in made] != [{(side, side)} for side in sides]:
            raise mismatch(
                f"a {image_processor.kind} that makes images of {[each.output_size(7, 9) for each in made]}",
                f"squares of {' and '.join(map(str, sides))} pixels, as the model reads",
            )
        self.config = config
        self.image_processor = replace(image_processor, cuts_off=config.preprocessing == "original")
        self.image_token, self.tokens_a_tile = config.image_token_id, config.media_tokens

    def sized(self, size: Size) -> PreparedMedia:
        self.image_processor.require(size)
        return PreparedMedia({}, np.full(self.tokens_a_tile, self.image_token), np.arange(self.tokens_a_tile), count=1)

    def image(self, image: np.ndarray) -> PreparedMedia:
        tile = self.image_processor.prepare(image)
        if self.config.hybrid:
            tile = self._both(tile)
        else:
            tile = self.image_processor.for_encoder(tile, self.config.image.encoder)
        return replace(self.sized(Size(*image.shape[:2])), arrays={"images": tile[None]})

    def _both(self, large: np.ndarray) -> np.ndarray:
        """Returns the hybrid's input, see `SiglipSam`: bytes, or numbers from 0 to 1."""
        encoder, processor = self.config.image.encoder, self.image_processor
        shown = [(large, processor, encoder.high)]
        if self.config.preprocessing == "hub":
            shown.append((processor.low.prepare(large), processor.low, encoder.low))
        parts = [made.for_encoder(pixels, part) for pixels, made, part in shown]
        if any(part.dtype != np.uint8 for part in parts):
            # The settings differ from the encoders' configs: numbers that the device normalises to the right values.
            parts = [
                made.normalise(pixels) * np.float32(part.image_std) + np.float32(part.image_mean)
                for pixels, made, part in shown
            ]
        if len(parts) == 1:
            return parts[0]
        margin = large.shape[1] - parts[1].shape[1]
        return np.concatenate([parts[0], np.pad(parts[1], [(0, 0), (0, margin), (0, 0)])])


def layout(config: DeepseekVLConfig, folder: Path) -> DeepseekVLLayout:
    """Returns the layout of a model with its folder's processor settings."""
    return DeepseekVLLayout(config, read_image_processor(folder))


# ---- Hugging Face folders


def from_hf_config(values: dict) -> DeepseekVLConfig:
    """Reads config.json of either kind; each option is honoured or refused by name."""
    family = architecture(values, SINGLE, HYBRID)
    what = f"config.json of {family}"
    options = ConfigOptions(values, what)
    text = options.part("text_config")
    text.setdefault("model_type", "llama")
    # The whole model's option takes precedence; if it is absent, as in old files, the LLM's part decides.
    tied = options.flag("tie_word_embeddings", ConfigOptions(text, what).flag("tie_word_embeddings", False))
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
    """Returns an encoder's options. Raises ConfigError if it is of another kind."""
    if values.get("model_type", kind) != kind:
        raise ConfigError(f"{what}: an encoder {values['model_type']!r}", kind, "convert another checkpoint")
    return nameless(values)


def _read_siglip(values: dict, what: str) -> ViTConfig:
    return siglip_vision.FAMILY.from_hf(_part(values, "siglip_vision_model", what))


def _read_sam(values: dict, what: str) -> sam.SamConfig:
    # The conversion of the authors' weights wrote this option, which the class lacks; mlp_ratio has the same meaning.
    values = {name: value for name, value in values.items() if name != "intermediate_size"}
    read = sam.from_hf_config(_part(values, "sam_vision_model", what))
    return replace(read, image_mean=CLIP_MEAN, image_std=CLIP_STD)


def to_hf_config(config: DeepseekVLConfig) -> dict:
    """Writes config.json; refuses options that the family does not have."""
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
    """Returns the values of the whole model that config.json must keep; the parts check their own."""
    p = c.image.projector
    projector = stored_fields(p) | (dict(hidden_size=p.hidden_size or p.output_size) if not c.hybrid else {})
    downsample = c.image.encoder.downsample if c.hybrid else ()
    parts = dict(connection=c.image.connection, projector=projector, encoder=downsample)
    return stored_fields(c, "inputs", "llm", "preprocessing") | parts


def table(config: DeepseekVLConfig) -> Table:
    c = config
    siglip = siglip_vision.FAMILY.table(c.image.encoder.low if c.hybrid else c.image.encoder)
    llm = llm_table(c.llm, _WHAT)
    if c.hybrid:
        weights = list(nested(Table(tuple(siglip_sam_weights(c.image.encoder))), "model.", "encoder_image/"))
        maps = dict(high_res_vision_proj="first", vision_proj="second", proj="out")
    else:
        weights = list(nested(siglip, "model.vision_model.", "encoder_image/"))
        maps = dict(linear1="linear_1", linear2="linear_2")
    for hub, ours in maps.items():
        weights += linear(f"model.aligner.{hub}", f"projector_image/{ours}")
    weights += [dataclasses.replace(w, name=_in_llm(w.name), path=f"llm/{w.path}") for w in llm.weights]
    ignored = [f"model.vision_model.{name}" for name in siglip.ignored] + [_in_llm(name) for name in llm.ignored]
    spellings = (
        (r"^model\.vision_model\.(embeddings|encoder|post_layernorm|head)\.", r"model.vision_model.vision_model.\1."),
    )
    return Table(tuple(weights), spellings, tuple(ignored))


def _in_llm(name: str) -> str:
    """Maps a name of an LLM's folder to this model's: all except the head are nested deeper."""
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


FAMILIES = families(
    {SINGLE: "DeepSeek-VL", HYBRID: "DeepSeek-VL with SAM"},
    from_hf=from_hf_config,
    to_hf=to_hf_config,
    table=table,
    layout=layout,
)
