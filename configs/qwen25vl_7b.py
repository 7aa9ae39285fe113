"""Qwen2.5-VL-7B (arXiv 2502.13923) at its real size.

mllm plan configs/qwen25vl_7b.py --topology v5p-128

`model()` is the model of Qwen/Qwen2.5-VL-7B-Instruct. `config()` trains its LLM on rows of the report's 8,192 tokens
(table 2), half of them images. The report has neither batch sizes nor learning rates: 256 rows, the optimizer and the
1,000 steps are ours. You provide the data: a mixture with sources for the stage.
"""

from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.qwen_vit import QwenViTConfig, QwenViTDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch
from mllm_jax.models.qwen_vl import QWEN25, QwenVLConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage
from mllm_jax.training.objectives.next_token import NextToken

LENGTH = 8192
PATCHES = 4 * LENGTH // 2  # four patches are one media token


def model(dtype: str = "bfloat16") -> QwenVLConfig:
    """Returns the model: 8,292,166,656 parameters, image encoder with merger 676,550,144, Qwen2.5 7,615,616,512."""
    return QwenVLConfig(
        inputs={
            "image": Branch(
                QwenViTConfig(
                    hidden_size=1280,
                    num_layers=32,
                    num_heads=16,
                    mlp_size=3420,
                    activation="silu",
                    window_size=112,
                    full_layers=(7, 15, 23, 31),
                    dialect=QwenViTDialect(
                        gated=True, norm="rms", tokens_per_second=2, family="Qwen2_5_VisionTransformerPretrainedModel"
                    ),
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
        ),
        family=QWEN25,
        compute=Compute(dtype=dtype, remat="full"),
    )


def config() -> Experiment:
    stage = Stage(
        name="instruct",
        objective=NextToken(),
        trainable=("llm/*",),
        data=Mixture((), rows=256, length=LENGTH, slots={"image": PATCHES}),
        optimizer=AdamW(1e-5, end_factor=0.0, weight_decay=0.05, b2=0.999),
        steps=1000,
        frozen_dtype="bfloat16",
    )
    return Experiment(name="qwen25vl_7b", model=model(), mesh=MeshConfig(data=1, fsdp=-1), stages=(stage,))
