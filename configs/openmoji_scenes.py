"""A multimodal LLM from scratch on emoji and on scenes of four: half an hour or more on two CPU cores.

mllm train configs/openmoji_scenes.py

The quickstart's five stages, most of them longer, with a vector for each quarter of an image and with questions about
positions, numbers and presence.
"""

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.openmoji import OpenMojiCaptions, OpenMojiQuestions, OpenMojiScenes, OpenMojiText
from mllm_jax.datasets.openmoji.scenes import PLACES
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
WIDTH, LAYERS, HEADS, MLP = 256, 4, 4, 512  # of the image encoder and of the LLM
STEPS = {"language": 1000, "contrastive": 900, "align": 20, "describe": 280, "instruct": 1100}
DECAY = {"contrastive": 0.5, "describe": 0.3, "instruct": 0.1}
SHARES = {
    "language": {"scenes": 0.5},
    "contrastive": {"scenes": 0.4, "categories": 0.5},
    "describe": {"names": 0.75, "places": 0.25},
    "instruct": {"names": 0.2, "yes_no": 0.2, "questions": 0.2, "scenes": 0.2, "matches": 0.2},
}

MODEL = MultimodalConfig(
    inputs={
        "image": Branch(
            ViTConfig(
                image_size=SIZE,
                patch_size=16,
                hidden_size=WIDTH,
                num_layers=LAYERS,
                num_heads=HEADS,
                mlp_size=MLP,
                activation="relu",  # twice as fast as gelu or silu on a CPU
                stem_channels=(32, 64, 128, 256),
                mimetic_init=True,
                regions=2,
                region_size=WIDTH,
            ),
            MLPProjectorConfig(activation="relu", input_norm=True, place_embedding=True),
        )
    },
    llm=DecoderConfig(
        vocab_size=1024,  # also the tokenizer's and the text encoder's
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=HEADS // 2,
        mlp_size=MLP,
        activation="relu",
        qk_norm=True,
        mimetic_init=True,
    ),
    compute=Compute(scan_unroll=LAYERS),
)
# The contrastive stage trains the model's image encoder and a bag of words, in which the vector of an unseen name is
# the sum of the vectors of its words.
DUAL = DualEncoderConfig(
    text=TextTowerConfig(hidden_size=WIDTH, num_layers=0),
    projection_size=WIDTH,
    captions=4,
)


def experiment(
    name: str,
    subset: str,
    steps: dict[str, int],
    decay: dict[str, float] = DECAY,
    shares: dict[str, dict[str, float]] = SHARES,
    variants: int = 16,
    per_base: int = 3,
) -> Experiment:
    """Returns the stages on the configuration `subset` of the data set."""
    common = dict(config=subset, image_size=SIZE, augment=True, per_base=per_base)
    sources = {
        "names": OpenMojiQuestions(**common, variants=variants, tasks=("naming",), turns=1),
        "yes_no": OpenMojiQuestions(**common, variants=variants, tasks=("yes_no",), turns=5),
        "questions": OpenMojiQuestions(**common, variants=variants),
        "places": OpenMojiScenes(**common, tasks=("scene_position",), turns=4),
        "scenes": OpenMojiScenes(**common),
        "matches": OpenMojiScenes(**common, tasks=("scene_exists", "scene_count"), turns=6),  # against every cell
    }

    def weighted(stage: str) -> tuple[Weighted, ...]:
        return tuple(Weighted(sources[source], share) for source, share in shares[stage].items())

    text = OpenMojiText(config=subset, variants=variants, scene_share=shares["language"]["scenes"], per_base=per_base)
    captions = OpenMojiCaptions(
        **common,
        variants=variants,
        scene_share=shares["contrastive"]["scenes"],
        category_share=shares["contrastive"]["categories"],
    )
    held_out = OpenMojiQuestions(config=subset, split="validation", image_size=SIZE, variants=4)
    describing = Mixture(weighted("describe"), rows=16, length=128, slots={"image": 6})
    return Experiment(
        name=name,
        model=MODEL,
        tokenizer=TokenizerConfig(phrases=PLACES[2], places=PLACES[2]),
        cpu_devices=2,  # two devices on two cores are twice as fast as one
        evaluation=openmoji_questions(config=subset, image_size=SIZE),
        stages=(
            Stage(
                name="language",
                objective=NextToken(),
                trainable=("llm/*",),
                data=Mixture((Weighted(text),), rows=10, length=224, slots={}, learn="all"),
                optimizer=AdamW(learning_rate=3e-3, warmup_steps=30),
                steps=steps["language"],
            ),
            Stage(
                name="contrastive",
                objective=Contrastive(),
                model=DUAL,
                trainable=("encoder_image/*", "encoder_text/*", "heads/*"),
                # Four forms of a base in one group are hard negatives of each other.
                data=Mixture(
                    (Weighted(captions),),
                    rows=128,
                    length=112,
                    slots={"image": 1},
                    layout="caption",
                    captions=4,
                    group=4,
                ),
                optimizer=AdamW(learning_rate=1.5e-3, warmup_steps=50, weight_decay=decay["contrastive"]),
                steps=steps["contrastive"],
            ),
            Stage(
                name="align",
                objective=NextToken(),
                trainable=("projector_image/*",),
                data=describing,
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=5),
                steps=steps["align"],
            ),
            Stage(
                name="describe",
                objective=NextToken(),
                trainable=("projector_image/*", "llm/*"),
                data=describing,
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=30, end_factor=0.5, weight_decay=decay["describe"]),
                steps=steps["describe"],
            ),
            Stage(
                name="instruct",
                objective=NextToken(),
                trainable=("projector_image/*", "llm/*"),
                data=Mixture(
                    weighted("instruct"),
                    rows=8,
                    length=256,  # long conversations fill rows of 128 to 89 %
                    slots={"image": 6},
                ),
                optimizer=AdamW(learning_rate=1.5e-3, warmup_steps=30, weight_decay=decay["instruct"]),
                steps=steps["instruct"],
                validation=Mixture((Weighted(held_out),), rows=16, length=128, slots={"image": 4}),
                validate_every=200,
            ),
        ),
    )


def config() -> Experiment:
    return experiment("openmoji_scenes", "quickstart", STEPS)
