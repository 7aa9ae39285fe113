"""LLaVA-1.5-7B (arXiv 2310.03744) at its real size, with the published hyperparameters of its two stages.

mllm train configs/llava15_7b.py
mllm plan configs/llava15_7b.py --topology v5p-128

`model()` is the model of llava-hf/llava-1.5-7b-hf; START is the path of that folder. The records and images are in the
folder of the environment variable MLLM_DATA_DIR, or without it in the working folder, under the names in RECORDS, which
are those of the authors' repository.

The authors started from openai/clip-vit-large-patch14-336, lmsys/vicuna-7b-v1.5 and a new projector. Vicuna has 64
tokens fewer than this model, so `config()` starts from the whole model in START. `experiment(...)` can start from
parts.
"""

from typing import Any

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.llava import LLaVARecords
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch, Connection
from mllm_jax.models.clip import CLIP_MEAN, CLIP_STD
from mllm_jax.models.llava import LlavaConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.objectives.next_token import NextToken

# 558,128 images with captions in batches of 256; 665,298 conversations in batches of 128; one epoch each (the paper's
# table of hyperparameters; the counts are those of LLaVA-Pretrain and llava_v1_5_mix665k.json).
ALIGN_STEPS, INSTRUCT_STEPS = -(-558_128 // 256), -(-665_298 // 128)
START = "runs/llava-1.5-7b-hf"
RECORDS = {
    "align": LLaVARecords(
        path="LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", image_folder="LLaVA-Pretrain/images", version="plain"
    ),
    "instruct": LLaVARecords(path="llava_v1_5_mix665k.json", image_folder="."),
}
# The chat template of training: conv_vicuna_v1 in llava/conversation.py. START's template has no end token after an
# answer, which training needs.
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{{ ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' }}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LENGTH = 2048  # model_max_length in scripts/v1_5/*.sh of haotian-liu/LLaVA


def clip_large() -> ViTConfig:
    """Returns the image encoder of openai/clip-vit-large-patch14-336: 577 vectors of width 1024."""
    return ViTConfig(
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        mlp_size=4096,
        activation="quick_gelu",
        class_token=True,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        dialect=ViTDialect(
            norm_eps=1e-5,
            drop_remainder=True,
            patch_bias=False,
            pre_norm=True,
            norm_output=False,
            norm_pooled=True,
            pooler="token",
            family="CLIPVisionModel",
        ),
    )


def model(dtype: str = "bfloat16") -> LlavaConfig:
    """Returns the model: 7,063,427,072 parameters, CLIP 303,507,456, MLP 20,979,712, Vicuna 6,738,939,904.

    Vicuna has 64 more tokens here. The hub counts 7.06 billion parameters in llava-hf/llava-1.5-7b-hf.
    """
    return LlavaConfig(
        inputs={
            "image": Branch(clip_large(), MLPProjectorConfig(), Connection(layers=(-2,))),
        },
        llm=DecoderConfig(
            vocab_size=32064,
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            mlp_size=11008,
            dialect=DecoderDialect(norm_eps=1e-5),
            tie_word_embeddings=False,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=(2,),
        ),
        compute=Compute(dtype=dtype, remat="full"),
    )


def optimizer(learning_rate: float, steps: int) -> AdamW:
    """Returns AdamW without weight decay, 3 % warm-up, cosine to 0 (scripts/v1_5); transformers' betas and clipping."""
    return AdamW(
        learning_rate, warmup_steps=-(-3 * steps // 100), end_factor=0.0, weight_decay=0.0, b2=0.999, clip_norm=1.0
    )


def experiment(align: Any, instruct: Any, tokenizer: str, pretrained: tuple[Pretrained, ...] = ()) -> Experiment:
    """Returns the two stages. A row has one slot; if every record has an image, batches are the published ones.

    Args:
        align, instruct: data sources.
        tokenizer: a folder with LLaVA's tokenizer and its processor's settings.
        pretrained: initial weights of image encoder and LLM; the authors used openai/clip-vit-large-patch14-336 and
            lmsys/vicuna-7b-v1.5, with a new projector.
    """
    return Experiment(
        name="llava15_7b",
        model=model(),
        pretrained=pretrained,
        tokenizer=TokenizerConfig(folder=tokenizer, system=SYSTEM, template=TEMPLATE),
        mesh=MeshConfig(data=1, fsdp=-1),
        stages=(
            Stage(
                name="align",
                objective=NextToken(),
                trainable=("projector_image/*",),
                data=Mixture((Weighted(align),), rows=256, length=LENGTH, slots={"image": 1}),
                optimizer=optimizer(1e-3, ALIGN_STEPS),
                steps=ALIGN_STEPS,
                frozen_dtype="bfloat16",
            ),
            Stage(
                name="instruct",
                objective=NextToken(),
                trainable=("projector_image/*", "llm/*"),
                data=Mixture((Weighted(instruct),), rows=128, length=LENGTH, slots={"image": 1}),
                optimizer=optimizer(2e-5, INSTRUCT_STEPS),
                steps=INSTRUCT_STEPS,
                frozen_dtype="bfloat16",
            ),
        ),
    )


def config() -> Experiment:
    return experiment(RECORDS["align"], RECORDS["instruct"], START, (Pretrained("*", START),))
