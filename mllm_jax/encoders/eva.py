"""EVA: EVA-01 (arXiv 2303.15389) as `Blip2VisionModel`; EVA-01 and EVA-02-CLIP (arXiv 2303.11331) in timm's folders.

EVA's queries and values have a bias and its keys have none; `Blip2VisionModel` stores one for keys too. EVA-02-CLIP B
and L have SwiGLU, LayerNorms inside attention and MLP, and both rotary and learned positions. E has norms after
attention and MLP, and a plain MLP.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mllm_jax.checkpoints.config_json import (
    MOST_PATCHES,
    RATIOS,
    Fields,
    read_fields,
    read_grid,
    read_square,
    write_fields,
)
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import Family, Table, image_sample
from mllm_jax.encoders.vision_hub import ViTNames, faithful, vit_family, vit_table
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError

# ---- Blip2VisionModel

FAMILY = vit_family(
    "Blip2VisionModel",
    name="EVA-01",
    defaults=dict(
        hidden_size=1408, num_hidden_layers=39, num_attention_heads=16, intermediate_size=6144, patch_size=14
    ),
    names=ViTNames(
        patch="embeddings.patch_embedding",
        layers="encoder.layers",
        class_token="embeddings.class_embedding",
        position="embeddings.position_embedding",
        q="self_attn.qkv",
        k="self_attn.qkv",
        v="self_attn.qkv",
        out="self_attn.projection",
        spellings=((r"^vision_model\.", ""),),
    ),
    fields={"qkv_bias": ("qkv_bias", "flag", True)},
    class_token=True,
    norm_pooled=True,  # the reference applies the last norm twice to the class token
    pooler="token",
)


# ---- timm

# The published models' arguments; those of config.json have precedence.
_E02 = dict(
    mlp_ratio=4 * 2 / 3,
    qkv_fused=False,
    swiglu_mlp=True,
    scale_mlp=True,
    scale_attn_inner=True,
    use_rot_pos_emb=True,
    ref_feat_shape=(16, 16),
)
_TIMM = {
    "eva_giant_patch14_clip_224": dict(patch_size=14, embed_dim=1408, depth=40, num_heads=16, mlp_ratio=6144 / 1408),
    "eva02_base_patch16_clip_224": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12) | _E02,
    "eva02_large_patch14_clip_224": dict(patch_size=14, embed_dim=1024, depth=24, num_heads=16) | _E02,
    "eva02_large_patch14_clip_336": dict(img_size=336, patch_size=14, embed_dim=1024, depth=24, num_heads=16) | _E02,
    "eva02_enormous_patch14_clip_224": dict(
        patch_size=14, embed_dim=1792, depth=64, num_heads=16, mlp_ratio=15360 / 1792, use_post_norm=True
    ),
}
_POOLERS = {"token": "token", "avg": "mean"}
# Arguments that change nothing outside training.
_IDLE = (
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "head_init_scale", "dynamic_img_size", "strict_img_size", "rope_shift_coords", "rope_jitter_coords",
    "rope_rescale_coords", "attn_pool_num_heads", "attn_pool_mlp_ratio",
)  # fmt: skip
# Entries of `pretrained_cfg`; only the mean and the standard deviation of the images are read.
_SHOWN = (
    "tag", "custom_load", "input_size", "test_input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode",
    "test_crop_pct", "mean", "std", "pool_size", "first_conv", "classifier", "license", "url", "file", "hf_hub_id",
    "hf_hub_filename", "source", "description", "origin_url", "paper_name", "paper_ids", "notes",
)  # fmt: skip
# Arguments with one supported value.
_FIXED = dict(
    num_kv_heads=None,
    qk_norm=False,
    swiglu_align_to=0,
    attn_type="eva",
    attn_only_layer_scale=False,
    num_reg_tokens=0,
    no_embed_class=False,
    use_abs_pos_emb=True,
    rope_type="cat",
    rope_grid_offset=0.0,
    rope_grid_indexing="ij",
    rope_rotate_half=False,
    dynamic_img_pad=False,
)
_FIELDS: Fields = {
    "hidden_size": ("embed_dim", "size"),
    "num_layers": ("depth", "size"),
    "num_heads": ("num_heads", "size"),
    "num_channels": ("in_chans", "size"),
    "gated": ("swiglu_mlp", "flag", False),
    "class_token": ("class_token", "flag", True),
    "qkv_bias": ("qkv_bias", "flag", True),
    "pre_norm": ("use_pre_transformer_norm", "flag", False),
}
_TIMM_NAMES = ViTNames(
    patch="patch_embed.proj",
    layers="blocks",
    class_token="cls_token",
    position="pos_embed",
    pre_norm="norm_pre",
    attention_norm="norm1",
    q="attn.qkv",
    k="attn.qkv",
    v="attn.qkv",
    q_bias="attn.q_bias",
    v_bias="attn.v_bias",
    attention_sub_norm="attn.norm",
    out="attn.proj",
    attention_scale="gamma_1",
    mlp_norm="norm2",
    mlp_sub_norm="mlp.norm",
    mlp_scale="gamma_2",
    final_norm="norm",
    head="head",
    # The names of the original repository and of open_clip.
    spellings=(
        (r"^visual\.(trunk\.)?", ""),
        (r"\.inner_attn_ln\.", ".norm."),
        (r"\.ffn_ln\.", ".norm."),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
        (r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias"),
    ),
    ignored=(
        *(f"{where}rope.{what}" for where in ("", "blocks.{layer}.attn.") for what in ("freqs_cos", "freqs_sin")),
        *("rope.bands", "rope.pos_embed", "blocks.{layer}.attn.k_bias"),
    ),
)
_UNFUSED = dict(q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", q_bias="", v_bias="")
# Fused in one tensor if the MLP has no norm.
_GATED = dict(gate="mlp.fc1_g", up="mlp.fc1_x")
_GATED_FUSED = dict(gate="mlp.fc1", up="mlp.fc1")


def from_timm_config(values: dict) -> ViTConfig:
    """Reads config.json of a timm folder; every argument in `model_args` is honoured or refused by name."""
    family = values.get("architecture")
    if not isinstance(family, str) or family not in _TIMM:
        raise ConfigError(
            f"a config.json with architecture={family!r}",
            f"one of {', '.join(_TIMM)}",
            "read it with the family of its architecture: mllm_jax.supported_models()",
        )
    whole = ConfigOptions(values, f"config.json of {family}")
    cfg = whole.part("pretrained_cfg", {}) or values
    defaults = dict(img_size=224, in_chans=3, mlp_ratio=4.0, qkv_fused=True, global_pool="token")
    beside = {
        "num_classes": values.get("num_classes", cfg.get("num_classes", 1000)),
        "global_pool": values.get("global_pool") or "token",
    }
    given = {name: value for name, value in whole.part("model_args", {}).items() if value is not None}
    # Folders without `pretrained_cfg` have its entries, about the images, next to the architecture.
    whole.skip("architecture", "num_classes", "num_features", "global_pool", *(_SHOWN if cfg is values else ()))
    whole.done()
    options = ConfigOptions(defaults | beside | _TIMM[family] | given, f"config.json of {family}")
    options.skip(*_IDLE)
    for name, value in _FIXED.items():
        options.only(name, value)
    # The module does not record whether tensors are fused.
    options.only("qkv_fused", _TIMM[family].get("qkv_fused", True))
    read = read_fields(options, _FIELDS)
    classes = options.count("num_classes")
    post_norm = options.flag("use_post_norm", False)
    pooler = _POOLERS[options.only("global_pool", *_POOLERS)]
    norm_pooled = options.flag("use_fc_norm", pooler == "mean")
    norm_output = options.only("use_post_transformer_norm", not norm_pooled)
    switches: dict[str, Any] = {}
    if options.flag("use_rot_pos_emb", False):
        switches = dict(
            rope_grid=read_square(options, "ref_feat_shape", MOST_PATCHES),
            rope_theta=options.number("rope_temperature", 10_000.0, least=1.0),
        )
    options.skip("ref_feat_shape", "rope_temperature", "rope_mrope_section")
    scale = options.number("init_values", None)
    shown = ConfigOptions(cfg, f"pretrained_cfg of {family}")
    if "mean" in shown and "std" in shown:
        switches |= dict(image_mean=shown.numbers("mean"), image_std=shown.numbers("std"))
    config = make_config(
        ViTConfig,
        **read_grid(options, "img_size"),
        **read,
        mlp_size=int(read["hidden_size"] * options.number("mlp_ratio", ..., *RATIOS)),
        activation="silu" if read["gated"] else "gelu",
        drop_remainder=True,
        patch_bias=not read["pre_norm"],
        k_bias=False,
        norm_first=not post_norm,
        norm_output=norm_output,
        norm_pooled=norm_pooled,
        attention_sub_norm_eps=1e-6 if options.flag("scale_attn_inner", False) else None,
        mlp_sub_norm_eps=1e-6 if options.flag("scale_mlp", False) else None,
        layer_scale=None if post_norm else scale,
        position_antialias=True,
        pooler=pooler,
        head_size=classes or None,
        family=family,
        **switches,
    )
    options.done()
    return config


def to_timm_config(config: ViTConfig) -> dict:
    """Returns config.json, the inverse of `from_timm_config`; refuses switches that the family does not have."""
    c, dialect = config, config.dialect
    arguments = dict(
        **write_fields(c, _FIELDS),
        img_size=c.image_size,
        patch_size=c.patch_size,
        # Half a dimension more: rounding the product down must not lose a dimension.
        mlp_ratio=(c.mlp_size + 0.5) / c.hidden_size,
        num_classes=dialect.head_size or 0,
        use_fc_norm=dialect.norm_pooled,
        use_post_transformer_norm=dialect.norm_output,
        use_post_norm=not dialect.norm_first,
        scale_attn_inner=dialect.attention_sub_norm_eps is not None,
        scale_mlp=dialect.mlp_sub_norm_eps is not None,
        init_values=dialect.layer_scale,
        use_rot_pos_emb=dialect.rope_grid is not None,
        ref_feat_shape=None if dialect.rope_grid is None else [dialect.rope_grid] * 2,
        rope_temperature=dialect.rope_theta,
        global_pool=next((theirs for theirs, ours in _POOLERS.items() if ours == dialect.pooler), "token"),
    )
    written = dict(
        architecture=c.family,
        num_classes=dialect.head_size or 0,
        num_features=c.hidden_size,
        global_pool=arguments["global_pool"],
        model_args={name: value for name, value in arguments.items() if value is not None},
        pretrained_cfg=dict(
            num_classes=dialect.head_size or 0,
            input_size=[c.num_channels, c.image_size, c.image_size],
            fixed_input_size=True,
            interpolation="bicubic",
            mean=list(c.image_mean),
            std=list(c.image_std),
            first_conv="patch_embed.proj",
            classifier="head",
        ),
    )
    return faithful(c, written, from_timm_config)


def timm_table(config: ViTConfig) -> Table:
    c, changes = config, {}
    if not _TIMM[c.family].get("qkv_fused", True):
        changes |= _UNFUSED
    if c.dialect.gated:
        changes |= _GATED if c.dialect.mlp_sub_norm_eps is not None else _GATED_FUSED
    if c.dialect.norm_pooled:
        changes["final_norm"] = "fc_norm"
    return vit_table(c, dataclasses.replace(_TIMM_NAMES, **changes))


FAMILIES = (
    FAMILY,
    Family(
        name="EVA-02-CLIP",
        architectures=tuple(_TIMM),
        from_hf=from_timm_config,
        to_hf=to_timm_config,
        table=timm_table,
        sample=image_sample,
        oracle="timm.Eva",
    ),
)
