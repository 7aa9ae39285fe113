"""InternVL2.5-78B (arXiv 2412.05271) at its real size: InternViT-6B-448px-V2.5 and Qwen2.5-72B.

mllm plan configs/internvl25_78b.py --topology v5p-512

`model()` has the sizes of OpenGVLab/InternVL2_5-78B in the form of Hugging Face's class. `config()` is its second
stage, which trains everything (table 2): 512 rows of 16,384 tokens with up to 48 tiles, the script's maximum for a row.
You provide the data; the 1,000 steps are ours.
"""

from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch
from mllm_jax.models.internvl import IMAGE_MEAN, IMAGE_STD, InternVLConfig
from mllm_jax.projectors.pixel_shuffle import PixelShuffleProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage
from mllm_jax.training.objectives.next_token import NextToken


def encoder() -> ViTConfig:
    """Returns InternViT-6B-448px-V2.5: 1,024 vectors of width 3200 for each tile."""
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
    )


def llm() -> DecoderConfig:
    """Returns Qwen2.5-72B with its vocabulary cut after the last token in use."""
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
    )


def model(dtype: str = "bfloat16") -> InternVLConfig:
    """Returns the model of 78.4 billion parameters."""
    image = Branch(encoder(), PixelShuffleProjectorConfig())
    compute = Compute(dtype=dtype, remat="full")
    return InternVLConfig({"image": image}, llm(), image_token_id=151_667, compute=compute)


def config() -> Experiment:
    stage = Stage(
        name="finetune",
        objective=NextToken(),
        trainable=("*",),
        data=Mixture((), rows=512, length=16_384, slots={"image": 48}),
        optimizer=AdamW(2e-5, end_factor=0.0, weight_decay=0.05, b2=0.999),
        steps=1000,
        accumulate=2,
    )
    return Experiment("internvl25_78b", model(), (stage,), mesh=MeshConfig(data=1, fsdp=-1))
