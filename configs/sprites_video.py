"""A multimodal LLM of videos of sprites, with a frozen DINOv2 as its encoder: who does what.

pip install --no-deps arcade==3.3.3
python tests/assets/dinov2.py runs/dinov2-small
mllm train configs/sprites_video.py

The second command makes DINOv2's Hugging Face folder, once. The encoder reads each frame once. Projector and LLM learn
from scratch, from questions about six characters and from questions about five actions, never about both at once. The
evaluation asks about pairs of character and action that no training video shows.

A run on two CPU cores beside other work took 13 minutes, and 3 for the evaluation. On 120 held-out videos it answers
77.5 % of the actions (24.2 % with shuffled videos; 33.3 % with the most frequent answer), but only 34.2 % of the
characters (16.7 %; 16.7 %): it often names a look-alike that training shows in this action. benchmarks/RESULTS.md has
the details.
"""

from pathlib import Path

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.arcade_sprites import ArcadeSprites
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.tasks.clips import arcade_tasks
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.registry import pretrained_config
from mllm_jax.models.reshape import with_image_size
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.training.config import AdamW, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.objectives.next_token import NextToken

DINOV2 = "runs/dinov2-small"
SIZE, FRAMES = 112, 4  # pixels of a frame's side, frames of a video
QUESTIONS = ("character", "action")
LLM = DecoderConfig(  # that of openmoji_scenes.py, with fewer tokens
    vocab_size=384,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    mlp_size=512,
    activation="relu",
    qk_norm=True,
    mimetic_init=True,
)


def config() -> Experiment:
    if not Path(DINOV2).is_dir():
        raise ConfigError(
            f"no model in {DINOV2}", "DINOv2's folder", f"make it: python tests/assets/dinov2.py {DINOV2}"
        )
    encoder = with_image_size(pretrained_config(DINOV2), SIZE)
    # A frame's 8 x 8 patches, concatenated, become one media token: their mean would hide pose and position.
    frames = Branch(encoder, MLPProjectorConfig(hidden_size=256, merge=8, activation="relu", input_norm=True))
    videos = dict(frames=FRAMES, image_size=SIZE)
    sources = tuple(Weighted(ArcadeSprites(size=480, questions=(kind,), **videos)) for kind in QUESTIONS)
    return Experiment(
        name="sprites_video",
        model=MultimodalConfig(inputs={"video": frames}, llm=LLM, compute=Compute(scan_unroll=4)),
        pretrained=(Pretrained("encoder_video", DINOV2),),
        tokenizer=TokenizerConfig(),
        cpu_devices=2,
        evaluation=arcade_tasks(questions=QUESTIONS, **videos),
        stages=(
            Stage(
                name="watch",
                objective=NextToken(),
                trainable=("projector_video/*", "llm/*"),
                data=Mixture(sources, rows=8, length=128, slots={"video": 4 * FRAMES}),
                optimizer=AdamW(learning_rate=1e-3, warmup_steps=50, weight_decay=0.1),
                steps=600,
                cache_features=True,
            ),
        ),
    )
