"""A composed model that reads sounds: pieces in slots, masks, encoders of sounds, two steps of training, answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from toy_data import MODEL, SIZE, Toy, quick_compilation, tokenizer

from mllm_jax import AdamW, Audio, Experiment, Mixture, NextToken, Stage, TokenizerConfig, Weighted
from mllm_jax.cli.train import _next
from mllm_jax.data.message import Example, Image, Message, Text
from mllm_jax.data.pipeline import training_texts
from mllm_jax.encoders.beats import BEATsConfig
from mllm_jax.encoders.hubert import HubertConfig
from mllm_jax.encoders.whisper import WhisperEncoderConfig
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.models.branch import Branch
from mllm_jax.models.composed_layout import composed_layout
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.processor import Processor
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.projectors.stacked import StackedProjectorConfig
from mllm_jax.training.loop import train

RATE, FACTOR = 16_000, 8
WHISPER = WhisperEncoderConfig(8, 16, num_layers=1, num_heads=2, mlp_size=32, max_source_positions=100)
PROJECTOR = StackedProjectorConfig(factor=FACTOR, hidden_size=16)
PIECE = 50 / FACTOR  # media tokens of a second of Whisper's features, before rounding up
SEEING = replace(MODEL, inputs={**MODEL.inputs, "audio": Branch(WHISPER, PROJECTOR, seconds=1)})
ENCODERS = {
    "whisper": WHISPER,
    "hubert": HubertConfig(
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        mlp_size=32,
        conv_channels=(8,) * 7,
        position_kernel=8,
        position_groups=2,
    ),
    "beats": BEATsConfig(
        embedding_size=8, hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, dialect=BEATsConfig().dialect
    ),
}


def tone(seconds: float, hertz: float = 440.0) -> tuple[np.ndarray, int]:
    return 0.5 * np.sin(2 * np.pi * hertz / RATE * np.arange(round(seconds * RATE)), dtype=np.float32), RATE


def processor(config: MultimodalConfig = SEEING) -> Processor:
    return Processor(config, tokenizer(), composed_layout(config, tokenizer()))


def heard(encoder, seconds: float = 1.0) -> MultimodalConfig:
    return replace(MODEL, inputs={"audio": Branch(encoder, PROJECTOR, seconds=seconds)})


def test_pieces_of_a_sound_and_their_tokens():
    """Checks a sound of two and a half slots between two images, and a batch of unequal numbers."""
    ours, token = processor(), tokenizer().image_token_id
    grey = np.zeros((SIZE, SIZE, 3), np.uint8)
    said = Message("user", (Image(grey), Audio(tone(2.5)[0], rate=RATE), Image(grey), Text("what")))
    batch = ours([(said,), (Message("user", (Audio(tone(0.2)[0], rate=RATE), Text("what"))),)])
    assert batch["images"].shape[:2] == (2, 2) and batch["audio_sounds"].shape == (2, 3, 8, 100)
    assert batch["audio_masks"].sum(axis=-1).tolist() == [[100, 100, 50], [20, 0, 0]]
    full, images = int(np.ceil(PIECE)), 2 * MODEL.media_tokens
    here = batch["tokens"] == token
    sounds = [images + slot * full + n for slot, size in enumerate((full, full, 4)) for n in range(size)]
    grid = list(range(MODEL.media_tokens))
    assert batch["media_index"][0][here[0]].tolist() == [*grid, *sounds, *(MODEL.media_tokens + n for n in grid)]
    assert batch["media_index"][1][here[1]].tolist() == [images, images + 1], "0.2 s is 10 vectors, two groups"
    assert ours.declared(batch).without("loss_weights").keys() == batch.keys()


@pytest.mark.parametrize("kind", ENCODERS)
def test_padding_of_slots_and_batches_changes_no_answer(kind):
    """Checks that a sound gives the same logits alone and beside a longer one, and another sound others."""
    config = heard(ENCODERS[kind])
    ours, model = processor(config), config.make()
    alone = ours("<image> what", audios=[tone(0.5)])
    beside = ours(["<image> what", "<image> what"], audios=[tone(0.5), tone(1.9, 700)])
    params = jax.jit(model.init)(jax.random.key(0), alone)
    logits = jax.jit(lambda batch: model.apply(params, batch).logits)
    one, two = logits(alone), logits(beside)
    length = one.shape[1]
    np.testing.assert_allclose(one[0], two[0, :length], atol=2e-5)
    other = logits(ours("<image> what", audios=[tone(0.5, 1900)]))
    assert np.abs(other - one)[0, -1].max() > 1e-4
    assert np.isfinite(two).all()


def test_an_empty_slot_has_finite_gradients():
    config = heard(ENCODERS["hubert"])
    ours, model = processor(config), config.make()
    batch = ours("<image> what", audios=[tone(0.5)], slots={"audio": 3})
    assert batch["audio_masks"].sum(axis=-1).tolist() == [[8000, 0, 0]]
    params = jax.jit(model.init)(jax.random.key(0), batch)
    grads = jax.jit(jax.grad(lambda p: model.apply(p, batch).logits.std()))(params)
    found = [np.asarray(leaf) for leaf in jax.tree.leaves(grads["params"]["encoder_audio"])]
    assert all(np.isfinite(leaf).all() for leaf in found) and any(np.abs(leaf).max() > 0 for leaf in found)


@pytest.mark.parametrize(
    "branch,message",
    [
        (
            Branch(WHISPER, QFormerConfig(hidden_size=16, num_layers=2, num_heads=2), seconds=1),
            "a projector of sequences",
        ),
        (Branch(WHISPER, MLPProjectorConfig(merge=2), seconds=1), "merge 2 of a sequence"),
        (Branch(WHISPER, PROJECTOR, seconds=3), "at most 2 seconds"),
        (Branch(WHISPER, PROJECTOR, seconds=0.5), "whole seconds"),
    ],
)
def test_what_does_not_fit_is_refused(branch, message):
    with pytest.raises(ConfigError, match=message):
        processor(replace(MODEL, inputs={"audio": branch}))


def test_a_sound_without_a_media_token_is_refused():
    with pytest.raises(DataError, match="a sound of 0.010 s\n  expected: enough for one media token"):
        processor(heard(ENCODERS["hubert"]))("<image> what", audios=[tone(0.01)])


def test_models_without_sounds_refuse_them():
    with pytest.raises(DataError, match="a medium of type Audio\n  expected: images: the model reads nothing else"):
        processor(MODEL)("<image> what", audios=[tone(0.5)])


@dataclass(frozen=True)
class Tones:
    """Tones that the answer names; with and without an image before them."""

    size: int = 12
    name: str = "tones"

    def build(self) -> ToneSource:
        return ToneSource(self)


class ToneSource:
    def __init__(self, config: Tones):
        self.config, self.name = config, config.name

    def __len__(self) -> int:
        return self.config.size

    def example(self, index: int) -> Example:
        sound = Audio(tone(0.3 + index % 4 / 2, 300 + 50 * index)[0], rate=RATE)
        image = Image(np.full((9, 9, 3), 20 * index, np.uint8))
        shown = (image, sound) if index % 3 else (sound,)
        return Example((Message("user", (*shown, Text("what"))), Message("assistant", f"{index} red")))

    def fingerprint(self) -> str:
        return repr(self.config)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains two steps of both branches."""
    base = tmp_path_factory.mktemp("tones")
    words = base / "words" / "tokenizer.json"
    type(tokenizer()).train(training_texts([Tones().build(), Toy().build()]), 320).save(words.parent)
    data = Mixture((Weighted(Tones()),), rows=2, length=48, slots={"image": 2, "audio": 4})
    experiment = Experiment(
        name="tones",
        model=SEEING,
        tokenizer=TokenizerConfig(path=str(words)),
        stages=(
            Stage("all", NextToken(), ("encoder_audio/*", "projector_*", "llm/*"), data, 2, AdamW(warmup_steps=0)),
        ),
    )
    with quick_compilation():
        train(experiment, base / "run", devices=jax.devices()[:1])
    return base / "run"


