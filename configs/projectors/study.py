"""One controlled study of projectors: the same encoder, LLM, data, steps and media tokens; only the projector differs.

    python benchmarks/projectors.py

trains `base` once, then every projector of this folder with several seeds, and writes a table. With every projector an
image has 16 media tokens: one for each patch, or one for each learned query.
"""

from dataclasses import replace
from typing import Any

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.openmoji import OpenMojiSkills
from mllm_jax.datasets.text_only import TextOnly
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.evaluation.tasks.openmoji import openmoji_skills
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.blip2_stage1 import QFormerPretrainingConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.pformer_pretraining import PFormerPretrainingConfig
from mllm_jax.models.prompt_guided import PromptGuidedConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.projectors.pformer import PFormerConfig
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.projectors.resampler import ResamplerConfig
from mllm_jax.training.config import AdamW, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.objectives.pformer_losses import PFormerObjective, PromptGuided
from mllm_jax.training.objectives.qformer import QFormerStage1

SIZE = 64
VOCAB = 512
WIDTH = 192
TOKENS = 16  # media tokens of an image, with every projector
STEPS = {"language": 400, "contrastive": 400, "stage1": 200, "prompt": 200, "guided": 200, "align": 60, "instruct": 350}
RUNS = "runs/projectors"
COMPUTE = Compute(scan_unroll=4)

ENCODER = ViTConfig(
    image_size=SIZE,
    patch_size=SIZE // 4,
    hidden_size=WIDTH,
    num_layers=4,
    num_heads=4,
    mlp_size=2 * WIDTH,
    activation="relu",
    stem_channels=(32, 64, 96, 128),
    mimetic_init=True,
)
LLM = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    mlp_size=2 * WIDTH,
    activation="relu",
    qk_norm=True,
    mimetic_init=True,
)
QFORMER = QFormerConfig(
    hidden_size=WIDTH,
    num_layers=4,
    num_heads=4,
    mlp_size=2 * WIDTH,
    num_queries=TOKENS,
    vocab_size=VOCAB,
    max_length=64,
    compute=Compute(scan_unroll=2),
)
PROJECTORS: dict[str, Any] = {
    "linear": MLPProjectorConfig(num_layers=1),
    "mlp": MLPProjectorConfig(hidden_size=2 * WIDTH),
    "resampler": ResamplerConfig(num_queries=TOKENS, num_layers=2, head_dim=48, residual=True, mlp_size=2 * WIDTH),
    "qformer": QFORMER,
    "qformer_stage1": QFORMER,
    "pformer": QFORMER,
}
PFORMER = PFormerConfig(
    hidden_size=WIDTH,
    num_layers=4,
    num_heads=4,
    mlp_size=2 * WIDTH,
    num_queries=TOKENS,
    max_length=64,
    compute=Compute(scan_unroll=2),
)


def composed(projector: Any) -> MultimodalConfig:
    """Returns the model with the given projector."""
    return MultimodalConfig(inputs={"image": Branch(ENCODER, projector)}, llm=LLM, compute=COMPUTE)


def mixture(form: str, length: int, **settings) -> Mixture:
    """Returns examples of all skills; those of positions and numbers are the longest."""
    source = OpenMojiSkills(image_size=SIZE, augment=True, form=form)
    return Mixture((Weighted(source),), length=length, **settings)


def common(name: str) -> dict[str, Any]:
    """Returns the settings that all runs share; the LLM depends on the tokenizer."""
    path = None if name == "base" else f"{RUNS}/base/tokenizer.json"
    return dict(name=f"projectors_{name}", tokenizer=TokenizerConfig(path=path), cpu_devices=2)


def base() -> Experiment:
    """Returns the separate training of the LLM on text, and of the encoder by contrast with words."""
    words = TextTowerConfig(hidden_size=WIDTH, num_layers=0)
    return Experiment(
        **common("base"),
        model=composed(PROJECTORS["linear"]),
        stages=(
            Stage(
                name="language",
                objective=NextToken(),
                trainable=("llm/*",),
                data=mixture("text", 192, rows=10, slots={}, learn="all"),
                optimizer=AdamW(learning_rate=3e-3, warmup_steps=30),
                steps=STEPS["language"],
            ),
            Stage(
                name="contrastive",
                objective=Contrastive(),
                model=DualEncoderConfig(text=words, projection_size=WIDTH, pooling="patches"),
                trainable=("encoder_image/*", "encoder_text/*", "heads/*"),
                data=mixture("captions", 48, rows=128, slots={"image": 1}, layout="caption"),
                optimizer=AdamW(learning_rate=1.5e-3, warmup_steps=50),
                steps=STEPS["contrastive"],
            ),
        ),
    )


