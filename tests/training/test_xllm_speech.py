"""X-LLM's speech line, tiny: its first stage, a run that goes on, and answers; and its config of full size."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import arrays
from toy_data import kept_programs, quick_compilation, tokenizer

from mllm_jax import AdamW, Audio, Experiment, Mixture, QuantityGuided, Stage, TokenizerConfig, Weighted
from mllm_jax.data.message import Example, Message, Text
from mllm_jax.data.pipeline import training_texts
from mllm_jax.encoders.hubert import HubertConfig
from mllm_jax.generation.assistant import Assistant
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.cformer_projector import CFormerProjectorConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.training.config import CheckpointConfig
from mllm_jax.training.config_file import load_config
from mllm_jax.training.features import stage_spec
from mllm_jax.training.loop import train

RATE, STEPS = 16_000, 8
ROOT = Path(__file__).parents[2]
ENCODER = HubertConfig(16, 1, 2, 24, conv_channels=(8,) * 7, position_kernel=4, position_groups=2)
PROJECTOR = CFormerProjectorConfig(
    cif_size=16, hidden_size=16, num_layers=1, num_heads=2, mlp_size=24, max_length=32, factor=4
)
LLM = DecoderConfig(vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=64)
MODEL = MultimodalConfig({"audio": Branch(ENCODER, PROJECTOR, seconds=1)}, LLM)
WORDS = ("low", "middle low", "high and", "the highest of")


def tone(index: int) -> Audio:
    kind, seconds = index % 4, 0.4 + index % 3 * 0.25
    wave = 0.5 * np.sin(2 * np.pi * 250 * 2**kind / RATE * np.arange(round(seconds * RATE)), dtype=np.float32)
    return Audio(wave, rate=RATE)


def question(index: int) -> Message:
    return Message("user", (tone(index), Text("what")))


@dataclass(frozen=True)
class Tones:
    """Tones of four octaves, which the answers name with one to three words."""

    size: int = 24
    name: str = "tones"

    def build(self) -> ToneSource:
        return ToneSource(self)


class ToneSource:
    def __init__(self, config: Tones):
        self.config, self.name = config, config.name

    def __len__(self) -> int:
        return self.config.size

    def example(self, index: int) -> Example:
        return Example((question(index), Message("assistant", WORDS[index % 4])))

    def fingerprint(self) -> str:
        return repr(self.config)


def experiment(base: Path, steps: int) -> Experiment:
    words = base / "words" / "tokenizer.json"
    if not words.is_file():
        type(tokenizer()).train(training_texts([Tones().build()]), 320).save(words.parent)
    data = Mixture((Weighted(Tones()),), rows=4, length=72, slots={"audio": 3})
    optimizer = AdamW(learning_rate=1e-2, warmup_steps=1, schedule="constant")
    common = dict(trainable=("projector_audio/*", "llm/*"), data=data, optimizer=optimizer)
    return Experiment(
        name="tones",
        model=MODEL,
        tokenizer=TokenizerConfig(path=str(words)),
        log_every=1,
        checkpoint=CheckpointConfig(every_steps=4),
        stages=(Stage("convert", QuantityGuided(quantity=0.1), steps=steps, **common),),
    )


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Shares compiled programs between both runs."""
    with kept_programs(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains one run to its end, and one that stops and goes on."""
    base = tmp_path_factory.mktemp("tones")
    with quick_compilation():
        for folder, steps in (("whole", STEPS), ("parts", STEPS - 3), ("parts", STEPS)):
            train(experiment(base, steps), base / folder, devices=jax.devices()[:1])
    return base


def test_both_losses_fall(runs):
    first = [line for line in lines(runs / "whole") if "loss_quantity" in line]
    assert len(first) == STEPS
    for name in ("loss_language", "loss_quantity"):
        values = [line[name] for line in first]
        assert np.mean(values[-2:]) < 0.8 * np.mean(values[:2]), (name, values)
    assert all(0 <= line["cut"] < 1 and line["fired"] > 0 for line in first)


def test_a_run_goes_on_with_the_same_bits(runs):
    whole, parts = (arrays(runs / folder / "stages" / "0-convert") for folder in ("whole", "parts"))
    assert whole and whole == parts


def test_greedy_answers_equal_a_loop_without_cache(runs):
    """Compares the tokens, and checks that the two sounds of a batch do not change each other's answers."""
    assistant = Assistant.load(runs / "whole")
    how = dict(max_new_tokens=4, ignore_eos=True)
    asked = [[question(1)], [question(3)]]
    answers = assistant.generate(asked, **how)
    assert [assistant.generate(one, **how).tokens for one in asked] == [answer.tokens for answer in answers]
    run = jax.jit(lambda params, batch: assistant.model.apply({"params": params}, batch).logits)
    for messages, answer in zip(asked, answers, strict=True):
        batch = {name: np.array(array) for name, array in assistant.processor([tuple(messages)]).items()}
        length = int((batch["segments"] > 0).sum())
        fills = {"tokens": 0, "segments": 0, "positions": 0, "media_index": -1}
        for name, fill in fills.items():
            batch[name] = np.pad(batch[name][:, :length], ((0, 0), (0, 64 - length)), constant_values=fill)
        said = []
        for at in range(length, length + 4):
            said.append(int(run(assistant.params, batch)[0, at - 1].argmax()))
            for name, value in zip(fills, (said[-1], 1, at, -1), strict=True):
                batch[name][0, at] = value
        assert said == list(answer.tokens)


def test_the_config_of_full_size():
    """Checks its stages' batches and objectives without weights, data or a tokenizer."""
    made = load_config(ROOT / "configs" / "xllm_speech.py")
    branch = made.model.branch("audio")
    assert branch.tokens == 94 and (branch.projector.input_size, branch.projector.output_size) == (1024, 4096)
    for stage in made.stages:
        stage.objective.check(stage, made.model_of(stage))
        spec = stage_spec(made, stage)
        assert spec["audio_sounds"].shape == (128, 1, 15 * RATE)
    assert replace(branch.projector, input_size=512).cif_size == 512
