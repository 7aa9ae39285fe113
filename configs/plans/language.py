"""Language models as experiments for `mllm plan`: text only, a minimal image encoder, no data.

`decoder(name)` returns a model of a published size; each other file of this folder is an experiment of one of them:

mllm plan configs/plans/llama31_8b.py --topology v6e-256
"""

from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage
from mllm_jax.training.objectives.next_token import NextToken

# vocabulary, hidden size, layers, heads, key-value heads, MLP size. Heads have 128 dimensions; embedding and output
# head are not tied. The sources are meta-llama's config.json of each, and MaxText's default decoder (base.yml: 2048,
# 16, 16, 16, 7168) at global_parameter_scale 16 and 32, which doubles heads and MLP first, then the width, then the
# layers.
SIZES = {
    "llama2_7b": (32_000, 4096, 32, 32, 32, 11_008),
    "llama2_70b": (32_000, 8192, 80, 64, 8, 28_672),
    "llama31_8b": (128_256, 4096, 32, 32, 8, 14_336),
    "llama31_70b": (128_256, 8192, 80, 64, 8, 28_672),
    "maxtext_16b": (32_000, 4096, 32, 64, 64, 28_672),
    "maxtext_32b": (32_000, 8192, 32, 64, 64, 28_672),
}


def decoder(name: str, remat: str = "full", layers: int | None = None) -> DecoderConfig:
    """Returns the LLM of this name, or its first layers."""
    vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, mlp_size = SIZES[name]
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=layers or num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        mlp_size=mlp_size,
        tie_word_embeddings=False,
        compute=Compute(dtype="bfloat16", remat=remat),
    )


def experiment(
    name: str,
    *,
    rows: int,
    length: int,
    mesh: MeshConfig | None = None,
    remat: str = "full",
    accumulate: int = 1,
    layers: int | None = None,
) -> Experiment:
    """Returns the pre-training of all parameters of a language model, with AdamW and float32 master weights.

    Args:
        mesh: None is fsdp over all chips.
    """
    llm = decoder(name, remat, layers)
    encoder = ViTConfig(image_size=16, patch_size=8, hidden_size=8, num_layers=1, num_heads=1, mlp_size=8)
    stage = Stage(
        name="pretrain",
        objective=NextToken(),
        trainable=("llm/*",),
        data=Mixture((), rows=rows, length=length, slots={}, learn="all"),
        optimizer=AdamW(),
        steps=1000,
        accumulate=accumulate,
        frozen_dtype="bfloat16",
    )
    return Experiment(
        name=name,
        model=MultimodalConfig({"image": Branch(encoder, MLPProjectorConfig())}, llm),
        mesh=mesh or MeshConfig(data=1, fsdp=-1),
        stages=(stage,),
    )
