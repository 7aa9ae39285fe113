"""InternViT (arXiv 2312.14238, 2404.16821): `InternVLVisionModel`, and the `InternVisionModel` of OpenGVLab's folders.

The 300M has LayerNorms and biases of queries, keys and values. The 6B has RMSNorms, no such biases, and an RMSNorm over
all heads of queries and keys before they are split. All use mean pooling, so there is no last norm.
"""

from __future__ import annotations

from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.encoders.vision_hub import ViTNames, vit_family

_NORMS = {"layer_norm": "layer", "rms_norm": "rms"}
_NORM_TYPES = {ours: theirs for theirs, ours in _NORMS.items()}
# Options in the folders of InternVL 2.5 and 3, which have no experts.
_OF_EXPERTS = (
    "capacity_factor", "eval_capacity_factor", "laux_allreduce", "moe_coeff_ratio", "moe_intermediate_size",
    "moe_output_scale", "noisy_gate_policy", "num_experts", "num_routed_experts", "num_shared_experts",
    "shared_expert_intermediate_size", "use_residual", "use_rts", "use_weighted_residual",
)  # fmt: skip


def _read_hub(options: ConfigOptions) -> dict:
    options.only("use_absolute_position_embeddings", True)
    options.skip("use_mask_token")
    # Without mean pooling a LayerNorm follows the last layer, for any norm_type.
    normed = not options.flag("use_mean_pooling", True)
    return dict(norm=_NORMS[options.only("norm_type", *_NORMS)], norm_output=normed)


def _read_original(options: ConfigOptions) -> dict:
    options.only("use_moe", False)
    options.skip(*_OF_EXPERTS)
    norm = _NORMS[options.only("norm_type", *_NORMS)]
    return dict(norm=norm, qk_norm_eps=options.number("layer_norm_eps", least=0.0))


HUB = vit_family(
    "InternVLVisionModel",
    name="InternViT",
    defaults=dict(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=448,
        patch_size=14,
        norm_type="layer_norm",
    ),
    names=ViTNames(
        patch="embeddings.patch_embeddings.projection",
        layers="encoder.layer",
        class_token="embeddings.cls_token",
        position="embeddings.position_embeddings",
        attention_norm="layernorm_before",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        q_norm="attention.q_norm",
        k_norm="attention.k_norm",
        out="attention.projection_layer",
        attention_scale="lambda_1",
        mlp_norm="layernorm_after",
        mlp_scale="lambda_2",
        final_norm="layernorm",
        spellings=((r"^vision_tower\.", ""),),
        ignored=("embeddings.mask_token",),
    ),
    fields={
        "qkv_bias": ("attention_bias", "flag", False),
        "qk_norm": ("use_qk_norm", "flag", False),
        "layer_scale": ("layer_scale_init_value", "number", 0.1),
    },
    read=_read_hub,
    write=lambda config: dict(
        norm_type=_NORM_TYPES[config.dialect.norm], use_mean_pooling=not config.dialect.norm_output
    ),
    class_token=True,
    pooler="none",
)
ORIGINAL = vit_family(
    "InternVisionModel",
    name="InternViT (OpenGVLab)",
    oracle="OpenGVLab's code",
    defaults=dict(
        hidden_size=3200,
        num_hidden_layers=48,
        num_attention_heads=25,
        intermediate_size=12800,
        patch_size=14,
        norm_type="rms_norm",
    ),
    names=ViTNames(
        patch="embeddings.patch_embedding",
        layers="encoder.layers",
        class_token="embeddings.class_embedding",
        position="embeddings.position_embedding",
        attention_norm="norm1",
        q="attn.qkv",
        k="attn.qkv",
        v="attn.qkv",
        q_norm="attn.q_norm",
        k_norm="attn.k_norm",
        out="attn.proj",
        attention_scale="ls1",
        mlp_norm="norm2",
        mlp_scale="ls2",
        spellings=((r"^vision_model\.", ""),),
    ),
    fields={
        "qkv_bias": ("qkv_bias", "flag", False),
        "qk_norm": ("qk_normalization", "flag", True),
        "layer_scale": ("initializer_factor", "number", 0.1),
    },
    read=_read_original,
    write=lambda config: dict(norm_type=_NORM_TYPES[config.dialect.norm]),
    class_token=True,
    norm_output=False,
    pooler="token",
)
FAMILIES = (HUB, ORIGINAL)
