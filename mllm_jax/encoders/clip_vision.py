"""CLIP's vision tower (arXiv 2103.00020) as `CLIPVisionModel`: a norm before the first layer, patches without a bias.

The last norm is taken on the pooled class token only; `last_hidden_state` is without it.
"""

from __future__ import annotations

from mllm_jax.checkpoints.sample import image_sample
from mllm_jax.checkpoints.table import Family, Table
from mllm_jax.encoders.hub import Names, faithful, options_of, read_vit, vit_table, write_vit
from mllm_jax.encoders.vit import ViTConfig

# What an option is where config.json does not say: OpenAI's B/32, with their approximate GELU.
_DEFAULTS = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    image_size=224,
    patch_size=32,
)
_NAMES = Names(
    patch="vision_model.embeddings.patch_embedding",
    layers="vision_model.encoder.layers",
    class_token="vision_model.embeddings.class_embedding",
    token_axes="e",
    position="vision_model.embeddings.position_embedding.weight",
    position_axes="n e",
    pre_norm="vision_model.pre_layrnorm",
    final_norm="vision_model.post_layernorm",
    spellings=((r"^(embeddings|pre_layrnorm|encoder|post_layernorm)\.", r"vision_model.\1."),),
    ignored=("vision_model.embeddings.position_ids",),
)


def from_hf_config(values: dict) -> ViTConfig:
    """config.json of CLIPVisionModel or `vision_config` of CLIPModel, every option honoured or refused by name."""
    return read_vit(
        options_of(values, _DEFAULTS, "CLIPVisionModel"),
        class_token=True,
        patch_bias=False,
        pre_norm=True,
        norm_output=False,
        norm_pooled=True,
        pooler="token",
        family="CLIPVisionModel",
    )


def to_hf_config(config: ViTConfig) -> dict:
    """The reverse; refuses switches that the family does not have."""
    return faithful(config, write_vit(config), from_hf_config)


def table(config: ViTConfig) -> Table:
    return vit_table(config, _NAMES)


FAMILIES = (
    Family(
        name="CLIP vision",
        architectures=("CLIPVisionModel",),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=image_sample,
        oracle="CLIPVisionModel",
    ),
)
