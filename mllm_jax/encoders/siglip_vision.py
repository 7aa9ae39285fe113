"""SigLIP's image encoder (arXiv 2303.15343) as `SiglipVisionModel`: no class token, pooling by a learned query."""

from __future__ import annotations

from mllm_jax.encoders.vision_hub import ViTNames, vit_family

FAMILY = vit_family(
    "SiglipVisionModel",
    name="SigLIP vision",
    defaults=dict(hidden_act="gelu_pytorch_tanh"),
    names=ViTNames(
        patch="vision_model.embeddings.patch_embedding",
        layers="vision_model.encoder.layers",
        position="vision_model.embeddings.position_embedding.weight",
        position_axes="n e",
        final_norm="vision_model.post_layernorm",
        pooler="vision_model.head",
        spellings=((r"^(embeddings|encoder|post_layernorm|head)\.", r"vision_model.\1."),),
        ignored=("vision_model.embeddings.position_ids",),
    ),
    read=lambda options: dict(pooler="attention" if options.flag("vision_use_head", True) else "none"),
    write=lambda config: dict(vision_use_head=config.dialect.pooler == "attention"),
)
FAMILIES = (FAMILY,)
