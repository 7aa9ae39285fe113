"""Zeroscope against diffusers' pipeline from a tiny folder: texts to videos, and the saved folder."""

from __future__ import annotations

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import tiny_diffusion as tiny
import torch

import mllm_jax
from mllm_jax.errors import ConfigError
from mllm_jax.generators.schedulers import NAMES
from mllm_jax.models.convert import convert
from mllm_jax.models.registry import pretrained_config, save_pretrained

PROMPTS, NEGATIVES = ["a red cat", "blue dog, on the sofa"], ["blurry", "a small dog"]
STEPS, TOLERANCE = 10, 1e-4
FRAMES, SIDES = 3, (4, 6)
# Limits apply to each frame, and an offset of 0 stays; the pipeline of images would replace it by 1.
SCHEDULER = diffusers.DDIMScheduler(**tiny.SCHEDULER, thresholding=True, sample_max_value=2.0, clip_sample=True)
SMALL = tiny.SMALL | dict(
    unet=dict(
        tiny.SMALL["unet"], down_block_types=("DownBlock3D",), up_block_types=("UpBlock3D",), attention_head_dim=4
    )
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Returns the smallest pipeline and its assistant."""
    folder = tmp_path_factory.mktemp("small")
    return tiny.write(folder, **SMALL, scheduler=SCHEDULER, video=True), mllm_jax.Assistant.load(folder)


def drawn(answers) -> np.ndarray:
    return np.stack([answer.media[0].array for answer in answers])


def noises(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def wanted_of(pipeline, latents: np.ndarray, **how) -> np.ndarray:
    """Returns diffusers' videos of PROMPTS, [B, F, H, W, 3], from latents [B, F, h, w, C]."""
    how = dict(num_inference_steps=STEPS, negative_prompt=NEGATIVES, guidance_scale=4.0, output_type="np") | how
    start = torch.tensor(np.moveaxis(latents, -1, 1))
    return np.asarray(pipeline(PROMPTS, latents=start, num_frames=latents.shape[1], **how, **sides(latents)).frames)


def sides(latents: np.ndarray) -> dict[str, int]:
    return dict(height=8 * latents.shape[2], width=8 * latents.shape[3])  # only checked: latents have the size


def test_a_folder(tmp_path, assert_close):
    """Checks the videos of a folder, and of the folder that is saved from it, in both libraries."""
    pipeline = tiny.write(tmp_path / "theirs", video=True, unet=dict(layers_per_block=1, attention_head_dim=5))
    assistant = mllm_jax.Assistant.load(tmp_path / "theirs")
    latents = noises(2, FRAMES, *SIDES, 4)
    wanted = wanted_of(pipeline, latents)
    answers = assistant.draw(PROMPTS, NEGATIVES, steps=STEPS, guidance_scale=4.0, latents=latents)
    assert_close(drawn(answers), wanted, TOLERANCE)
    assert wanted.shape == (2, FRAMES, 8, 12, 3)
    assert {(answer.text, answer.media[0].kind, answer.media[0].rate) for answer in answers} == {
        ("<video 1>", "video", 8)
    }

    save_pretrained(assistant.model, assistant.params, tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index.keys() == {
        "_class_name", "_diffusers_version", "scheduler", "text_encoder", "tokenizer", "unet", "vae"
    }  # fmt: skip
    again = tiny.quiet(diffusers.TextToVideoSDPipeline.from_pretrained(tmp_path / "ours"))
    np.testing.assert_array_equal(wanted_of(again, latents), wanted)
    assert type(again.scheduler) is type(pipeline.scheduler)
    assert pretrained_config(tmp_path / "ours") == pretrained_config(tmp_path / "theirs")

    convert(tmp_path / "ours", tmp_path / "native")
    assert pretrained_config(tmp_path / "native") == pretrained_config(tmp_path / "theirs")


@pytest.mark.parametrize("name", [None, "ddpm"])
def test_limits_of_each_frame_and_noise(small, name, monkeypatch, assert_close):
    """Checks the folder's own scheduler, with its options, and a stochastic one, without guidance."""
    pipeline, assistant = small
    latents, noise = noises(2, FRAMES, *SIDES, 4), noises(STEPS, 2, FRAMES, *SIDES, 4)
    if name is not None:
        kind = getattr(diffusers, NAMES[name].class_name)
        scheduler = kind.from_config(SCHEDULER.config, clip_sample=False, steps_offset=1)
        pipeline = tiny.quiet(diffusers.TextToVideoSDPipeline(**pipeline.components | dict(scheduler=scheduler)))
    left = list(torch.tensor(noise.reshape(STEPS, -1, *noise.shape[-3:])).movedim(-1, -3))
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *_, **__: left.pop(0))
    wanted = wanted_of(pipeline, latents, guidance_scale=1.0, negative_prompt=None)
    how = dict(steps=STEPS, guidance_scale=1.0, latents=latents, scheduler=name)
    assert_close(drawn(assistant.draw(PROMPTS, noise=None if name is None else noise, **how)), wanted, TOLERANCE)
    assert (len(left) < STEPS) == (name is not None)


def test_encoding(small, assert_close):
    """Checks that the frames are encoded in order, with the autoencoder's scaling and each with its noise."""
    pipeline, assistant = small
    videos = np.random.default_rng(0).random((2, FRAMES, 8, 12, 3), dtype=np.float32)
    noise = noises(2, FRAMES, *SIDES, 4)
    with torch.no_grad():
        found = pipeline.vae.encode(torch.tensor(2 * videos - 1).flatten(0, 1).movedim(-1, 1)).latent_dist
        sampled = found.mean.movedim(1, -1) + found.std.movedim(1, -1) * torch.tensor(noise).flatten(0, 1)
    wanted = pipeline.vae.config.scaling_factor * sampled.reshape(noise.shape)
    encode = jax.jit(lambda params: assistant.model.apply({"params": params}, videos, noise, method="encode"))
    assert_close(encode(assistant.params), wanted, TOLERANCE)


def test_a_video_alone_and_in_a_batch(small):
    """Checks that a video depends on its prompt and its seed alone, and the default of the frames."""
    assistant = small[1]
    how = dict(steps=2, guidance_scale=2.0, height=8, width=8, frames=2)
    answers = assistant.draw(["a red cat", "dog"], seed=3, count=2, batch_size=2, **how)
    videos = drawn(answers)
    assert videos.shape == (4, 2, 8, 8, 3) and videos.dtype == np.float32 and videos.min() >= 0 and videos.max() <= 1
    assert np.abs(videos[0] - videos[1]).max() > 1e-3 and np.abs(videos[:, 0] - videos[:, 1]).max() > 1e-3
    assert np.abs(drawn(assistant.draw("dog", seed=4, **how)) - videos[3]).max() < 1e-5
    about = answers[3].media[0].metadata
    assert (about["prompt"], about["seed"], about["frames"], about["size"]) == ("dog", "4", "2", "8x8")
    shapes = []
    assistant.draw("dog", steps=1, guidance_scale=1.0, on_step=lambda *step: shapes.append(step[2].shape))
    assert shapes == [(1, 16, 8, 8, 4)]


@pytest.mark.parametrize(
    "asked, named",
    [
        (dict(frames=0), "frames=0"),
        (dict(frames=2.0), "frames=2.0"),
        (dict(seconds=2.0), "seconds=2.0 for a model that draws videos"),
        (dict(start_image=np.zeros((8, 8, 3))), "start_image for a model that draws videos"),
        (dict(frames=2, latents=np.zeros((3, 4, 4, 4))), "frames 2 beside latents of 3"),
        (dict(height=12), "nearest is 16"),
        (dict(scheduler="flow"), "scheduler .flow"),
    ],
)
def test_options(small, asked, named):
    with pytest.raises(ConfigError, match=named):
        small[1].draw("dog", **asked)


def test_latents_of_other_shapes(small):
    for shape, named in (((1, 4, 4, 4), "videos, frames, height"), ((4, 4, 4), "videos, frames, height")):
        with pytest.raises(mllm_jax.MllmError, match=named):
            small[1].draw(["dog", "cat"], latents=np.zeros(shape))


def test_a_unet_of_images(small, tmp_path):
    """Checks that neither pipeline takes the other's UNet."""
    folders = {"StableDiffusionPipeline": "UNet3DConditionModel", "TextToVideoSDPipeline": "UNet2DConditionModel"}
    shutil.copytree(small[1].model.companions, tmp_path / "StableDiffusionPipeline")
    tiny.write(tmp_path / "TextToVideoSDPipeline", **tiny.SMALL)
    for name, held in folders.items():
        path = tmp_path / name / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(_class_name=name)))
        with pytest.raises(ConfigError, match=f"a {name} with unet of class {held}"):
            pretrained_config(tmp_path / name)
