"""CLIP's image encoder (arXiv 2103.00020) as `CLIPVisionModel`: a norm before the first layer, no bias of the patches.

The last norm applies only to the pooled class token, not to `last_hidden_state`.
"""

from __future__ import annotations

from mllm_jax.encoders.vision_hub import ViTNames, vit_family

FAMILY = vit_family(
    "CLIPVisionModel",
    name="CLIP vision",
    defaults=dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5),  # OpenAI's B/32
    names=ViTNames(
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
    ),
    class_token=True,
    patch_bias=False,
    pre_norm=True,
    norm_output=False,
    norm_pooled=True,
    pooler="token",
)
FAMILIES = (FAMILY,)
