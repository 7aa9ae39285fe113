"""Qwen2.5-VL-7B (arXiv 2502.13923) at its real size.

`model()` is what Qwen/Qwen2.5-VL-7B-Instruct holds. The report gives the stages' data and lengths (table 2: 8,192 and
32,768 tokens) but neither batch sizes nor learning rates, so there is no `experiment` here.
"""

from mllm_jax.encoders.qwen_vit import QwenViTConfig, QwenViTDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch
from mllm_jax.models.qwen_vl import QWEN25, QwenVLConfig


def model(dtype: str = "bfloat16") -> QwenVLConfig:
    """8,292,166,656 parameters: the tower with its merger 676,550,144, Qwen2.5 7,615,616,512."""
    return QwenVLConfig(
        inputs={
            "image": Branch(
                QwenViTConfig(
                    hidden_size=1280,
                    num_layers=32,
                    num_heads=16,
                    mlp_size=3420,
                    output_size=3584,
                    activation="silu",
                    window_size=112,
                    full_layers=(7, 15, 23, 31),
                    dialect=QwenViTDialect(
                        gated=True, norm="rms", tokens_per_second=2, family="Qwen2_5_VisionTransformerPretrainedModel"
                    ),
                    compute=Compute(dtype=dtype, remat="full"),
                )
            )
        },
        llm=DecoderConfig(
            vocab_size=152064,
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            mlp_size=18944,
            tie_word_embeddings=False,
            max_position_embeddings=128_000,
            bos_token_id=151643,
            eos_token_id=(151645,),
            dialect=DecoderDialect(
                qkv_bias=True, rope_theta=1_000_000.0, mrope_sections=(16, 24, 24), family="Qwen2ForCausalLM"
            ),
            compute=Compute(dtype=dtype, remat="full"),
        ),
        family=QWEN25,
    )
