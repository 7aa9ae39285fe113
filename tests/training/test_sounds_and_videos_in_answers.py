"""Composed models that produce videos and sounds: a Zeroscope and an AudioLDM-2 beside one LLM; a small generator."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_audioldm2
import tiny_diffusion
from flax import linen as nn
from tiny_drawing import GENERATOR, MAPPER
from toy_data import COLOURS, MODEL, quick_compilation

import mllm_jax
from mllm_jax import AdamW, Experiment, Mixture, Pretrained, Stage, TokenizerConfig, Weighted
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.data.message import Audio, Example, Message, Text, Video
from mllm_jax.data.processing.mel_magnitudes import MelMagnitudes
from mllm_jax.errors import ConfigError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generators.griffin_lim import GriffinLimConfig
from mllm_jax.models.audioldm2_output import AudioLDM2OutputConfig
from mllm_jax.models.diffused import diffuse
from mllm_jax.models.generator_only import GeneratorOnlyConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.output import Output
from mllm_jax.models.registry import pretrained_config
from mllm_jax.models.run_weights import load_run
from mllm_jax.models.text_to_sound import TextToSoundConfig
from mllm_jax.output_projectors.several import SeveralConditionsConfig, fill_positions
from mllm_jax.training.loop import train
from mllm_jax.training.objectives.diffusion import Diffusion
from mllm_jax.training.objectives.output_alignment import OutputAlignment

FRAMES, RATE = 16, 16_000
SMALL_UNET = tiny_diffusion.SMALL["unet"]
SOUND_UNET = replace(GENERATOR.unet, sample_size=(16, 8), in_channels=1, out_channels=1)
OPTIMIZER = AdamW(learning_rate=3e-3, warmup_steps=0)


@dataclass(frozen=True)
class Requests:
    """Requests that a video, a sound, or both answer."""

    kinds: tuple[str, ...] = ("video", "audio")
    size: int = 20
    name: str = "requests"

    def build(self) -> RequestSource:
        return RequestSource(self)


class RequestSource:
    def __init__(self, config: Requests):
        self.config, self.name = config, config.name

    def __len__(self) -> int:
        return self.config.size

    def example(self, index: int) -> Example:
        colour = COLOURS[index % len(COLOURS)]
        frames = np.full((FRAMES, 20, 20, 3), 20 * (index % len(COLOURS)), np.uint8)
        tone = np.sin(np.arange(3000) * (0.1 + index % len(COLOURS)) / 5).astype(np.float32)
        media = dict(video=Video(frames, fps=8, caption=colour), audio=Audio((tone, RATE), caption=f"{colour} cat"))
        wanted = [media[kind] for kind in self.config.kinds][: 1 + index % 2]
        return Example((Message("user", f"show {colour}"), Message("assistant", (Text("here"), *wanted))))

    def fingerprint(self) -> str:
        return repr(self.config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("generators")
    blocks = dict(down_block_types=("DownBlock3D",), up_block_types=("UpBlock3D",))
    tiny_diffusion.write(base / "video", video=True, **tiny_diffusion.SMALL | dict(unet=SMALL_UNET | blocks))
    tiny_audioldm2.write(base / "audio")
    config = base / "audio" / "vocoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sampling_rate": RATE}))
    return base


def both(folders: Path) -> MultimodalConfig:
    """Returns a model of texts that produces videos and sounds."""
    video = replace(pretrained_config(folders / "video"), image_size=None)
    audio = AudioLDM2OutputConfig.of(
        pretrained_config(folders / "audio"), caption_ids=(16, 14), text_vectors=6, seconds=0.05
    )
    sizes = dict(zip(("output_tokens", "output_size"), (video.longest, video.condition_size), strict=True))
    mappers = [
        replace(MAPPER, output_tokens=tokens, output_size=size)
        for tokens, size in zip(audio.condition_tokens, audio.condition_size, strict=True)
    ]
    outputs = {
        "video": Output(replace(MAPPER, **sizes), video, tokenizer=str(folders / "video" / "tokenizer")),
        "audio": Output(
            SeveralConditionsConfig(tuple(mappers), tokens=MAPPER.tokens), audio, tokenizer=str(folders / "audio")
        ),
    }
    return MultimodalConfig(inputs={}, llm=MODEL.llm, outputs=outputs)


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    data = Mixture((Weighted(Requests()),), rows=2, length=48, slots={"video_targets": 2, "audio_targets": 2})
    trained = ("output_projector_*", "llm/*")
    experiment = Experiment(
        name="both",
        model=both(folders),
        tokenizer=TokenizerConfig(vocab_size=320),
        pretrained=tuple(Pretrained(f"generator_{kind}", str(folders / kind)) for kind in ("video", "audio")),
        stages=(Stage("align", OutputAlignment(), trained, data, 4, OPTIMIZER, cache_features=True),),
        log_every=1,
    )
    with quick_compilation():
        train(experiment, tmp_path_factory.mktemp("both") / "run", devices=jax.devices()[:2])
    return tmp_path_factory.getbasetemp() / "both0" / "run"


def test_both_are_aligned(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    align = [line["condition_distance"] for line in lines if line.get("stage") == "align" and "loss" in line]
    assert len(align) == 4 and align[-1] < align[0]


def test_kept_conditions_are_those_of_captions(run, folders):
    _, model, params, _, _ = load_run(RunFolder(run))
    assert len(list((run / "features").glob("*/features.bin"))) == 2
    rng = np.random.default_rng(0)
    batch = {
        f"{name}_captions": rng.integers(3, 20, (2, 3, model.config.output(name).generator.caption_length))
        for name in model.config.outputs
    }

    def call(method, *inputs):
        return model.apply({"params": params}, *inputs, method=method)

    wanted = call("caption_conditions", batch)
    flat = {name: call("flat_conditions", batch, name) for name in wanted}
    kept = {f"{name}_conditions": each.reshape(2, 3, -1) for name, each in flat.items()}
    found = call("caption_conditions", kept)
    assert [x.shape for x in found["audio"]] == [(2, 3, 8, 8), (2, 3, 6, 10)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


def test_a_generator_of_two_conditions_denoises_under_both_or_none(run):
    """Checks `diffuse` against the UNet under the condition of an empty caption, and under the given conditions."""
    _, model, params, _, _ = load_run(RunFolder(run))
    config = model.config.output("audio").generator
    rng = np.random.default_rng(0)
    shape = (1, 2, *(side // config.factor for side in config.target_shape), config.unet.in_channels)
    batch = dict(
        audio_latents=rng.normal(size=shape), audio_noise=rng.normal(size=shape), audio_level=np.full((1, 2), 0.4),
        audio_dropped=np.array([[True, False]]), audio_empty=rng.integers(3, 20, (1, config.caption_length)),
    )  # fmt: skip
    given = tuple(
        rng.normal(size=(1, 2, *each)).astype(np.float32)
        for each in zip(config.condition_tokens, config.condition_size, strict=True)
    )
    generator, of = config.make(), {"params": params["generator_audio"]}
    with quick_compilation():
        made = jax.jit(lambda given: nn.apply(lambda m: diffuse(m, "audio", batch, given), generator)(of))(given)
    times = np.full(2, int(0.4 * config.scheduler.num_train_timesteps))
    noised = config.scheduler.add_noise(batch["audio_latents"][0], batch["audio_noise"][0], times)
    empty = generator.apply(of, batch["audio_empty"], method="condition")
    text = [np.stack([none[0], own[0, 1]]) for none, own in zip(empty, given, strict=True)]
    output = generator.apply(of, noised, times, tuple(text), method="denoise")
    np.testing.assert_allclose(made.output[0], output, atol=1e-4)
    assert np.abs(made.output[0, 0] - made.output[0, 1]).max() > 1e-2 and made.snr.shape == (1, 2)


def test_an_answer_holds_both(run, tmp_path):
    assistant = Assistant.load(run)
    options = dict(steps=2, guidance_scale=2.0, frames=2, seconds=0.08)
    answer = assistant.generate("show red", produce=("video", "audio"), drawing=options, max_new_tokens=2, most=2)
    assert answer.text.startswith("<video 1> <audio 1>")
    video, audio = answer.media
    assert video.kind == "video" and video.array.shape[0] == 2 and video.array.shape[-1] == 3
    assert audio.kind == "audio" and audio.array.shape == (round(0.08 * RATE),) and audio.rate == RATE
    assert np.abs(audio.array).max() > 0 and audio.metadata["seconds"] == "0.08"
    for medium, name in ((video, "a.mp4"), (audio, "a.wav")):
        medium.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100
    again = assistant.generate(["show red", "show blue"], produce=("audio",), drawing=options, max_new_tokens=1)
    assert [each.media[0].kind for each in again] == ["audio"] * 2
    assert np.abs(again[0].media[0].array - again[1].media[0].array).max() > 0
    # Asked for texts, it draws with the first of its generators.
    assert assistant.draw("red cat", steps=1, frames=2)[0].media[0].kind == "video"


def test_conditions_of_captions_are_those_of_the_pipeline(folders):
    """Checks the two conditions of padded captions against those of each text alone, read without padding."""
    config = both(folders).output("audio").generator
    alone, params = mllm_jax.from_pretrained(folders / "audio", dtype="float32")
    words = [mllm_jax.ChatTokenizer.load(folders / "audio" / name) for name in config.tokenizers]
    captions = config.captions(words)
    texts = ["red cat", "a", "a long text of many letters"]
    ids = np.stack([captions.padded(text) for text in texts])
    assert ids.shape == (3, config.caption_length) and captions.longest == 14
    assert captions.read("a long text of many letters")[1] and not captions.read("a")[1]
    vectors, states = config.make().apply({"params": params}, ids, method="condition")
    assert (vectors.shape[1:], states.shape[1:]) == tuple(
        zip(config.condition_tokens, config.condition_size, strict=True)
    )
    drawer = mllm_jax.generation.draw_sound.AudioLDM2Drawer(alone, params, *words)
    for row, text in enumerate(texts[:2]):
        read = drawer._encoded([text], None)[0]
        wanted, t5, mask = alone.apply({"params": params}, read, method="condition")
        np.testing.assert_allclose(vectors[row], wanted[0], atol=1e-5)
        np.testing.assert_allclose(states[row], fill_positions(t5, mask.astype(bool), 6)[0], atol=1e-5)


@pytest.fixture(scope="module")
def sounding(tmp_path_factory):
    """Trains a small generator of sounds alone, and returns its run."""
    spec = MelMagnitudes(n_fft=256, hop=128, bins=8)
    generator = TextToSoundConfig(
        GENERATOR.text_encoder, SOUND_UNET, None, GENERATOR.scheduler, vocoder=GriffinLimConfig(spec), spectrogram=spec
    )
    experiment = Experiment(
        name="sounding",
        model=MultimodalConfig(inputs={}, llm=MODEL.llm, outputs={"audio": Output(MAPPER, generator)}),
        tokenizer=TokenizerConfig(vocab_size=320),
        stages=(
            Stage(
                "generator",
                Diffusion(),
                ("generator_audio/*",),
                Mixture((Weighted(Requests(("audio",))),), rows=2, length=48, slots={"audio_targets": 2}),
                3,
                OPTIMIZER,
                model=GeneratorOnlyConfig(),
            ),
        ),
    )
    folder = tmp_path_factory.mktemp("sounding") / "run"
    with quick_compilation():
        train(experiment, folder, devices=jax.devices()[:1])
    return folder


def test_a_small_generator_of_sounds_is_trained_and_draws(sounding):
    assistant = Assistant.load(sounding)
    config = assistant.model.config.output("audio").generator
    made = assistant.draw(["red", "blue"], steps=2, guidance_scale=1.0)
    sounds = [answer.media[0] for answer in made]
    assert all(each.array.shape == (16 * 128,) and each.rate == RATE for each in sounds)
    assert assistant.draw("red", steps=1, seconds=0.1)[0].media[0].array.shape == (1600,)
    with pytest.raises(ConfigError, match="height=8 for a model that draws sounds"):
        assistant.generate("show red", produce=("audio",), drawing=dict(steps=1, height=8))
    answer = assistant.generate("show red", produce=("audio",), drawing=dict(steps=1), max_new_tokens=1)
    assert answer.media[0].array.shape == (16 * 128,)
    # Spectrograms and latents: the one is the other, within what is kept.
    module, params = config.make(), assistant.params["generator_audio"]
    assert "vocoder" not in params
    given = np.random.default_rng(0).uniform(-12, 5, (2, 16, 8)).astype(np.float32)
    latents = module.apply({"params": params}, given, method="latents_of")
    assert latents.shape == (2, 16, 8, 1) and float(np.abs(latents).max()) == 1.0
    least, most = config.loudness
    kept = np.clip(given, least, most)
    sound = config.vocoder.make().apply({}, kept)
    decoded = module.apply({"params": params}, latents, method="decode")
    np.testing.assert_allclose(decoded, np.clip(sound, -1, 1), atol=5e-2)  # phases multiply what rounding does


def test_generators_that_do_not_fit_are_refused(folders):
    model = both(folders)
    audio = model.outputs["audio"]
    with pytest.raises(ConfigError, match="without a tokenizer for the 2 text encoders"):
        replace(model, outputs={"audio": replace(audio, tokenizer=None)})
    with pytest.raises(ConfigError, match=r"outputs\['image'\] with a AudioLDM2OutputConfig"):
        replace(model, outputs={"image": audio})
    with pytest.raises(ConfigError, match=r"outputs\['audio'\] with a AudioLDM2Config"):
        replace(model, outputs={"audio": replace(audio, generator=pretrained_config(folders / "audio"))})
    with pytest.raises(ConfigError, match="vectors of width"):
        replace(model, outputs={"audio": replace(audio, generator=replace(audio.generator, text_vectors=7))})
    spec = MelMagnitudes(bins=8)
    with pytest.raises(ConfigError, match="a vocoder of 64 bins"):
        TextToSoundConfig(GENERATOR.text_encoder, SOUND_UNET, None, GENERATOR.scheduler, spectrogram=spec)