def from_base(part: str, stage: str) -> Pretrained:
    return Pretrained(part, f"{RUNS}/base", stage=stage, made_by=base())


def stage1() -> Experiment:
    """Returns BLIP-2's first stage of the Q-Former, on the pairs that the encoder was trained with."""
    return Experiment(
        **common("stage1"),
        model=QFormerPretrainingConfig(
            ENCODER, replace(QFORMER, output_size=LLM.hidden_size), projection_size=WIDTH, compute=COMPUTE
        ),
        pretrained=(from_base("encoder_image", "contrastive"),),
        stages=(
            Stage(
                name="stage1",
                objective=QFormerStage1(equal_texts=True),
                trainable=(
                    "projector_image/*",
                    "image_projection/*",
                    "text_projection/*",
                    "matching/*",
                    "caption*",
                    "temp*",
                ),
                data=mixture("captions", 48, rows=64, slots={"image": 1}, layout="caption"),
                optimizer=AdamW(learning_rate=1e-3, warmup_steps=30),
                steps=STEPS["stage1"],
            ),
        ),
    )


def prompt() -> Experiment:
    """Returns the training of the P-Former on captions, for prompts that make the LLM write them."""
    captions = mixture("captions", 48, rows=64, slots={}, layout="caption")
    texts = tuple(replace(source, source=TextOnly(source.source)) for source in captions.sources)
    return Experiment(
        **common("prompt"),
        model=PFormerPretrainingConfig(PFORMER, LLM, projection_size=WIDTH, compute=COMPUTE),
        pretrained=(from_base("llm", "language"),),
        stages=(
            Stage(
                name="prompt",
                objective=PFormerObjective(equal_texts=True),
                trainable=("prompter/*", "text_projection/*", "temperature"),
                data=replace(captions, sources=texts),
                optimizer=AdamW(learning_rate=1e-3, warmup_steps=30),
                steps=STEPS["prompt"],
            ),
        ),
    )


def guided() -> Experiment:
    """Returns the training of the Q-Former for the P-Former's prompts and for captions of the frozen LLM."""
    return Experiment(
        **common("guided"),
        model=composed(QFORMER),
        pretrained=(
            from_base("encoder_image", "contrastive"),
            from_base("llm", "language"),
            Pretrained("prompter", f"{RUNS}/prompt", stage="prompt", made_by=prompt()),
        ),
        stages=(
            Stage(
                name="guided",
                objective=PromptGuided(),
                model=PromptGuidedConfig(prompter=PFORMER),
                trainable=("projector_image/*",),
                data=mixture("captions", 48, rows=64, slots={"image": 1}, layout="caption"),
                optimizer=AdamW(learning_rate=1e-3, warmup_steps=30),
                steps=STEPS["guided"],
            ),
        ),
    )


def experiment(name: str) -> Experiment:
    """Returns the study of one projector: first alone between frozen encoder and LLM, then together with the LLM."""
    pretrained = (from_base("encoder_image", "contrastive"), from_base("llm", "language"))
    if name == "qformer_stage1":
        pretrained += (Pretrained("projector_image", f"{RUNS}/stage1", stage="stage1", made_by=stage1()),)
    if name == "pformer":
        pretrained += (Pretrained("projector_image", f"{RUNS}/guided", stage="guided", made_by=guided()),)
    data = mixture("images", 128, rows=16, slots={"image": 6})
    return Experiment(
        **common(name),
        model=composed(PROJECTORS[name]),
        pretrained=pretrained,
        evaluation=openmoji_skills(image_size=SIZE),
        stages=(
            Stage(
                name="align",
                objective=NextToken(),
                trainable=("projector_image/*",),
                data=data,
                optimizer=AdamW(learning_rate=2e-3, warmup_steps=10),
                steps=STEPS["align"],
            ),
            Stage(
                name="instruct",
                objective=NextToken(),
                trainable=("projector_image/*", "llm/*"),
                data=data,
                optimizer=AdamW(learning_rate=1.5e-3, warmup_steps=30),
                steps=STEPS["instruct"],
            ),
        ),
    )
