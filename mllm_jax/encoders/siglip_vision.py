"""SigLIP's vision tower (arXiv 2303.15343) as `SiglipVisionModel`: no class token, a learned query that pools."""

from __future__ import annotations

from mllm_jax.checkpoints.sample import image_sample
from mllm_jax.checkpoints.table import Family, Table
from mllm_jax.encoders.hub import Names, faithful, options_of, read_vit, vit_table, write_vit
from mllm_jax.encoders.vit import ViTConfig

# What an option is where config.json does not say.
_DEFAULTS = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
    image_size=224,
    patch_size=16,
)
_NAMES = Names(
    patch="vision_model.embeddings.patch_embedding",
    layers="vision_model.encoder.layers",
    position="vision_model.embeddings.position_embedding.weight",
    position_axes="n e",
    final_norm="vision_model.post_layernorm",
    pooler="vision_model.head",
    spellings=((r"^(embeddings|encoder|post_layernorm|head)\.", r"vision_model.\1."),),
    ignored=("vision_model.embeddings.position_ids",),
)


def from_hf_config(values: dict) -> ViTConfig:
    """config.json of SiglipVisionModel or `vision_config` of SiglipModel, every option honoured or refused by name."""
    options = options_of(values, _DEFAULTS, "SiglipVisionModel")
    pooler = "attention" if options.flag("vision_use_head", True) else "none"
    return read_vit(options, pooler=pooler, family="SiglipVisionModel")


def to_hf_config(config: ViTConfig) -> dict:
    """The reverse; refuses switches that the family does not have."""
    written = dict(vision_use_head=config.pooler == "attention")
    return faithful(config, write_vit(config) | written, from_hf_config)


def table(config: ViTConfig) -> Table:
    return vit_table(config, _NAMES)


FAMILIES = (
    Family(
        name="SigLIP vision",
        architectures=("SiglipVisionModel",),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=image_sample,
        oracle="SiglipVisionModel",
    ),
)
