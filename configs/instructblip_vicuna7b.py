"""InstructBLIP with EVA-CLIP-g and Vicuna-7B at its real sizes, with its authors' training (arXiv 2305.06500).

mllm plan configs/instructblip_vicuna7b.py --topology v5p-128

The sizes are those of Salesforce/instructblip-vicuna-7b. You provide the data: `instruct(mixture)` is a stage for an
Experiment on `model()`, whose Q-Former starts from BLIP-2's; `config()` has the stage without data. The paper does not
give the length of a row; 512 is ours.
"""

from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch, Connection
from mllm_jax.models.clip import CLIP_MEAN, CLIP_STD
from mllm_jax.models.instructblip import InstructBlipConfig
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage
from mllm_jax.training.objectives.next_token import NextToken

NO_CLIPPING = 1e9
# Section 2.6: rows of a batch with a 7B language model; 192 with 3B, 64 with 11B and 13B.
ROWS = 128


def model() -> InstructBlipConfig:
    """Returns the composed model of the Hugging Face folder."""
    encoder = ViTConfig(
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
    llm = DecoderConfig(
        vocab_size=32_064,  # 32,000, [PAD] and <image>, padded to a multiple of 64
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        mlp_size=11_008,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=(1,),  # of its config.json; generation_config.json and the tokenizer have the real end of text
        pad_token_id=32_000,
        dialect=DecoderDialect(norm_eps=1e-6, family="LlamaForCausalLM"),
    )
    image = Branch(encoder, QFormerConfig(vocab_size=30_523), Connection(class_token=True))
    compute = Compute(dtype="bfloat16", remat="full")
    return InstructBlipConfig({"image": image}, llm, image_token_id=32_001, compute=compute)


def instruct(data: Mixture) -> Stage:
    """Returns the stage of section 2.6: at most 60,000 steps of the Q-Former, its queries and its map to the LLM."""
    return Stage(
        name="instruct",
        objective=NextToken(),
        trainable=("projector_image/*",),
        data=data,
        optimizer=AdamW(
            learning_rate=1e-5,
            warmup_steps=1000,
            end_factor=0.0,
            weight_decay=0.05,
            b1=0.9,
            b2=0.999,
            clip_norm=NO_CLIPPING,
        ),
        steps=60_000,
        frozen_dtype="bfloat16",
    )


def config() -> Experiment:
    data = Mixture((), rows=ROWS, length=512, slots={"image": 1})
    return Experiment("instructblip_vicuna7b", model(), (instruct(data),), mesh=MeshConfig(data=1, fsdp=-1))
