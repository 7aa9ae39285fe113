"""A multimodal LLM of videos, from scratch on sprites: who does what.

pip install --no-deps arcade==3.3.3
mllm train configs/sprites_video.py

Each of eight frames becomes one media token. Image encoder, projector and LLM learn together from questions about six
characters in five actions. The evaluation asks about pairs of character and action that no training video shows.
One run answered none of their actions: see benchmarks/RESULTS.md.
"""

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.arcade_sprites import ArcadeSprites
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.evaluation.tasks.clips import arcade_tasks
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.training.config import AdamW, Experiment, Stage, TokenizerConfig
from mllm_jax.training.objectives.next_token import NextToken

SIZE, FRAMES = 64, 8  # pixels of a frame's side, frames of a video
WIDTH, HEADS, MLP = 256, 4, 512

MODEL = MultimodalConfig(
    inputs={
        "video": Branch(
            ViTConfig(
                image_size=SIZE,
                patch_size=16,
                hidden_size=WIDTH,
                num_layers=2,
                num_heads=HEADS,
                mlp_size=MLP,
                activation="relu",
                stem_channels=(32, 64, 128, 256),
                mimetic_init=True,
                regions=1,
                region_size=WIDTH,
            ),
            MLPProjectorConfig(activation="relu", input_norm=True),
        )
    },
    llm=DecoderConfig(  # that of openmoji_scenes.py, with fewer tokens
        vocab_size=384,
        hidden_size=WIDTH,
        num_layers=4,
        num_heads=HEADS,
        num_kv_heads=HEADS // 2,
        mlp_size=MLP,
        activation="relu",
        qk_norm=True,
        mimetic_init=True,
    ),
    compute=Compute(scan_unroll=4),
)


def config() -> Experiment:
    videos = dict(frames=FRAMES, image_size=SIZE)
    rows = dict(rows=8, length=128, slots={"video": 2 * FRAMES})
    return Experiment(
        name="sprites_video",
        model=MODEL,
        tokenizer=TokenizerConfig(),
        cpu_devices=2,
        evaluation=arcade_tasks(**videos),
        stages=(
            Stage(
                name="watch",
                objective=NextToken(),
                trainable=("encoder_video/*", "projector_video/*", "llm/*"),
                data=Mixture((Weighted(ArcadeSprites(**videos)),), **rows),
                optimizer=AdamW(learning_rate=1e-3, warmup_steps=50, weight_decay=0.1),
                steps=700,
            ),
        ),
    )
