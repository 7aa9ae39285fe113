"""InternVL2.5-78B (arXiv 2412.05271) at its real size: InternViT-6B-448px-V2.5 and Qwen2.5-72B.

`model()` has the sizes of OpenGVLab/InternVL2_5-78B, written as Hugging Face's class; configs/plans/internvl25_78b.py
plans its fine-tuning.
"""

from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch
from mllm_jax.models.internvl import IMAGE_MEAN, IMAGE_STD, InternVLConfig
from mllm_jax.projectors.pixel_shuffle import PixelShuffleProjectorConfig


def encoder(dtype: str = "bfloat16") -> ViTConfig:
    """InternViT-6B-448px-V2.5: 1,024 patches of 3200 numbers for each tile."""
    return ViTConfig(
        image_size=448,
        patch_size=14,
        hidden_size=3200,
        num_layers=45,
        num_heads=25,
        mlp_size=12_800,
        class_token=True,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
        dialect=ViTDialect(
            norm="rms",
            norm_eps=1e-6,
            qkv_bias=False,
            qk_norm=True,
            drop_remainder=True,
            norm_output=False,
            layer_scale=0.1,
            pooler="none",
            family="InternVLVisionModel",
        ),
        compute=Compute(dtype=dtype, remat="full"),
    )


def llm(dtype: str = "bfloat16") -> DecoderConfig:
    """Qwen2.5-72B, its vocabulary cut behind the last token in use."""
    return DecoderConfig(
        vocab_size=151_674,
        hidden_size=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        mlp_size=29_568,
        tie_word_embeddings=False,
        max_position_embeddings=32_768,
        bos_token_id=151_643,
        eos_token_id=(151_645,),
        dialect=DecoderDialect(norm_eps=1e-6, qkv_bias=True, rope_theta=1_000_000.0, family="Qwen2ForCausalLM"),
        compute=Compute(dtype=dtype, remat="full"),
    )


def model(dtype: str = "bfloat16") -> InternVLConfig:
    """78.4 billion parameters."""
    projector = PixelShuffleProjectorConfig(output_size=8192, compute=Compute(dtype=dtype))
    return InternVLConfig({"image": Branch(encoder(dtype), projector)}, llm(dtype), image_token_id=151_667)
