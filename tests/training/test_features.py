"""Features kept on disk of several modalities: equal batches, kills, the planner's spec, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_data import MODEL, Toy, quick_compilation, tokenizer

from mllm_jax import AdamW, Audio, Experiment, Mixture, NextToken, Stage, TokenizerConfig, Video, Weighted
from mllm_jax.data.message import Example, Image, Message, Text
from mllm_jax.data.pipeline import Pipeline, training_texts
from mllm_jax.data.video import FrameSampling
from mllm_jax.encoders.whisper import WhisperEncoderConfig
from mllm_jax.errors import ConfigError
from mllm_jax.models.branch import Branch
from mllm_jax.models.composed_layout import composed_layout
from mllm_jax.models.multimodal import Connection
from mllm_jax.models.processor import Processor
from mllm_jax.projectors.pool import PoolProjectorConfig
from mllm_jax.projectors.stacked import StackedProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.features import KEY_BYTES, FeatureCaches, stage_spec
from mllm_jax.training.loop import train

WHISPER = WhisperEncoderConfig(8, 16, num_layers=1, num_heads=2, mlp_size=32, max_source_positions=100)
# Videos share the encoder of images, but read its first hidden state.
SENSING = replace(
    MODEL,
    inputs={
        **MODEL.inputs,
        "video": Branch("image", PoolProjectorConfig(), Connection(layers=(0,))),
        "audio": Branch(WHISPER, StackedProjectorConfig(factor=8, hidden_size=16), seconds=1),
    },
)
MODALITIES = ("image", "video", "audio")
FRAMES, RATE = 3, 16_000


@dataclass(frozen=True)
class Clips:
    """An image, a video and a sound, or two of them, before a question."""

    size: int = 12
    name: str = "clips"

    def build(self) -> ClipSource:
        return ClipSource(self)


class ClipSource:
    def __init__(self, config: Clips):
        self.config, self.name = config, config.name

    def __len__(self) -> int:
        return self.config.size

    def example(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        frames = rng.integers(0, 256, (FRAMES, 9, 9, 3), np.uint8)
        sound = Audio(0.1 * rng.normal(size=8_000 + 1_000 * index).astype(np.float32), rate=RATE)
        shown = [Image(frames[0]), Video(frames, fps=2), sound]
        del shown[index % 4 : index % 4 + 1]
        return Example((Message("user", (*shown, Text("what"))), Message("assistant", f"{index} red")))

    def fingerprint(self) -> str:
        return repr(self.config)


DATA = Mixture((Weighted(Clips()),), rows=2, length=48, slots={"image": 2, "video": 2 * FRAMES, "audio": 2})
STAGE = Stage("align", NextToken(), ("projector_*", "llm/*"), DATA, 2, AdamW(warmup_steps=0), cache_features=True)


def experiment(stage: Stage = STAGE, model=SENSING, words: Path | None = None) -> Experiment:
    tokens = TokenizerConfig(path=None if words is None else str(words), frames=FrameSampling(FRAMES))
    return Experiment(name="clips", model=model, tokenizer=tokens, stages=(stage,), log_every=1)


@pytest.fixture(scope="module")
def batch():
    words = tokenizer()
    layout = composed_layout(SENSING, words, sampling=FrameSampling(FRAMES))
    return Pipeline(DATA, Processor(SENSING, words, layout), seed=0).batch(0)


@pytest.fixture(scope="module")
def params(batch):
    return jax.jit(SENSING.make().init)(jax.random.key(0), batch)["params"]


def opened(folder: Path, params: dict, stage: Stage = STAGE) -> FeatureCaches:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return FeatureCaches.of(folder, "key", stage, SENSING.make(), params, mesh)


def counted(caches: FeatureCaches) -> list[tuple[str, int]]:
    """Counts the media that each cache encodes from now on."""
    calls = []

    def counting(cache, encode):
        def encoded(*media):
            calls.append((cache.modality, len(media[0])))
            return encode(*media)

        cache.encode = encoded

    for cache in caches.caches:
        counting(cache, cache.encode)
    return calls


def test_a_batch_of_features_is_the_batch_of_media(batch, params, tmp_path):
    caches = opened(tmp_path, params)
    found = caches(batch)
    media = {"images", "video_images", "audio_sounds", "audio_masks"}
    assert set(batch) - set(found) == media
    assert set(found) - set(batch) == {"features", "video_features", "audio_features"}
    assert len(list(tmp_path.iterdir())) == 3, "a folder for each branch"
    logits = jax.jit(lambda batch: SENSING.make().apply({"params": params}, batch).logits)
    np.testing.assert_allclose(logits(found), logits(batch), atol=1e-5)
    for modality in MODALITIES:
        other = {name: 0 * x if name.endswith("features") and _of(name) == modality else x for name, x in found.items()}
        assert np.abs(logits(other) - logits(batch)).max() > 1e-4, f"features of {modality} reach the LLM"
    stage = caches.spec(SENSING.batch_spec(DATA.rows, DATA.length, DATA.slots))
    assert {n: (s.shape, s.dtype) for n, s in stage.items()} == {n: (x.shape, x.dtype.name) for n, x in found.items()}
    assert dict(stage_spec(experiment(), STAGE)) == dict(stage), "the planner's batch"
    caches.close()


def _of(name: str) -> str:
    return name.removesuffix("features").rstrip("_") or "image"


def test_each_medium_is_encoded_once(batch, params, tmp_path):
    caches = opened(tmp_path, params)
    calls, found = counted(caches), caches(batch)
    flat = {n: batch[n].reshape(-1, *batch[n].shape[2:]) for n in ("images", "video_images", "audio_sounds")}
    assert calls == [(m, len({x.tobytes() for x in media})) for m, media in zip(MODALITIES, flat.values(), strict=True)]
    # The same samples with another mask are another sound.
    shorter = batch["audio_masks"].copy()
    shorter[..., 20:] = 0
    other = caches(batch | {"audio_masks": shorter})
    assert [modality for modality, _ in calls[3:]] == ["audio"]
    assert np.abs(other["audio_features"] - found["audio_features"]).max() > 1e-3
    assert not other["audio_features"][:, :, 10:].any(), "two mel frames are a vector"
    text = {"tokens": batch["tokens"]}
    assert caches(text).keys() == text.keys()
    caches.close()


@pytest.mark.parametrize("torn", ["features.bin", "keys.bin"])
def test_a_cache_survives_a_kill_between_two_writes(batch, params, tmp_path, torn):
    caches = opened(tmp_path, params)
    found = caches(batch)
    held = [len(cache) for cache in caches.caches]
    caches.close()
    for folder in tmp_path.iterdir():
        if torn == "features.bin":  # features without their key
            with (folder / torn).open("ab") as file:
                file.write(b"torn")
        else:  # half of the last key
            with (folder / torn).open("r+b") as file:
                file.truncate((folder / torn).stat().st_size - KEY_BYTES // 2)
    again = opened(tmp_path, params)
    calls = counted(again)
    assert [len(cache) for cache in again.caches] == [n - (torn == "keys.bin") for n in held]
    for name, x in again(batch).items():
        np.testing.assert_array_equal(x, found[name])
    assert calls == [] if torn == "features.bin" else [(modality, 1) for modality in MODALITIES]
    again.close()


def test_kept_features_change_no_loss(tmp_path):
    words = tmp_path / "words" / "tokenizer.json"
    type(tokenizer()).train(training_texts([Clips().build(), Toy().build()]), 320).save(words.parent)

    def losses(stage: Stage) -> list[float]:
        run = tmp_path / f"cached {stage.cache_features}"
        with quick_compilation():
            train(experiment(stage, words=words), run, devices=jax.devices()[:1])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    found = losses(STAGE)
    assert len(found) == STAGE.steps
    np.testing.assert_allclose(found, losses(replace(STAGE, cache_features=False)), rtol=1e-5)
    assert len(list((tmp_path / "cached True" / "features").iterdir())) == 3


def test_only_the_media_of_the_stage_have_features(params, tmp_path):
    sounds = replace(STAGE, data=replace(DATA, slots={"audio": 2, "image": 0}), trainable=("encoder_image/*",))
    spec = stage_spec(experiment(sounds), sounds)
    assert "audio_features" in spec and not {"features", "video_features", "audio_sounds", "audio_masks"} & set(spec)
    caches = opened(tmp_path, params, sounds)
    assert [cache.modality for cache in caches.caches] == ["audio"]
    caches.close()


@pytest.mark.parametrize(
    "trained,slots",
    [("encoder_audio/*", {"audio": 2}), ("encoder_image/*", {"video": 3}), ("*", {"image": 1, "audio": 2})],
)
def test_trained_encoders_have_no_features(trained, slots):
    """Checks an encoder of sounds, and one of images that the branch of videos shares."""
    stage = replace(STAGE, trainable=(trained, "llm/*"), data=replace(DATA, slots=slots))
    with pytest.raises(ConfigError, match="cache_features of MultimodalConfig"):
        experiment(stage)
