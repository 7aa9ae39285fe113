"""A multimodal LLM from scratch on emoji: minutes on two CPU cores.

mllm train configs/quickstart.py

Five stages: the LLM learns to read descriptions; a picture tower learns against a text tower; the projector learns the
LLM's language; projector and LLM learn to say what they see, then to answer questions.
"""

from dataclasses import replace

from mllm_jax.data.openmoji import OpenMojiCaptions, OpenMojiQuestions, OpenMojiScenes, OpenMojiText
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
STEPS = {"language": 250, "contrastive": 230, "align": 20, "describe": 300, "instruct": 700}

MODEL = MultimodalConfig(
    encoder=ViTConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=192,
        num_layers=5,
        num_heads=3,
        mlp_size=384,
        activation="relu",  # twice as fast as gelu or silu on a CPU
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
        max_length=72,
        hidden_size=192,
        num_layers=1,
        num_heads=3,
        mlp_size=384,
        activation="relu",
    ),
    contrastive=ContrastiveConfig(projection_size=256),
)


def experiment(
    name: str, pictures: str, steps: dict[str, int], variants: int = 16, caption_length: int = 72
) -> Experiment:
    """The stages on the named configuration of the data set, whose captions take at most `caption_length` tokens."""
    common = dict(config=pictures, image_size=SIZE, augment=True)
    names = OpenMojiQuestions(**common, variants=variants, tasks=("naming",), turns=1)
    yes_no = OpenMojiQuestions(**common, variants=variants, tasks=("yes_no",), turns=5)
    questions = OpenMojiQuestions(**common, variants=variants)
    places = OpenMojiScenes(**common, tasks=("scene_position",), turns=4)
    scenes = OpenMojiScenes(**common)
    captions = OpenMojiCaptions(**common, variants=variants, scene_share=0.3)
    text = OpenMojiText(config=pictures, variants=variants)
    held_out = OpenMojiQuestions(config=pictures, split="validation", image_size=SIZE, variants=4)
    return Experiment(
        name=name,
        model=replace(MODEL, text_tower=replace(MODEL.text_tower, max_length=caption_length)),
        tokenizer=TokenizerConfig(vocab_size=1024),
        cpu_devices=2,  # two devices on two cores are twice as fast as one
        evaluation=OpenMojiEvaluation(config=pictures, image_size=SIZE),
        stages=(
            Stage(
                name="language",
                objective=NextToken(),
                trainable=("llm/*",),
                data=Mixture((Weighted(text),), rows=12, length=192, slots=0, learn="all"),
                optimizer=AdamW(learning_rate=3e-3, warmup_steps=30),
                steps=steps["language"],
            ),
            Stage(
                name="contrastive",
                objective=Contrastive(),
                trainable=("encoder/*", "text_tower/*", "contrastive/*"),
                # Four forms of a base side by side are each other's hard negatives.
                data=Mixture(
                    (Weighted(captions),), rows=128, length=caption_length, slots=1, layout="caption", group=4
                ),
                optimizer=AdamW(learning_rate=1e-3, warmup_steps=50),
                steps=steps["contrastive"],
            ),
            Stage(
                name="align",
                objective=NextToken(),
                trainable=("projector/*",),
                data=Mixture((Weighted(names, 0.7), Weighted(places, 0.3)), rows=16, length=128, slots=5),
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=5),
                steps=steps["align"],
            ),
            Stage(
                name="describe",
                objective=NextToken(),
                trainable=("projector/*", "llm/*"),
                data=Mixture((Weighted(names, 0.7), Weighted(places, 0.3)), rows=16, length=128, slots=5),
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=30, end_factor=0.5),
                steps=steps["describe"],
            ),
            Stage(
                name="instruct",
                objective=NextToken(),
                trainable=("projector/*", "llm/*"),
                data=Mixture(
                    (Weighted(names, 0.35), Weighted(yes_no, 0.15), Weighted(questions, 0.35), Weighted(scenes, 0.15)),
                    rows=16,
                    length=128,
                    slots=5,
                ),
                optimizer=AdamW(learning_rate=1.5e-3, warmup_steps=30),
                steps=steps["instruct"],
                validation=Mixture((Weighted(held_out),), rows=16, length=128, slots=5),
                validate_every=200,
            ),
        ),
    )


def config() -> Experiment:
    return experiment("quickstart", "quickstart", STEPS)
