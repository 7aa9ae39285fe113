"""Speech recognition on your recordings: Whisper small's encoder, a new projector and SmolLM2-360M-Instruct.

mllm train configs/speech_whisper_smollm2.py

You provide, under the names at the top of this file (relative paths of data begin in MLLM_DATA_DIR, if it is set):

- WHISPER and LLM, the folders of openai/whisper-small and HuggingFaceTB/SmolLM2-360M-Instruct. Other sizes need no
  change; `mllm models` lists other families of an LLM.
- TRAIN and HELD_OUT, two manifests of JSON lines, {"audio_filepath": "a.wav", "text": "hello there", "duration": 1.2},
  or two folders of LibriSpeech such as LibriSpeech/train-clean-100; see `mllm_jax.SpeechRecords`.

The first stage is SLAM-ASR (arXiv 2402.08846): five of the encoder's vectors, 0.1 seconds, are concatenated and become
one media token by an MLP of one hidden layer of 2,048 with ReLU, which alone is trained; AdamW without weight decay, a
learning rate of 1e-4 after 1,000 steps of warm-up that then stays, at most 100,000 steps, and an end when the
validation loss does not decrease; the request "Transcribe speech to text."; sounds padded to the 30 seconds of Whisper.
Its LLMs have 1 to 7 billion parameters and are never trained. Ours, without a published source: 16 rows of 512 tokens
with up to three recordings each, the validation every 1,000 steps, and a second stage, which also trains the small LLM
with a learning rate of 2e-5. No full run has been made.
"""

from pathlib import Path
from typing import Any

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.speech_records import SpeechRecords
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.tasks.clips import speech_task
from mllm_jax.layers.compute import Compute
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.registry import pretrained_config
from mllm_jax.projectors.stacked import StackedProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.objectives.next_token import NextToken

WHISPER, LLM = "runs/whisper-small", "runs/smollm2-360m-instruct"
SECONDS = 30  # of a recording: Whisper's window; longer ones are left out
TRAIN = SpeechRecords("speech/train.jsonl", "speech", max_seconds=SECONDS)
HELD_OUT = SpeechRecords("speech/held_out.jsonl", "speech", max_seconds=SECONDS)
STEPS = {"align": 100_000, "transcribe": 10_000}


def experiment(
    whisper: str,
    llm: str,
    train: Any,
    held_out: Any,
    steps: dict[str, int] = STEPS,
    rows: int = 16,
    length: int = 512,
    seconds: int = SECONDS,
    dtype: str = "bfloat16",
) -> Experiment:
    """Returns both stages.

    Args:
        whisper, llm: Hugging Face folders.
        train, held_out: sources of recordings.
        seconds: of the longest recording.
    """
    encoder = pretrained_config(whisper).parts["encoder_audio"]
    speech = Branch(encoder, StackedProjectorConfig(factor=5, hidden_size=2048, activation="relu"), seconds=seconds)

    def stage(name: str, trainable: tuple[str, ...], learning_rate: float, warmup_steps: int) -> Stage:
        data = [Mixture((Weighted(source),), rows, length, slots={"audio": 3}) for source in (train, held_out)]
        return Stage(
            name=name,
            objective=NextToken(),
            trainable=trainable,
            data=data[0],
            validation=data[1],
            validate_every=1_000,
            patience=3,
            optimizer=AdamW(learning_rate, warmup_steps, weight_decay=0.0, b2=0.999, schedule="constant"),
            steps=steps[name],
        )

    return Experiment(
        name="speech_whisper_smollm2",
        model=MultimodalConfig(inputs={"audio": speech}, llm=pretrained_config(llm), compute=Compute(dtype=dtype)),
        pretrained=(Pretrained("encoder_audio", whisper), Pretrained("llm", llm)),
        tokenizer=TokenizerConfig(folder=llm, system=""),
        mesh=MeshConfig(data=-1),
        evaluation=(speech_task(held_out, max_new_tokens=256),),
        stages=(
            stage("align", ("projector_audio/*",), 1e-4, 1_000),
            stage("transcribe", ("projector_audio/*", "llm/*"), 2e-5, 500),
        ),
    )


def config() -> Experiment:
    for folder, model in {WHISPER: "openai/whisper-small", LLM: "HuggingFaceTB/SmolLM2-360M-Instruct"}.items():
        if not Path(folder).is_dir():
            raise ConfigError(f"no folder {folder}", f"the files of {model}", "fetch them, or change the name")
    return experiment(WHISPER, LLM, TRAIN, HELD_OUT)
