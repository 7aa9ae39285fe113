"""A multimodal LLM from scratch on emoji: minutes on two CPU cores.

mllm train configs/quickstart.py
"""

from mllm_jax.data.openmoji import (
    OpenMojiCaptions,
    OpenMojiQuestions,
    OpenMojiScenes,
    OpenMojiText,
)
from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.encoders.text import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.contrastive import ContrastiveConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.training.config import AdamW, Experiment, Stage, TokenizerConfig
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken

SIZE = 64


def config() -> Experiment:
    model = MultimodalConfig(
        encoder=ViTConfig(
            image_size=SIZE,
            patch_size=8,
            hidden_size=192,
            num_layers=5,
            num_heads=3,
            mlp_size=384,
            activation="relu",
            stem_channels=(24, 48, 96),
            regions=2,
            region_size=256,
            scan_unroll=5,
        ),
        projector=MLPProjectorConfig(output_size=256, activation="relu", input_norm=True),
        llm=DecoderConfig(
            vocab_size=1024,
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            mlp_size=512,
            activation="relu",
            scan_unroll=4,
        ),
        text_tower=TextTowerConfig(
            vocab_size=1024,
            max_length=64,
            hidden_size=192,
            num_layers=1,
            num_heads=3,
            mlp_size=384,
            activation="relu",
        ),
        contrastive=ContrastiveConfig(projection_size=256),
    )
    questions = Weighted(OpenMojiQuestions(image_size=SIZE, variants=16, augment=True), 0.7)
    scenes = Weighted(OpenMojiScenes(image_size=SIZE, augment=True), 0.3)
    text = Weighted(OpenMojiText(), 0.12)
    return Experiment(
        name="quickstart",
        model=model,
        tokenizer=TokenizerConfig(vocab_size=1024),
        cpu_devices=2,
        stages=(
            Stage(
                name="language",
                objective=NextToken(),
                trainable=("llm/*",),
                data=Mixture((Weighted(OpenMojiText()),), rows=16, length=256, slots=0),
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=30),
                steps=150,
            ),
            Stage(
                name="contrastive",
                objective=Contrastive(),
                trainable=("encoder/*", "text_tower/*", "contrastive/*"),
                data=Mixture(
                    (Weighted(OpenMojiCaptions(image_size=SIZE, augment=True, scene_share=0.3)),),
                    rows=128,
                    length=64,
                    slots=1,
                    layout="caption",
                ),
                optimizer=AdamW(learning_rate=1e-3, warmup_steps=50),
                steps=200,
            ),
            Stage(
                name="align",
                objective=NextToken(),
                trainable=("projector/*",),
                data=Mixture((questions, scenes, text), rows=16, length=256, slots=4),
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=20),
                steps=50,
            ),
            Stage(
                name="instruct",
                objective=NextToken(),
                trainable=("projector/*", "llm/*"),
                data=Mixture((questions, scenes, text), rows=16, length=256, slots=4),
                optimizer=AdamW(learning_rate=1e-3, warmup_steps=50),
                steps=600,
            ),
        ),
    )
