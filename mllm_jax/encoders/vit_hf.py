"""ViT (arXiv 2010.11929) as `ViTModel`: class token, LayerNorm of epsilon 1e-12, a dense layer with tanh that pools."""

from __future__ import annotations

from mllm_jax.checkpoints.config_json import ENCODER_ACTIVATIONS, write_activation
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
    hidden_act="gelu",
    layer_norm_eps=1e-12,
    image_size=224,
    patch_size=16,
)
_POOLER_ACTIVATIONS = ENCODER_ACTIVATIONS | {"linear": None}
_NAMES = Names(
    patch="embeddings.patch_embeddings.projection",
    layers="encoder.layer",
    class_token="embeddings.cls_token",
    position="embeddings.position_embeddings",
    attention_norm="layernorm_before",
    q="attention.attention.query",
    k="attention.attention.key",
    v="attention.attention.value",
    out="attention.output.dense",
    mlp_norm="layernorm_after",
    up="intermediate.dense",
    down="output.dense",
    final_norm="layernorm",
    head="pooler.dense",
    # As transformers 5 names them in memory, and inside a larger model.
    spellings=(
        (r"^vit\.", ""),
        (r"^layers\.", "encoder.layer."),
        (r"\.attention\.([qkv])_proj\.", r".attention.attention.\1_proj."),
        (r"\.q_proj\.", ".query."),
        (r"\.k_proj\.", ".key."),
        (r"\.v_proj\.", ".value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    ignored=("embeddings.mask_token",),
)


def from_hf_config(values: dict) -> ViTConfig:
    """config.json of ViTModel, every option honoured or refused by name.

    `add_pooling_layer` is an argument of the reference class, not an option of its config.json; set to false there, a
    checkpoint without a pooler is read.
    """
    options = options_of(values, _DEFAULTS, "ViTModel")
    options.skip("encoder_stride")
    width = options.size("pooler_output_size", options.size("hidden_size"))
    activation = _POOLER_ACTIVATIONS[options.only("pooler_act", *_POOLER_ACTIVATIONS, default="tanh")]
    pooler = dict(head_size=width, head_activation=activation) if options.flag("add_pooling_layer", True) else {}
    return read_vit(
        options, class_token=True, qkv_bias=options.flag("qkv_bias", True), pooler="token", family="ViTModel", **pooler
    )


def to_hf_config(config: ViTConfig) -> dict:
    """The reverse; refuses switches that the family does not have."""
    written = write_vit(config) | dict(qkv_bias=config.qkv_bias)
    if config.head_size is None:
        written["add_pooling_layer"] = False
    else:
        activation = write_activation(config.head_activation) if config.head_activation else "linear"
        written |= dict(pooler_output_size=config.head_size, pooler_act=activation)
    return faithful(config, written, from_hf_config)


def table(config: ViTConfig) -> Table:
    return vit_table(config, _NAMES)


FAMILIES = (
    Family(
        name="ViT",
        architectures=("ViTModel",),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=image_sample,
        oracle="ViTModel",
    ),
)
