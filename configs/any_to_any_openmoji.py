"""A model from scratch that describes emoji, draws them when asked, and otherwise answers in text.

mllm train configs/clip_openmoji.py                   the classifier that names what is drawn
mllm train configs/any_to_any_openmoji.py             4 signal tokens and GILL's mapper
mllm train configs/any_to_any_openmoji_connector.py   24 query tokens and MetaQuery's connector

The first of the two runs also trains what both share, in runs/any_to_any_openmoji_base: the generator with its text
encoder, which is frozen afterwards (up to 25 minutes on two CPU cores); the image encoder; and the LLM's first words.
Each variant then takes up to 15 minutes: its output projector is aligned with the text encoder, and is trained with the
LLM on requests to draw, about images and about words. As in their papers, the mapper learns the text encoder's output
(NExT-GPT, arXiv 2309.05519), and the connector through the frozen generator (arXiv 2504.06256).
"""

from typing import Any

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.openmoji import OpenMojiRequests
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.evaluation.tasks.openmoji_drawn import openmoji_drawn
from mllm_jax.generators.schedulers.ddim import DDIM
from mllm_jax.generators.unet import UNetConfig, UNetDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.generator_only import GeneratorOnlyConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.output import Output
from mllm_jax.models.text_to_image import TextToImageConfig
from mllm_jax.output_projectors.query_connector import QueryConnectorConfig
from mllm_jax.output_projectors.transformer import TransformerMapperConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.training.config import AdamW, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.diffusion import Diffusion
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.objectives.output_alignment import OutputAlignment

SIZE = 32  # pixels of an image's side
WIDTH, LAYERS, HEADS, MLP = 256, 4, 4, 512  # of the image encoder and of the LLM
WORDS, TEXT = 24, 128  # tokens of a caption, and the width of each
KINDS = ("single", "single", "single", "two", "position", "count")  # half of what is drawn is a single emoji
BASE = "runs/any_to_any_openmoji_base"
STEPS = {"generator": 1300, "encoder": 300, "language": 150, "align": 200}
INSTRUCT = {"mapper": 1200, "connector": 450}  # steps of about equal time

GENERATOR = TextToImageConfig(
    text_encoder=TextTowerConfig(max_length=WORDS, hidden_size=TEXT, num_layers=2, num_heads=4, mlp_size=256),
    unet=UNetConfig(
        sample_size=(SIZE,),
        in_channels=3,
        out_channels=3,
        channels=(24, 48, 96),
        layers=(1, 1, 1),
        num_heads=(2, 2, 4),
        text_sizes=((TEXT,),) * 3,
        depths=(1, 1, 1),
        down_blocks=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_blocks=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        dialect=UNetDialect(norm_groups=8, only_cross=(False,) * 3),
    ),
    vae=None,  # an autoencoder would save little at this size
    scheduler=DDIM(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
    ),
)
OUTPUTS = {
    "mapper": Output(
        TransformerMapperConfig(
            tokens=4, output_tokens=WORDS, output_size=TEXT, hidden_size=TEXT, num_layers=2, num_heads=4, mlp_size=MLP
        ),
        GENERATOR,
    ),
    "connector": Output(
        QueryConnectorConfig(tokens=WORDS, output_size=TEXT, num_layers=2, hidden_size=WIDTH, mlp_size=MLP),
        GENERATOR,
        queries=True,
    ),
}
ENCODER = ViTConfig(
    image_size=SIZE,
    patch_size=8,
    hidden_size=WIDTH,
    num_layers=LAYERS,
    num_heads=HEADS,
    mlp_size=MLP,
    activation="relu",
    stem_channels=(32, 64, 128),
    mimetic_init=True,
)
LLM = DecoderConfig(
    vocab_size=1024,  # also the tokenizer's and the text encoders'
    hidden_size=WIDTH,
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=HEADS // 2,
    mlp_size=MLP,
    activation="relu",
    qk_norm=True,
    mimetic_init=True,
)


