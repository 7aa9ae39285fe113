"""Qwen2-Audio-7B (arXiv 2407.10759) at its real size.

mllm plan configs/qwen2_audio_7b.py --topology v5e-256

`model()` is the model of Qwen/Qwen2-Audio-7B-Instruct. `config()` trains all of it, as the report does, on rows of
2,048 tokens with two sounds of up to 30 seconds each. The report has neither batch sizes nor learning rates: 256 rows,
the optimizer and the 1,000 steps are ours. You provide the data: a mixture with sources for the stage.
"""

from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.qwen2_audio import Qwen2AudioEncoderConfig
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch
from mllm_jax.models.qwen2_audio import Qwen2AudioConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage
from mllm_jax.training.objectives.next_token import NextToken

LENGTH = 2048
SOUNDS = 2  # of 750 media tokens each


def model(dtype: str = "bfloat16") -> Qwen2AudioConfig:
    """Returns the model: 8,397,094,912 parameters, audio encoder 636,968,960, projector 5,246,976, Qwen 7,754,878,976.

    The encoder's 1,920,000 positions are not trained.
    """
    return Qwen2AudioConfig(
        inputs={"audio": Branch(Qwen2AudioEncoderConfig(), MLPProjectorConfig(4096, num_layers=1))},
        llm=DecoderConfig(
            vocab_size=156032,
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            mlp_size=11008,
            tie_word_embeddings=False,
            max_position_embeddings=8192,
            bos_token_id=151643,
            eos_token_id=(151645,),
            dialect=DecoderDialect(qkv_bias=True, norm_eps=1e-5, family="Qwen2ForCausalLM"),
        ),
        compute=Compute(dtype=dtype, remat="full"),
    )


def config() -> Experiment:
    stage = Stage(
        name="instruct",
        objective=NextToken(),
        trainable=("encoder_audio/*", "projector_audio/*", "llm/*"),
        data=Mixture((), rows=256, length=LENGTH, slots={"audio": SOUNDS}),
        optimizer=AdamW(1e-5, end_factor=0.0, weight_decay=0.05, b2=0.999),
        steps=1000,
    )
    return Experiment(name="qwen2_audio_7b", model=model(), mesh=MeshConfig(data=1, fsdp=-1), stages=(stage,))
