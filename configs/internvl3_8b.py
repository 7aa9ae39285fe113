"""InternVL3-8B (arXiv 2504.10479) at its real size, with the finetuning of its authors' script.

mllm plan configs/internvl3_8b.py --topology v5p-128

`model()` is the model of OpenGVLab/InternVL3-8B-hf. `finetune(mixture, steps)` is a stage for an Experiment on it, with
your data; `config()` has the stage with rows of up to four images and no data. The pre-training before it has no
published script. A stage for MPO is not included.
"""

from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.layers.rotary import RopeScaling
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch
from mllm_jax.models.internvl import IMAGE_MEAN, IMAGE_STD, InternVLConfig
from mllm_jax.projectors.pixel_shuffle import PixelShuffleProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage
from mllm_jax.training.objectives.next_token import NextToken

# internvl_chat/shell/internvl3.0/2nd_finetune/internvl3_8b_dynamic_res_2nd_finetune_full.sh of OpenGVLab/InternVL:
ROWS, LENGTH, MAX_TILES = 128, 16_384, 12


def encoder() -> ViTConfig:
    """Returns InternViT-300M-448px-V2.5: 1,024 vectors of width 1024 for each tile."""
    return ViTConfig(
        image_size=448,
        patch_size=14,
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        mlp_size=4096,
        class_token=True,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
        dialect=ViTDialect(
            norm_eps=1e-6,
            drop_remainder=True,
            norm_output=False,
            layer_scale=0.1,
            pooler="none",
            family="InternVLVisionModel",
        ),
    )


def llm() -> DecoderConfig:
    """Returns Qwen2.5-7B with its vocabulary cut after the last token in use: 151,674 of the 152,064 rows."""
    return DecoderConfig(
        vocab_size=151_674,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        mlp_size=18_944,
        tie_word_embeddings=False,
        max_position_embeddings=32_768,
        bos_token_id=151_643,
        eos_token_id=(151_645,),
        dialect=DecoderDialect(
            norm_eps=1e-6,
            qkv_bias=True,
            rope_theta=1_000_000.0,
            rope_scaling=RopeScaling("dynamic", factor=2.0, original_max_position_embeddings=32_768),
            family="Qwen2ForCausalLM",
        ),
    )


def model(dtype: str = "bfloat16") -> InternVLConfig:
    """Returns the model: 7,944,373,760 parameters, InternViT 304,012,288, MLP 27,540,480, Qwen2.5 7,612,820,992.

    The hub has 15.9 GB.
    """
    image = Branch(encoder(), PixelShuffleProjectorConfig())
    compute = Compute(dtype=dtype, remat="full")
    return InternVLConfig({"image": image}, llm(), image_token_id=151_667, compute=compute)


def optimizer(steps: int) -> AdamW:
    """Returns the script's optimizer: warm-up over 3 % of the steps, cosine to 0; transformers' betas and clipping."""
    return AdamW(2e-5, warmup_steps=-(-3 * steps // 100), end_factor=0.0, weight_decay=0.05, b2=0.999, clip_norm=1.0)


def finetune(data: Mixture, steps: int) -> Stage:
    """Returns one epoch of the data with the image encoder frozen, as in the script.

    Args:
        data: with rows=ROWS, length=LENGTH, and MAX_TILES + 1 slots for each image of a row.
        steps: of one epoch.
    """
    return Stage(
        name="finetune",
        objective=NextToken(),
        trainable=("projector_image/*", "llm/*"),
        data=data,
        optimizer=optimizer(steps),
        steps=steps,
        frozen_dtype="bfloat16",
    )


def config() -> Experiment:
    data = Mixture((), rows=ROWS, length=LENGTH, slots={"image": 4 * (MAX_TILES + 1)})
    return Experiment("internvl3_8b", model(), (finetune(data, steps=1000),), mesh=MeshConfig(data=1, fsdp=-1))
