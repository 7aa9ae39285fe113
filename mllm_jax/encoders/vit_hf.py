"""ViT (arXiv 2010.11929) as `ViTModel`: class token, LayerNorm of epsilon 1e-12, a dense pooler with tanh."""

from __future__ import annotations

from mllm_jax.checkpoints.config_json import write_activation
from mllm_jax.checkpoints.config_options import ENCODER_ACTIVATIONS, ConfigOptions
from mllm_jax.encoders.vision_hub import ViTNames, vit_family
from mllm_jax.encoders.vit import ViTConfig

_POOLER_ACTIVATIONS = ENCODER_ACTIVATIONS | {"linear": None}


def _read_pooler(options: ConfigOptions) -> dict:
    """Reads the options of the dense layer after the pooling.

    `add_pooling_layer` is an argument of the reference class, not an option of its config.json; the value false in
    config.json selects a checkpoint without a pooler.
    """
    options.skip("encoder_stride")
    width = options.size("pooler_output_size", options.size("hidden_size"))
    activation = _POOLER_ACTIVATIONS[options.only("pooler_act", *_POOLER_ACTIVATIONS, default="tanh")]
    return dict(head_size=width, head_activation=activation) if options.flag("add_pooling_layer", True) else {}


def _write_pooler(config: ViTConfig) -> dict:
    dialect = config.dialect
    if dialect.head_size is None:
        return dict(add_pooling_layer=False)
    activation = write_activation(dialect.head_activation) if dialect.head_activation else "linear"
    return dict(pooler_output_size=dialect.head_size, pooler_act=activation)


FAMILY = vit_family(
    "ViTModel",
    name="ViT",
    defaults=dict(layer_norm_eps=1e-12),
    names=ViTNames(
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
        # The names of transformers 5 in memory, and inside a larger model.
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
    ),
    fields={"qkv_bias": ("qkv_bias", "flag", True)},
    read=_read_pooler,
    write=_write_pooler,
    class_token=True,
    pooler="token",
)
FAMILIES = (FAMILY,)
