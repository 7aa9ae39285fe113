"""DINOv2 (arXiv 2304.07193) as `Dinov2Model`: layer scale, and SwiGLU in the giant.

The mask token, which only masked pretraining reads, is neither loaded nor saved.
"""

from __future__ import annotations

from dataclasses import replace

from mllm_jax.checkpoints.config_json import RATIOS
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Table
from mllm_jax.encoders.vision_hub import ViTNames, vit_family, vit_table
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError

_NAMES = ViTNames(
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
    # The names of transformers 5 in memory, and inside a larger model.
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
    """Returns the width of the MLP; SwiGLU has two thirds of it, rounded up to a multiple of 8."""
    size = int(width * ratio)
    return (int(size * 2 / 3) + 7) // 8 * 8 if gated else size


def _read(options: ConfigOptions) -> dict:
    # Options of the backbone for detectors, and of the mask token.
    options.skip("out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states")
    options.skip("_out_features", "_out_indices", "use_mask_token")
    gated = options.flag("use_swiglu_ffn", False)
    width = _mlp_size(options.size("hidden_size"), options.number("mlp_ratio", 4, *RATIOS), gated)
    read = dict(mlp_size=width, gated=gated, layer_scale=float(options.number("layerscale_value", 1.0)))
    if gated:
        options.skip("hidden_act")
        read["activation"] = "silu"
    return read


def _write(c: ViTConfig) -> dict:
    written = dict(mlp_ratio=_mlp_ratio(c), use_swiglu_ffn=c.dialect.gated, layerscale_value=c.dialect.layer_scale)
    return written | dict(use_mask_token=False, intermediate_size=None)


def _mlp_ratio(c: ViTConfig) -> int:
    """Returns the whole number that gives the MLP's width."""
    for ratio in range(1, 65):
        if _mlp_size(c.hidden_size, ratio, c.dialect.gated) == c.mlp_size:
            return ratio
    raise ConfigError(
        f"an MLP of {c.mlp_size} on {c.hidden_size} dimensions, to be written as Dinov2Model",
        "the width of a whole mlp_ratio"
        + (", two thirds of it rounded up to a multiple of 8" if c.dialect.gated else ""),
        "choose another mlp_size or family",
    )


def _table(config: ViTConfig) -> Table:
    names = _NAMES if not config.dialect.gated else replace(_NAMES, **_GATED)
    return vit_table(config, names)


FAMILY = replace(
    vit_family(
        "Dinov2Model",
        name="DINOv2",
        defaults=dict(patch_size=14, intermediate_size=None),  # determined by mlp_ratio
        names=_NAMES,
        fields={"qkv_bias": ("qkv_bias", "flag", True)},
        read=_read,
        write=_write,
        class_token=True,
        pooler="token",
    ),
    table=_table,
)
FAMILIES = (FAMILY,)
