"""DeepSeek-VL-7B (arXiv 2403.05525) at its real size, with the published hyperparameters of its three stages.

mllm plan configs/deepseek_vl_7b.py --topology v5p-128

`model()` is the model of deepseek-community/deepseek-vl-7b-chat. `warm_up(mixture)`, `pretrain(mixture)` and
`instruct(mixture)` are stages for an Experiment on it, with your data (hyperparameters: table 4; trained parts:
section 3.2). `config()` has all three stages without data.
"""

from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.sam import SamConfig
from mllm_jax.encoders.siglip_sam import SiglipSamConfig
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch
from mllm_jax.models.clip import CLIP_MEAN, CLIP_STD
from mllm_jax.models.deepseek_vl import DeepseekVLConfig
from mllm_jax.projectors.paired import PairedProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage
from mllm_jax.training.objectives.next_token import NextToken

# Rows and their length, by stage; an image is one slot. Only `pretrain` packs several examples into a row.
WARM_UP_ROWS, WARM_UP_LENGTH = 256, 512 + 576  # the 512 of the table cannot include the tokens of an image
PRETRAIN_ROWS, INSTRUCT_ROWS, LENGTH = 2304, 256, 4096
# The paper's adaptor includes the convolutions after SAM; the paper does not mention the second neck.
ADAPTOR = ("projector_image/*", "encoder_image/downsample_*", "encoder_image/neck/*", "encoder_image/alpha")


def encoder() -> SiglipSamConfig:
    """Returns SigLIP-L/16 on 384 pixels with SAM-B on 1,024: 576 vectors of width 1024 + 1024."""
    low = ViTConfig(
        image_size=384,
        patch_size=16,
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        mlp_size=4096,
        activation="gelu",
        dialect=ViTDialect(norm_eps=1e-6, drop_remainder=True, pooler="none", family="SiglipVisionModel"),
    )
    return SiglipSamConfig(low, SamConfig(image_mean=CLIP_MEAN, image_std=CLIP_STD))


def llm() -> DecoderConfig:
    """Returns DeepSeek-LLM-7B."""
    return DecoderConfig(
        vocab_size=102_400,
        hidden_size=4096,
        num_layers=30,
        num_heads=32,
        num_kv_heads=32,
        mlp_size=11_008,
        dialect=DecoderDialect(norm_eps=1e-6),
        tie_word_embeddings=False,
        max_position_embeddings=16_384,
        bos_token_id=100_000,
        eos_token_id=(100_001,),
    )


def model(dtype: str = "bfloat16") -> DeepseekVLConfig:
    """Returns the model: 7,331,390,721 parameters, encoders 400,045,313, projector 20,979,712, LLM 6,910,365,696.

    The authors' folder has 14.69 GB in bfloat16: these, and the unused head of SigLIP, 12.6 million.
    """
    image = Branch(encoder(), PairedProjectorConfig())
    return DeepseekVLConfig({"image": image}, llm(), compute=Compute(dtype=dtype, remat="full"))


def optimizer(learning_rate: float, warmup_steps: int, end_factor: float = 0.0) -> AdamW:
    """Returns AdamW (0.9, 0.95) without weight decay, with gradients clipped at 1.0."""
    return AdamW(
        learning_rate,
        warmup_steps=warmup_steps,
        end_factor=end_factor,
        weight_decay=0.0,
        b1=0.9,
        b2=0.95,
        clip_norm=1.0,
    )


def warm_up(data: Mixture) -> Stage:
    """Returns stage 1, which trains the adaptor."""
    return _stage("warm_up", data, ADAPTOR, 15_000, optimizer(1e-3, 128))


def pretrain(data: Mixture) -> Stage:
    """Returns stage 2, which trains adaptor and LLM on seven parts of text and three parts of images with text.

    The authors' learning rate falls in steps. Here it is a cosine to a tenth, the final rate of DeepSeek-LLM.
    """
    # Accumulation of 256 rows at a time: SAM's attention over whole images needs much memory.
    pieces = PRETRAIN_ROWS // 256
    return _stage("pretrain", data, (*ADAPTOR, "llm/*"), 42_000, optimizer(4.2e-5, 2000, 0.1), pieces)


def instruct(data: Mixture) -> Stage:
    """Returns stage 3, which also trains SigLIP; SAM stays frozen."""
    return _stage("instruct", data, (*ADAPTOR, "llm/*", "encoder_image/low/*"), 10_000, optimizer(2e-5, 256))


def config() -> Experiment:
    def data(rows: int, length: int, images: int = 1) -> Mixture:
        return Mixture((), rows=rows, length=length, slots={"image": images})

    stages = (
        warm_up(data(WARM_UP_ROWS, WARM_UP_LENGTH)),
        pretrain(data(PRETRAIN_ROWS, LENGTH, images=4)),
        instruct(data(INSTRUCT_ROWS, LENGTH)),
    )
    return Experiment("deepseek_vl_7b", model(), stages, mesh=MeshConfig(data=1, fsdp=-1))


def _stage(
    name: str, data: Mixture, trainable: tuple[str, ...], steps: int, adamw: AdamW, accumulate: int = 1
) -> Stage:
    return Stage(name, NextToken(), trainable, data, steps, adamw, accumulate, frozen_dtype="bfloat16")
