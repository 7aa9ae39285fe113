"""InternViT (arXiv 2312.14238, 2404.16821): `InternVLVisionModel`, and the `InternVisionModel` of OpenGVLab's folders.

The 300M has LayerNorms and biases of queries, keys and values; the 6B has RMSNorms, no such biases, and an RMSNorm over
all heads of queries and keys before they are split. With mean pooling, which all have, there is no last norm.
"""

from __future__ import annotations

from mllm_jax.checkpoints.architectures import model_type
from mllm_jax.checkpoints.options import named_as
from mllm_jax.checkpoints.sample import image_sample
from mllm_jax.checkpoints.table import Family, Table
from mllm_jax.encoders.hub import Names, faithful, options_of, read_vit, vit_table, write_vit
from mllm_jax.encoders.vit import ViTConfig

_HF, _ORIGINAL = "InternVLVisionModel", "InternVisionModel"
_NORMS = {"layer_norm": "layer", "rms_norm": "rms"}
# What an option is where config.json does not say, by class.
_COMMON = dict(hidden_act="gelu", layer_norm_eps=1e-6, patch_size=14)
_DEFAULTS = {
    _HF: _COMMON
    | dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=448)
    | dict(norm_type="layer_norm", attention_bias=False, use_qk_norm=False, layer_scale_init_value=0.1),
    _ORIGINAL: _COMMON
    | dict(hidden_size=3200, num_hidden_layers=48, num_attention_heads=25, intermediate_size=12800, image_size=224)
    | dict(norm_type="rms_norm", qkv_bias=False, qk_normalization=True, initializer_factor=0.1),
}
# Which the folders of InternVL 2.5 and 3 list, though they have no experts.
_OF_EXPERTS = (
    "capacity_factor", "eval_capacity_factor", "laux_allreduce", "moe_coeff_ratio", "moe_intermediate_size",
    "moe_output_scale", "noisy_gate_policy", "num_experts", "num_routed_experts", "num_shared_experts",
    "shared_expert_intermediate_size", "use_residual", "use_rts", "use_weighted_residual",
)  # fmt: skip
# The three options that the two spell differently.
_SPELT = {
    _HF: dict(qkv_bias="attention_bias", qk_norm="use_qk_norm", layer_scale="layer_scale_init_value"),
    _ORIGINAL: dict(qkv_bias="qkv_bias", qk_norm="qk_normalization", layer_scale="initializer_factor"),
}
# Their words for the same tensors, Hugging Face's beside OpenGVLab's.
_WORDS = {
    "patch": ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    "layers": ("encoder.layer", "encoder.layers"),
    "class_token": ("embeddings.cls_token", "embeddings.class_embedding"),
    "position": ("embeddings.position_embeddings", "embeddings.position_embedding"),
    "attention_norm": ("layernorm_before", "norm1"),
    "q": ("attention.q_proj", "attn.qkv"),
    "k": ("attention.k_proj", "attn.qkv"),
    "v": ("attention.v_proj", "attn.qkv"),
    "q_norm": ("attention.q_norm", "attn.q_norm"),
    "k_norm": ("attention.k_norm", "attn.k_norm"),
    "out": ("attention.projection_layer", "attn.proj"),
    "attention_scale": ("lambda_1", "ls1"),
    "mlp_norm": ("layernorm_after", "norm2"),
    "mlp_scale": ("lambda_2", "ls2"),
    "final_norm": ("layernorm", "post_layernorm"),
    "spellings": (((r"^vision_tower\.", ""),), ((r"^vision_model\.", ""),)),
    "ignored": (("embeddings.mask_token",), ()),
}
_NAMES = {
    family: Names(**{field: words[i] for field, words in _WORDS.items()}) for i, family in enumerate((_HF, _ORIGINAL))
}


def from_hf_config(values: dict) -> ViTConfig:
    """config.json of either class, or `vision_config` of InternVL, every option honoured or refused by name."""
    named, kind = named_as(values)
    original = named == (_ORIGINAL,) or kind == model_type(_ORIGINAL)
    family = _ORIGINAL if original else _HF
    options = options_of(values, _DEFAULTS[family], family)
    norm = _NORMS[options.only("norm_type", *_NORMS)]
    normed = False
    if family == _ORIGINAL:
        options.only("use_moe", False)
        options.skip(*_OF_EXPERTS)
    if family == _HF:
        options.only("use_absolute_position_embeddings", True)
        options.skip("use_mask_token")
        # Without mean pooling a LayerNorm follows the last layer, whatever norm_type says.
        normed = not options.flag("use_mean_pooling", True)
    spelt = _SPELT[family]
    switches = {ours: options.flag(spelt[ours]) for ours in ("qkv_bias", "qk_norm")}
    switches["layer_scale"] = options.number(spelt["layer_scale"])
    return read_vit(
        options,
        class_token=True,
        norm=norm,
        norm_output=normed,
        qk_norm_eps=1e-6 if family == _HF else options.number("layer_norm_eps", least=0.0),
        pooler="none" if family == _HF else "token",
        family=family,
        **switches,
    )


def to_hf_config(config: ViTConfig) -> dict:
    """The reverse; refuses switches that the family does not have."""
    c = config
    written = write_vit(c)
    written["norm_type"] = next(theirs for theirs, ours in _NORMS.items() if ours == c.norm)
    written |= {theirs: getattr(c, ours) for ours, theirs in _SPELT[c.family].items()}
    if c.family == _HF:
        written["use_mean_pooling"] = not c.norm_output
    return faithful(c, written, from_hf_config)


def table(config: ViTConfig) -> Table:
    return vit_table(config, _NAMES[config.family])


FAMILIES = (
    Family(
        name="InternViT",
        architectures=(_HF,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=image_sample,
    ),
    Family(
        name="InternViT (OpenGVLab)",
        architectures=(_ORIGINAL,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=image_sample,
        oracle="OpenGVLab's code",
    ),
)
