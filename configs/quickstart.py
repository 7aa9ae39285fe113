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
from mllm_jax.evaluation.openmoji import OpenMojiEvaluation
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
            qk_norm=True,
            mimetic_init=True,
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
    names = OpenMojiQuestions(image_size=SIZE, variants=16, augment=True, tasks=("naming",), turns=1)
    yes_no = OpenMojiQuestions(image_size=SIZE, variants=16, augment=True, tasks=("yes_no",), turns=5)
    questions = OpenMojiQuestions(image_size=SIZE, variants=16, augment=True)
    places = OpenMojiScenes(image_size=SIZE, augment=True, tasks=("scene_position",), turns=4)
    scenes = OpenMojiScenes(image_size=SIZE, augment=True)
    text = OpenMojiText()
    describe = Mixture((Weighted(names, 0.7), Weighted(places, 0.3)), rows=16, length=128, slots=5)
    instruct = Mixture(
        (Weighted(names, 0.3), Weighted(yes_no, 0.15), Weighted(questions, 0.3), Weighted(scenes, 0.25)),
        rows=16,
        length=128,
        slots=5,
    )
    return Experiment(
        name="quickstart",
        model=model,
        tokenizer=TokenizerConfig(vocab_size=1024),
        cpu_devices=2,
        evaluation=OpenMojiEvaluation(image_size=SIZE),
        stages=(
            Stage(
                name="language",
                objective=NextToken(),
                trainable=("llm/*",),
                data=Mixture((Weighted(text),), rows=16, length=128, slots=0),
                optimizer=AdamW(learning_rate=3e-3, warmup_steps=30),
                steps=200,
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
                    group=4,
                ),
                optimizer=AdamW(learning_rate=1e-3, warmup_steps=50),
                steps=200,
            ),
            Stage(
                name="align",
                objective=NextToken(),
                trainable=("projector/*",),
                data=describe,
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=5),
                steps=20,
            ),
            Stage(
                name="describe",
                objective=NextToken(),
                trainable=("projector/*", "llm/*"),
                data=describe,
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=30, end_factor=0.5),
                steps=350,
            ),
            Stage(
                name="instruct",
                objective=NextToken(),
                trainable=("projector/*", "llm/*"),
                data=instruct,
                optimizer=AdamW(learning_rate=1.5e-3, warmup_steps=30),
                steps=600,
            ),
        ),
    )