@pytest.mark.parametrize("modality,option", [("image", "--image cat.png"), ("audio", "--audio cat.wav")])
def test_what_to_type_next(modality, option):
    stage = Stage("all", NextToken(), ("llm/*",), Mixture((Weighted(Tones()),), 2, 48, {}), 2)
    model = replace(SEEING, inputs={modality: SEEING.inputs[modality]})
    made = Experiment(name="tones", model=model, tokenizer=TokenizerConfig(), stages=(stage,))
    assert _next(made, Path("run")) == f'mllm generate run {option} "What is this?"'


def test_a_run_answers_about_a_sound(run, tmp_path):
    soundfile.write(tmp_path / "a.wav", *tone(1.2), subtype="FLOAT")
    assistant = Assistant.load(run)
    how = dict(max_new_tokens=4, ignore_eos=True)

    def asked(**source):
        return [{"role": "user", "content": [{"type": "audio", **source}, {"type": "text", "text": "what"}]}]

    answer = assistant.generate(asked(path=str(tmp_path / "a.wav")), **how)
    given = assistant.generate(asked(audio=tone(1.2)[0], rate=RATE), **how)
    assert answer.tokens == given.tokens and len(answer.tokens) == 4
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(DataError, match="a.wav"):
        assistant.generate(asked(path=str(tmp_path / "a.wav")), **how)
