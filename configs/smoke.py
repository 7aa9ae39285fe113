"""Four of the quickstart's stages at toy size: a check of an installation in about a minute, which learns little.

mllm train configs/smoke.py
"""

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.openmoji import OpenMojiCaptions, OpenMojiQuestions, OpenMojiScenes, OpenMojiText
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.evaluation.tasks.openmoji import openmoji_questions
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.training.config import AdamW, CheckpointConfig, Experiment, Stage
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken

SIZE = 16


def config() -> Experiment:
    questions = Weighted(OpenMojiQuestions(image_size=SIZE, variants=1), 0.6)
    scenes = Weighted(OpenMojiScenes(image_size=SIZE, size=300), 0.3)
    text = Weighted(OpenMojiText(variants=1), 0.1)
    mixed = Mixture((questions, scenes, text), rows=8, length=128, slots={"image": 2})
    adamw = AdamW(learning_rate=1e-3, warmup_steps=4)
    encoder = ViTConfig(
        image_size=SIZE, patch_size=4, hidden_size=32, num_layers=2, num_heads=2, mlp_size=64, stem_channels=(8,)
    )
    words = TextTowerConfig(max_length=96, hidden_size=32, num_layers=1, num_heads=2, mlp_size=64)
    return Experiment(
        name="smoke",
        model=MultimodalConfig(
            inputs={"image": Branch(encoder, MLPProjectorConfig(merge=2))},
            llm=DecoderConfig(vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=64),
        ),
        log_every=1,
        checkpoint=CheckpointConfig(every_steps=3),
        evaluation=openmoji_questions(splits=("composition", "unseen"), image_size=SIZE, limit=8),
        stages=(
            Stage(
                name="language",
                objective=NextToken(),
                trainable=("llm/*",),
                data=Mixture((Weighted(OpenMojiText(variants=1)),), rows=8, length=128, slots={}),
                optimizer=adamw,
                steps=8,
            ),
            Stage(
                name="contrastive",
                objective=Contrastive(),
                model=DualEncoderConfig(text=words, projection_size=16, pooling="patches"),
                trainable=("encoder_image/*", "encoder_text/*", "heads/*"),
                data=Mixture(
                    (Weighted(OpenMojiCaptions(image_size=SIZE, variants=1)),),
                    rows=16,
                    length=96,
                    slots={"image": 1},
                    layout="caption",
                ),
                optimizer=adamw,
                steps=8,
            ),
            Stage(
                name="align",
                objective=NextToken(),
                trainable=("projector_image/*",),
                data=mixed,
                optimizer=adamw,
                steps=8,
            ),
            Stage(
                name="instruct",
                objective=NextToken(),
                trainable=("projector_image/*", "llm/*"),
                data=mixed,
                optimizer=adamw,
                steps=8,
                validation=Mixture(
                    (Weighted(OpenMojiQuestions(image_size=SIZE, split="validation", variants=1)),),
                    rows=8,
                    length=128,
                    slots={"image": 2},
                ),
                validate_every=3,
                validation_batches=2,
            ),
        ),
    )
