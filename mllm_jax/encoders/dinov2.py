"""DINOv2 (arXiv 2304.07193) as `Dinov2Model`: layer scale, and SwiGLU in the giant.

The mask token, which only masked pretraining reads, is neither kept nor written.
"""

from __future__ import annotations

from mllm_jax.checkpoints.architectures import model_type
from mllm_jax.checkpoints.config_json import RATIOS
from mllm_jax.checkpoints.sample import image_sample
from mllm_jax.checkpoints.table import Family, Table
from mllm_jax.encoders.hub import Names, faithful, options_of, read_vit, vit_table, write_vit
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError

# What an option is where config.json does not say.
_DEFAULTS = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    mlp_ratio=4,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    image_size=224,
    patch_size=14,
)
_NAMES = Names(
    patch="embeddings.patch_embeddings.projection",
    layers="encoder.layer",
    class_token="embeddings.cls_token",
    position="embeddings.position_embeddings",
    attention_norm="norm1",
    q="attention.attention.query",
    k="attention.attention.key",
    v="attention.attention.value",
    out="attention.output.dense",
    attention_scale="layer_scale1.lambda1",
    mlp_norm="norm2",
    mlp_scale="layer_scale2.lambda1",
    final_norm="layernorm",
    # As transformers 5 names them in memory, and inside a larger model.
    spellings=(
        (r"^dinov2\.", ""),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
    ),
    ignored=("embeddings.mask_token",),
)
_GATED = dict(gate="mlp.weights_in", up="mlp.weights_in", down="mlp.weights_out")


def _mlp_size(width: int, ratio: float, gated: bool) -> int:
    """SwiGLU has two thirds of the width, in steps of eight."""
    size = int(width * ratio)
    return (int(size * 2 / 3) + 7) // 8 * 8 if gated else size


def from_hf_config(values: dict) -> ViTConfig:
    """config.json of Dinov2Model, every option honoured or refused by name."""
    options = options_of(values, _DEFAULTS, "Dinov2Model")
    # What the backbone for detectors returns, and the mask token.
    options.skip("out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states")
    options.skip("_out_features", "_out_indices", "use_mask_token")
    gated = options.flag("use_swiglu_ffn", False)
    switches = dict(activation="silu") if gated else {}
    if gated:
        options.skip("hidden_act")
    return read_vit(
        options,
        class_token=True,
        mlp_size=_mlp_size(options.size("hidden_size"), options.number("mlp_ratio", ..., *RATIOS), gated),
        gated=gated,
        qkv_bias=options.flag("qkv_bias", True),
        layer_scale=float(options.number("layerscale_value", 1.0)),
        pooler="token",
        family="Dinov2Model",
        **switches,
    )


def to_hf_config(config: ViTConfig) -> dict:
    """The reverse; refuses switches that the family does not have."""
    c = config
    written = write_vit(c) | dict(
        model_type=model_type(c.family),
        mlp_ratio=_mlp_ratio(c),
        use_swiglu_ffn=c.gated,
        qkv_bias=c.qkv_bias,
        layerscale_value=c.layer_scale,
        use_mask_token=False,
    )
    del written["intermediate_size"]
    return faithful(c, written, from_hf_config)


def _mlp_ratio(c: ViTConfig) -> int:
    """The whole number that gives the MLP's width."""
    for ratio in range(1, 65):
        if _mlp_size(c.hidden_size, ratio, c.gated) == c.mlp_size:
            return ratio
    raise ConfigError(
        f"an MLP of {c.mlp_size} on {c.hidden_size} dimensions, to be written as Dinov2Model",
        "a width that follows from a whole mlp_ratio" + (", two thirds of it in steps of 8" if c.gated else ""),
        "choose another mlp_size or family",
    )


def table(config: ViTConfig) -> Table:
    names = _NAMES if not config.gated else Names(**vars(_NAMES) | _GATED)
    return vit_table(config, names)


FAMILIES = (
    Family(
        name="DINOv2",
        architectures=("Dinov2Model",),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=image_sample,
    ),
)