def model(variant: str) -> MultimodalConfig:
    return MultimodalConfig(
        inputs={"image": Branch(ENCODER, MLPProjectorConfig(merge=2, activation="relu", input_norm=True))},
        llm=LLM,
        outputs={"image": OUTPUTS[variant]},
        compute=Compute(scan_unroll=LAYERS),
    )


def requests(draw: float, read: float, **settings: Any) -> Weighted:
    """Returns requests with these shares of drawings and of questions about images; the others are about words."""
    return Weighted(OpenMojiRequests(image_size=SIZE, kinds=KINDS, draw_share=draw, read_share=read, **settings))


def base() -> Experiment:
    """Returns the training of all that the variants share."""
    return Experiment(
        name="any_to_any_openmoji_base",
        model=model("connector"),  # its special tokens include the mapper's
        cpu_devices=2,
        stages=(
            Stage(
                name="generator",
                objective=Diffusion(drop=0.1, min_snr=5.0),
                model=GeneratorOnlyConfig(),
                trainable=("generator_image/*",),
                data=Mixture((requests(1.0, 0.0),), rows=8, length=256, slots={"image_targets": 4}),
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=50, end_factor=0.1, weight_decay=0.01, b2=0.99),
                steps=STEPS["generator"],
                ema=0.995,
            ),
            Stage(
                name="encoder",
                objective=Contrastive(),
                model=DualEncoderConfig(
                    text=TextTowerConfig(hidden_size=WIDTH, num_layers=0), projection_size=WIDTH, pooling="patches"
                ),
                trainable=("encoder_image/*", "encoder_text/*", "heads/*"),
                data=Mixture(
                    (requests(0.0, 1.0, form="captions", augment=True),),
                    rows=128,
                    length=32,
                    slots={"image": 1},
                    layout="caption",
                ),
                optimizer=AdamW(learning_rate=1.5e-3, warmup_steps=30, weight_decay=0.5),
                steps=STEPS["encoder"],
            ),
            Stage(
                name="language",
                objective=NextToken(),
                trainable=("llm/*",),
                data=Mixture((requests(0.0, 0.0),), rows=16, length=128, slots={}, learn="all"),
                optimizer=AdamW(learning_rate=3e-3, warmup_steps=20),
                steps=STEPS["language"],
            ),
        ),
    )


def experiment(variant: str = "mapper", name: str = "any_to_any_openmoji") -> Experiment:
    """Returns the training of a variant, "mapper" or "connector"."""
    shared = {"generator_image": "generator", "encoder_image": "encoder", "llm": "language"}
    parts = ("output_projector_*", "projector_image/*", "llm/*")
    length = 112 if variant == "mapper" else 192  # a drawing has 4 signal tokens, or 24 queries between two markers
    mixed = dict(rows=16, length=length, slots={"image": 3, "image_targets": 3})
    objective = OutputAlignment() if variant == "mapper" else Diffusion(drop=0.1, min_snr=5.0)
    return Experiment(
        name=name,
        model=model(variant),
        tokenizer=TokenizerConfig(path=f"{BASE}/processor/tokenizer.json"),
        pretrained=tuple(Pretrained(part, BASE, stage=stage, made_by=base()) for part, stage in shared.items()),
        cpu_devices=2,
        evaluation=openmoji_drawn(image_size=SIZE),
        stages=(
            Stage(
                name="align",
                objective=OutputAlignment(),
                trainable=parts,
                data=Mixture((requests(0.8, 0.1),), **mixed),
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=20, end_factor=0.5),
                steps=STEPS["align"],
            ),
            Stage(
                name="instruct",
                objective=objective,
                trainable=parts,
                data=Mixture((requests(0.5, 0.25),), **mixed),
                optimizer=AdamW(learning_rate=1.5e-3, warmup_steps=20),
                steps=INSTRUCT[variant],
            ),
        ),
    )


def config() -> Experiment:
    return experiment("mapper")
