"""BLIP-2 with EVA-CLIP-g and Flan-T5-XL at its real sizes, with its authors' two training stages (arXiv 2301.12597).

mllm plan configs/blip2_flant5xl.py --topology v5p-32

The sizes are those of Salesforce/blip2-flan-t5-xl. `represent` trains the Q-Former on pairs of images and texts,
without an LLM; `align` then trains it with the frozen LLM. You provide the data: `represent(mixture)` and
`align(mixture)` are stages for an Experiment on `stage1_model()` and `model()`; `config()` has the second stage without
data. The paper does not give the length of a row; 64 is ours.
"""

from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.t5 import T5Config, T5Dialect
from mllm_jax.models.blip2 import Blip2Config
from mllm_jax.models.blip2_stage1 import QFormerPretrainingConfig
from mllm_jax.models.branch import Branch, Connection
from mllm_jax.models.clip import CLIP_MEAN, CLIP_STD
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.objectives.qformer import QFormerStage1

# BERT's 30,522 and [DEC], the first token of a generated text.
VOCAB_SIZE, DECODE = 30_523, 30_522
NO_CLIPPING = 1e9
# Section 3.4: rows of a batch with ViT-g, in the first stage, and in the second stage with Flan-T5.
REPRESENT_ROWS, ALIGN_ROWS = 1680, 1520
COMPUTE = Compute(dtype="bfloat16", remat="full")


def encoder() -> ViTConfig:
    """Returns EVA-CLIP-g/14 without its last layer; its weights, released in half precision, stay frozen."""
    return ViTConfig(
        image_size=224,
        patch_size=14,
        hidden_size=1408,
        num_layers=39,
        num_heads=16,
        mlp_size=6144,
        activation="gelu",
        class_token=True,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        dialect=ViTDialect(
            norm_eps=1e-6,
            drop_remainder=True,
            qkv_bias=True,
            norm_pooled=True,
            pooler="token",
            family="Blip2VisionModel",
        ),
    )


def llm() -> T5Config:
    """Returns Flan-T5-XL with the exact GELU, as BLIP-2 uses it."""
    return T5Config(
        vocab_size=32_128,
        hidden_size=2048,
        head_dim=64,
        mlp_size=5120,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=32,
        activation="gelu",
        dialect=T5Dialect(gated=True),
        tie_word_embeddings=False,
        bos_token_id=1,
    )


def model() -> Blip2Config:
    """Returns the composed model of the Hugging Face folder."""
    image = {"image": Branch(encoder(), QFormerConfig(), Connection(class_token=True))}
    return Blip2Config(image, llm(), image_token_id=32_100, compute=COMPUTE)


def stage1_model() -> QFormerPretrainingConfig:
    """Returns the model of the first stage, without an LLM; its Q-Former also reads text."""
    return QFormerPretrainingConfig(
        encoder(),
        QFormerConfig(llm().hidden_size, vocab_size=VOCAB_SIZE),
        decode_token_id=DECODE,
        compute=COMPUTE,
    )


def represent(data: Mixture) -> Stage:
    """Returns the first stage (section 3.4): 250,000 steps from BERT-base; the last learning rate is LAVIS'."""
    return Stage(
        name="represent",
        objective=QFormerStage1(),
        trainable=(
            "projector_image/*",
            "image_projection/*",
            "text_projection/*",
            "matching/*",
            "caption*",
            "temperature",
        ),
        data=data,
        optimizer=AdamW(
            learning_rate=1e-4,
            warmup_steps=2000,
            end_factor=0.1,
            weight_decay=0.05,
            b1=0.9,
            b2=0.98,
            clip_norm=NO_CLIPPING,
        ),
        steps=250_000,
    )


def align(data: Mixture) -> Stage:
    """Returns the second stage (section 3.4): 80,000 steps to half of the learning rate; trains only the Q-Former."""
    return Stage(
        name="align",
        objective=NextToken(),
        trainable=("projector_image/*",),
        data=data,
        optimizer=AdamW(
            learning_rate=1e-4,
            warmup_steps=2000,
            end_factor=0.5,
            weight_decay=0.05,
            b1=0.9,
            b2=0.98,
            clip_norm=NO_CLIPPING,
        ),
        steps=80_000,
        frozen_dtype="bfloat16",
    )


def config() -> Experiment:
    data = Mixture((), rows=ALIGN_ROWS, length=64, slots={"image": 1})
    return Experiment("blip2_flant5xl", model(), (align(data),), mesh=MeshConfig(data=1, fsdp=-1))
