"""LLaVA-NeXT at its real sizes, with the published hyperparameters of its two stages.

mllm train configs/llava_next.py
mllm plan configs/llava_next.py --topology v5p-128

`vicuna_7b()` and `mistral_7b()` are the models of llava-hf/llava-v1.6-vicuna-7b-hf and llava-v1.6-mistral-7b-hf (blog
post of 30 January 2024); `onevision_7b()` and `onevision_500m()` are llava-onevision-qwen2-7b-ov-hf and -0.5b-ov-hf
(arXiv 2408.03326).

`config()` trains the first: START is the path of its folder from the hub; records and images are as in `llava15_7b.py`.
The blog's mixture of 760,000 conversations is not public; RECORDS names a similar mixture that the authors published
later.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.llava import LLaVARecords
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch, Connection
from mllm_jax.models.llava import NEXT, NEXT_RESOLUTIONS, ONEVISION, ONEVISION_RESOLUTIONS, LlavaConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.objectives.next_token import NextToken

_LLAVA15 = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))

# scripts/train/pretrain_clip.sh and finetune_clip.sh of LLaVA-VL/LLaVA-NeXT: 3 % warm-up, cosine, no weight decay, one
# epoch; the image encoder's learning rate is a fifth of the others', 2e-6. 558,000 and 760,000 examples (the blog's
# table). The scripts do not give the batch sizes (16 and 4 a device): 256 and 128 are LLaVA-1.5's.
ALIGN_STEPS, INSTRUCT_STEPS = -(-558_128 // 256), -(-760_000 // 128)
ENCODER_RATE = (("encoder_image/*", 0.2),)
START = "runs/llava-v1.6-vicuna-7b-hf"
RECORDS = {
    "align": _LLAVA15["RECORDS"]["align"],
    "instruct": LLaVARecords(path="LLaVA-NeXT-Data/llava_next.json", image_folder="LLaVA-NeXT-Data/images"),
}
# The scripts allow 8,192 and 32,768 tokens; Vicuna has positions for 4,096. An image of the largest shapes has five
# tiles: at most 2,880 media tokens, and a newline vector for each of their rows.
LENGTH, TILES = 4096, 5


def optimizer(learning_rate: float, steps: int, factors: tuple[tuple[str, float], ...] = ()) -> AdamW:
    """Returns LLaVA-1.5's optimizer, with factors of the learning rate of single parts."""
    return replace(_LLAVA15["optimizer"](learning_rate, steps), factors=factors)


def config() -> Experiment:
    """Returns the training of LLaVA-NeXT with Vicuna-7B: first the projector, then everything."""

    def stage(name: str, trainable: tuple[str, ...], rows: int, optimizer: AdamW, steps: int) -> Stage:
        data = Mixture((Weighted(RECORDS[name]),), rows=rows, length=LENGTH, slots={"image": TILES})
        return Stage(name, NextToken(), trainable, data, steps, optimizer, frozen_dtype="bfloat16")

    every = ("encoder_image/*", "projector_image/*", "newline", "llm/*")
    return Experiment(
        name="llava_next",
        model=vicuna_7b(),
        pretrained=(Pretrained("*", START),),
        tokenizer=TokenizerConfig(folder=START, system=_LLAVA15["SYSTEM"], template=_LLAVA15["TEMPLATE"]),
        mesh=MeshConfig(data=1, fsdp=-1),
        stages=(
            stage("align", ("projector_image/*",), 256, optimizer(1e-3, ALIGN_STEPS), ALIGN_STEPS),
            stage("instruct", every, 128, optimizer(1e-5, INSTRUCT_STEPS, ENCODER_RATE), INSTRUCT_STEPS),
        ),
    )


def _next(llm: DecoderConfig, dtype: str) -> LlavaConfig:
    return LlavaConfig(
        inputs={
            "image": Branch(_LLAVA15["clip_large"](), MLPProjectorConfig(), Connection(layers=(-2,))),
        },
        llm=llm,
        newline=True,
        family=NEXT,
        resolutions=NEXT_RESOLUTIONS,
        compute=Compute(dtype=dtype, remat="full"),
    )


def vicuna_7b(dtype: str = "bfloat16") -> LlavaConfig:
    """Returns a model of 7,063,431,168 parameters, LLaVA-1.5-7B's and the newline. The hub counts 7.06 billion."""
    return _next(_LLAVA15["model"](dtype).llm, dtype)


def mistral_7b(dtype: str = "bfloat16") -> LlavaConfig:
    """Returns a model of 7,566,747,648 parameters, with Mistral-7B-Instruct-v0.2. The hub counts 7.57 billion."""
    llm = DecoderConfig(
        vocab_size=32064,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        mlp_size=14336,
        tie_word_embeddings=False,
        max_position_embeddings=32768,
        bos_token_id=1,
        eos_token_id=(2,),
        dialect=DecoderDialect(norm_eps=1e-5, rope_theta=1e6, family="MistralForCausalLM"),
    )
    return _next(llm, dtype)


def _onevision(llm: DecoderConfig, dtype: str) -> LlavaConfig:
    return LlavaConfig(
        # SigLIP so400m/14-384 without its last layer and its head: 729 vectors of width 1152.
        inputs={
            "image": Branch(
                ViTConfig(
                    image_size=384,
                    patch_size=14,
                    hidden_size=1152,
                    num_layers=26,
                    num_heads=16,
                    mlp_size=4304,
                    activation="gelu_tanh",
                    dialect=ViTDialect(norm_eps=1e-6, drop_remainder=True, pooler="none", family="SiglipVisionModel"),
                ),
                MLPProjectorConfig(),
                Connection(layers=(-1,)),
            )
        },
        llm=llm,
        newline=True,
        family=ONEVISION,
        image_token_id=151646,
        video_token_id=151647,
        resolutions=ONEVISION_RESOLUTIONS,
        max_tiles=9,
        compute=Compute(dtype=dtype, remat="full"),
    )


def _qwen2(**sizes) -> DecoderConfig:
    return DecoderConfig(
        **sizes,
        max_position_embeddings=32768,
        bos_token_id=151643,
        eos_token_id=(151645,),
        dialect=DecoderDialect(norm_eps=1e-6, rope_theta=1e6, qkv_bias=True, family="Qwen2ForCausalLM"),
    )


def onevision_7b(dtype: str = "bfloat16") -> LlavaConfig:
    """Returns a model of 8,030,348,832 parameters, with Qwen2-7B. The hub counts 8.03 billion."""
    sizes = dict(hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, mlp_size=18944)
    return _onevision(_qwen2(vocab_size=152064, tie_word_embeddings=False, **sizes), dtype)


def onevision_500m(dtype: str = "bfloat16") -> LlavaConfig:
    """Returns a model of 893,618,208 parameters, with Qwen2-0.5B. The hub counts 0.89 billion."""
    sizes = dict(hidden_size=896, num_layers=24, num_heads=14, num_kv_heads=2, mlp_size=4864)
    return _onevision(_qwen2(vocab_size=151936, tie_word_embeddings=True, **sizes), dtype)
