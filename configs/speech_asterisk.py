"""Transcription with Whisper tiny.en's encoder and SmolLM2-135M-Instruct: a new projector on 489 telephone prompts.

apt-get download asterisk-core-sounds-en-wav asterisk-core-sounds-en
for package in asterisk-core-sounds-en*.deb; do dpkg-deb -x "$package" runs/asterisk; done
python tests/assets/whisper_tiny_en.py runs/whisper-tiny.en
python tests/assets/smollm2.py runs/smollm2-135m-instruct
mllm train configs/speech_asterisk.py

Ten of the encoder's vectors, 0.2 seconds, become one media token (arXiv 2402.08846). The first stage trains the
projector, the second also the LLM, about half an hour on two CPU cores and 9 GB. The evaluation transcribes held-out
prompts: a word error rate of 80.6 % in the run of benchmarks/RESULTS.md, and 151.2 % with shuffled sounds.
"""

from pathlib import Path

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.asterisk_speech import AsteriskSpeech
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.tasks.clips import asterisk_task
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.registry import pretrained_config
from mllm_jax.projectors.stacked import StackedProjectorConfig
from mllm_jax.training.config import AdamW, CheckpointConfig, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.objectives.next_token import NextToken

WHISPER, LLM, SPEECH = "runs/whisper-tiny.en", "runs/smollm2-135m-instruct", "runs/asterisk"
MAKE = {
    WHISPER: f"python tests/assets/whisper_tiny_en.py {WHISPER}",
    LLM: f"python tests/assets/smollm2.py {LLM}",
    SPEECH: "the commands at the top of this config",
}
SECONDS = 5  # of a sound in one slot; longer ones take several


def config() -> Experiment:
    for folder, command in MAKE.items():
        if not Path(folder).is_dir():
            raise ConfigError(f"no folder {folder}", "its files", f"make it: {command}")
    encoder, llm = pretrained_config(WHISPER).parts["encoder_audio"], pretrained_config(LLM)
    speech = str(Path(SPEECH).resolve())
    sound = Branch(encoder, StackedProjectorConfig(factor=10, hidden_size=1024), seconds=SECONDS)
    data = Mixture((Weighted(AsteriskSpeech(folder=speech, max_seconds=15)),), rows=4, length=160, slots={"audio": 4})
    return Experiment(
        name="speech_asterisk",
        model=MultimodalConfig(inputs={"audio": sound}, llm=llm),
        pretrained=(Pretrained("encoder_audio", WHISPER), Pretrained("llm", LLM)),
        tokenizer=TokenizerConfig(folder=LLM, system=""),
        cpu_devices=2,
        checkpoint=CheckpointConfig(every_steps=100, keep_last=1),
        evaluation=(asterisk_task(speech, max_seconds=15),),
        stages=(
            Stage(
                name="align",
                objective=NextToken(),
                trainable=("projector_audio/*",),
                data=data,
                optimizer=AdamW(learning_rate=1e-3, warmup_steps=20, end_factor=0.3),
                steps=120,
            ),
            Stage(
                name="transcribe",
                objective=NextToken(),
                trainable=("projector_audio/*", "llm/*"),
                data=data,
                optimizer=AdamW(learning_rate=2e-4, warmup_steps=20, weight_decay=0.0),
                steps=120,
            ),
        ),
    )
