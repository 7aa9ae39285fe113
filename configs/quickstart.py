"""A multimodal LLM from scratch on emoji: eight or nine minutes on two CPU cores.

mllm train configs/quickstart.py

Five stages: the LLM learns from descriptions; the image encoder learns by contrast with a text encoder; the projector
is aligned with the LLM; projector and LLM learn to name images, then to answer questions about them.
"""

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.openmoji import OpenMojiCaptions, OpenMojiQuestions, OpenMojiText
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.evaluation.tasks.openmoji import openmoji_questions
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.training.config import AdamW, Experiment, Stage, TokenizerConfig
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken

SIZE = 64  # pixels of an image's side
WIDTH, HEADS, MLP = 256, 4, 512  # of the image encoder and of the LLM
KINDS = ("naming", "yes_no", "skin_tone", "gender", "category")  # of questions

MODEL = MultimodalConfig(
    inputs={
        "image": Branch(
            ViTConfig(
                image_size=SIZE,
                patch_size=16,
                hidden_size=WIDTH,
                num_layers=4,
                num_heads=HEADS,
                mlp_size=MLP,
                activation="relu",  # twice as fast as gelu or silu on a CPU
                stem_channels=(32, 64, 128, 256),
                mimetic_init=True,
                regions=1,  # one vector an image: the LLM reads few tokens
                region_size=WIDTH,
            ),
            MLPProjectorConfig(activation="relu", input_norm=True),
        )
    },
    llm=DecoderConfig(
        vocab_size=1024,  # also the tokenizer's and the text encoder's
        hidden_size=WIDTH,
        num_layers=2,  # half the layers for twice the steps
        num_heads=HEADS,
        num_kv_heads=HEADS // 2,
        mlp_size=MLP,
        activation="relu",
        qk_norm=True,
        mimetic_init=True,
    ),
    compute=Compute(scan_unroll=4),
)
# The contrastive stage trains the model's image encoder and a bag of words, in which the vector of an unseen name is
# the sum of the vectors of its words.
DUAL = DualEncoderConfig(text=TextTowerConfig(hidden_size=WIDTH, num_layers=0), projection_size=WIDTH)


def config() -> Experiment:
    shared = dict(image_size=SIZE, variants=6)
    text = OpenMojiText(variants=6, scene_share=0.0)
    captions = OpenMojiCaptions(**shared, augment=True, category_share=0.4)
    names = OpenMojiQuestions(**shared, tasks=("naming",), turns=1)
    yes_no = OpenMojiQuestions(**shared, tasks=("yes_no",), turns=5)
    questions = OpenMojiQuestions(**shared, tasks=KINDS)
    held_out = OpenMojiQuestions(split="validation", image_size=SIZE, variants=4, tasks=KINDS)
    rows = dict(rows=16, length=128, slots={"image": 10})
    naming = Mixture((Weighted(names),), **rows)
    return Experiment(
        name="quickstart",
        model=MODEL,
        tokenizer=TokenizerConfig(),
        cpu_devices=2,  # two devices on two cores are twice as fast as one
        evaluation=tuple(
            task
            for task in openmoji_questions(splits=("composition", "unseen"), image_size=SIZE)
            if task.name.split("/")[1] in KINDS
        ),
        stages=(
            Stage(
                name="language",
                objective=NextToken(),
                trainable=("llm/*",),
                data=Mixture((Weighted(text),), rows=10, length=224, slots={}, learn="all"),
                optimizer=AdamW(learning_rate=3e-3, warmup_steps=20),
                steps=200,
            ),
            Stage(
                name="contrastive",
                objective=Contrastive(),
                model=DUAL,
                trainable=("encoder_image/*", "encoder_text/*", "heads/*"),
                # Four forms of a base in one group are hard negatives of each other.
                data=Mixture((Weighted(captions),), rows=128, length=28, slots={"image": 1}, layout="caption", group=4),
                optimizer=AdamW(learning_rate=1.5e-3, warmup_steps=20, weight_decay=0.5),
                steps=280,
            ),
            Stage(
                name="align",
                objective=NextToken(),
                trainable=("projector_image/*",),
                data=naming,
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=5),
                steps=20,
                cache_features=True,
            ),
            Stage(
                name="describe",
                objective=NextToken(),
                trainable=("projector_image/*", "llm/*"),
                data=naming,
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=20, end_factor=0.5, weight_decay=0.3),
                steps=80,
                cache_features=True,
            ),
            Stage(
                name="instruct",
                objective=NextToken(),
                trainable=("projector_image/*", "llm/*"),
                data=Mixture((Weighted(names, 0.25), Weighted(yes_no, 0.45), Weighted(questions, 0.3)), **rows),
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=20, weight_decay=0.1),
                steps=440,
                validation=Mixture((Weighted(held_out),), **rows),
                validate_every=100,
                cache_features=True,
            ),
        ),
    )
