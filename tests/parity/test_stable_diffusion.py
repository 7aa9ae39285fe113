"""Stable Diffusion against diffusers' pipelines from tiny folders: texts to images, images to images, saved folders."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import tiny_diffusion as tiny
import torch
from PIL import Image

import mllm_jax
from mllm_jax.checkpoints.fingerprint import short_fingerprint
from mllm_jax.errors import ConfigError, MllmError
from mllm_jax.generation.draw import Drawer
from mllm_jax.generators.schedulers import NAMES
from mllm_jax.models.convert import convert
from mllm_jax.models.registry import from_pretrained, pretrained_config, save_pretrained

PROMPTS, NEGATIVES = ["a red cat", "blue dog, on the sofa"], ["blurry", "a small dog"]
STEPS, TOLERANCE = 10, 1e-4
# Stable Diffusion 1, 2 and 2.1 with a zero terminal signal, as their options are.
SECOND = dict(
    text=dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=3, hidden_act="gelu", projection_dim=20),
    unet=dict(
        attention_head_dim=[2, 4],
        use_linear_projection=True,
        sample_size=(16, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        upcast_attention=True,
    ),
)
FOLDERS = {
    "one": {},
    "two": SECOND
    | dict(scheduler=diffusers.DDIMScheduler(**tiny.SCHEDULER, prediction_type="v_prediction", steps_offset=1)),
    "zero signal": dict(
        vae=dict(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            scaling_factor=0.3,
        ),
        unet=dict(layers_per_block=2, sample_size=8),
        text=dict(num_hidden_layers=1),
        scheduler=diffusers.EulerDiscreteScheduler(
            **tiny.SCHEDULER, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        seed=7,
    ),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Returns the smallest pipeline and its assistant, for what depends on the sampler alone."""
    folder = tmp_path_factory.mktemp("small")
    return tiny.write(folder, **tiny.SMALL), mllm_jax.Assistant.load(folder)


def drawn(answers) -> np.ndarray:
    return np.stack([answer.media[0].array for answer in answers])


def noises(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def torches(array: np.ndarray) -> torch.Tensor:
    """Returns latents [..., h, w, C] with their channels before height and width."""
    return torch.tensor(np.moveaxis(array, -1, -3))


@pytest.fixture
def given_noise(monkeypatch):
    """Replaces diffusers' random numbers by an array's, in their order; returns what is left of it."""

    def replace(array: np.ndarray):
        left = list(torches(array))
        for module in (
            diffusers.schedulers.scheduling_ddpm,
            diffusers.schedulers.scheduling_euler_ancestral_discrete,
            diffusers.models.autoencoders.vae,
            diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img,
        ):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: left.pop(0))
        return left

    return replace


def with_scheduler(name: str, small, kind: type):
    """Returns diffusers' pipeline of a kind, with the scheduler of our name and the options of the folder's."""
    pipeline, assistant = small
    stored = diffusers.PNDMScheduler.load_config(assistant.model.companions, subfolder="scheduler")
    scheduler = getattr(diffusers, NAMES[name].class_name).from_config(stored, clip_sample=False)
    made = kind(**pipeline.components | dict(scheduler=scheduler), requires_safety_checker=False)
    return tiny.quiet(made)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder(name, tmp_path, assert_close):
    """Checks the images of a folder, and of the folder that is saved from it, in both libraries."""
    pipeline = tiny.write(tmp_path / "theirs", **FOLDERS[name])
    assistant = mllm_jax.Assistant.load(tmp_path / "theirs")
    height, width = pretrained_config(tmp_path / "theirs").unet.height_and_width
    latents = noises(2, height, width, 4)
    how = dict(num_inference_steps=STEPS, negative_prompt=NEGATIVES, guidance_scale=4.0, output_type="np")
    wanted = pipeline(PROMPTS, latents=torches(latents), **how).images
    asked = dict(negative=NEGATIVES, steps=STEPS, guidance_scale=4.0, latents=latents)
    assert_close(drawn(assistant.draw(PROMPTS, **asked)), wanted, TOLERANCE)

    save_pretrained(assistant.model, assistant.params, tmp_path / "ours")
    again = tiny.quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours"))
    np.testing.assert_array_equal(again(PROMPTS, latents=torches(latents), **how).images, wanted)
    assert type(again.scheduler) is type(pipeline.scheduler)
    assert pretrained_config(tmp_path / "ours") == pretrained_config(tmp_path / "theirs")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flow"])
def test_a_scheduler(small, name, given_noise, assert_close):
    """Checks ten guided steps with each scheduler, from the same noise."""
    assistant = small[1]
    latents, noise = noises(2, 16, 16, 4), noises(STEPS, 2, 16, 16, 4)
    stochastic = NAMES[name]().stochastic
    left = given_noise(noise)
    wanted = with_scheduler(name, small, diffusers.StableDiffusionPipeline)(
        PROMPTS,
        negative_prompt=NEGATIVES,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        latents=torches(latents),
        output_type="np",
    ).images
    assert (len(left) < STEPS) == stochastic  # diffusers may draw none in the last step
    found = assistant.draw(
        PROMPTS,
        NEGATIVES,
        steps=STEPS,
        guidance_scale=4.0,
        latents=latents,
        noise=noise if stochastic else None,
        scheduler=name,
    )
    assert_close(drawn(found), wanted, TOLERANCE)
    assert found[0].media[0].metadata["scheduler"] == NAMES[name].class_name


@pytest.mark.parametrize("name, size", [("pndm", (40, 32)), ("dpm++", (27, 45)), ("euler_ancestral", (32, 32))])
def test_a_start_image(small, name, size, given_noise, assert_close):
    """Checks images that start from another one, of any size, at another strength, without guidance for one of them."""
    assistant = small[1]
    image = Image.fromarray((np.random.default_rng(3).random((*size, 3)) * 255).astype(np.uint8))
    height, width = (side // 2 for side in size)
    noise = noises(2 + STEPS, 2, height, width, 4)
    given_noise(noise)
    guidance = 1.0 if name == "pndm" else 3.0
    wanted = with_scheduler(name, small, diffusers.StableDiffusionImg2ImgPipeline)(
        PROMPTS,
        image=[image, image],
        strength=0.55,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type="np",
    ).images
    count = 2 + (5 if name == "euler_ancestral" else 0)
    found = assistant.draw(
        PROMPTS,
        steps=STEPS,
        guidance_scale=guidance,
        start_image=image,
        strength=0.55,
        noise=noise[:count],
        scheduler=name,
    )
    assert_close(drawn(found), wanted, TOLERANCE)


def test_bfloat16(small):
    """Checks that a model in bfloat16 draws nearly the same image: its sampler computes in float32."""
    how = dict(steps=4, guidance_scale=1.0, latents=noises(1, 16, 16, 4))
    wanted = drawn(small[1].draw("a cat", **how))
    found = drawn(mllm_jax.Assistant.load(small[1].model.companions, dtype="bfloat16").draw("a cat", **how))
    assert found.dtype == np.float32
    assert 0 < np.abs(found - wanted).max() < 0.1


# ---- what is refused


@pytest.fixture
def folder(small, tmp_path):
    """Returns a copy of the smallest folder."""
    return shutil.copytree(small[1].model.companions, tmp_path / "copy")


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_parts_that_are_not_here(folder):
    change(folder / "scheduler" / "scheduler_config.json", _class_name="HeunDiscreteScheduler")
    change(folder / "model_index.json", scheduler=["diffusers", "HeunDiscreteScheduler"])
    with pytest.raises(ConfigError, match="HeunDiscreteScheduler"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "values, named",
    [
        (dict(unet=["diffusers", "UNetSpatioTemporalConditionModel"]), "UNetSpatioTemporalConditionModel"),
        (dict(_class_name="StableDiffusionXLPipeline"), "StableDiffusionXLPipeline"),
        (dict(force_zeros_for_empty_prompt=True), "force_zeros_for_empty_prompt=True"),
        (dict(vae=[None, None]), "no vae"),
        (dict(text_encoder_2=["transformers", "CLIPTextModel"]), "text_encoder_2"),
    ],
)
def test_an_index(folder, values, named):
    if "text_encoder_2" in values:
        shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    change(folder / "model_index.json", **values)
    with pytest.raises(MllmError, match=named):
        pretrained_config(folder)


def test_parts_that_do_not_fit(folder):
    change(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(ConfigError, match="from 9 to 4 channels"):
        pretrained_config(folder)
    change(folder / "unet" / "config.json", in_channels=4, cross_attention_dim=17)
    with pytest.raises(ConfigError, match=r"width \[17\], and texts of 24"):
        pretrained_config(folder)


# ---- what is carried along


def test_carried_folders(small, folder, tmp_path):
    """Checks that a safety checker and a feature extractor are copied, and a checker without safetensors is not."""
    from transformers import CLIPConfig, CLIPImageProcessorPil

    config = dict(intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    checker = diffusers.pipelines.stable_diffusion.StableDiffusionSafetyChecker(
        CLIPConfig(
            vision_config=dict(hidden_size=8, image_size=8, patch_size=4, **config),
            text_config=dict(hidden_size=8, vocab_size=9, **config),
        )
    )
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessorPil(size=8, crop_size=8).save_pretrained(folder / "feature_extractor")
    change(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    model, params = from_pretrained(folder)
    save_pretrained(model, params, tmp_path / "with")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "with")
    assert again.safety_checker is not None and again.feature_extractor is not None and again.tokenizer is not None

    for file in (folder / "safety_checker").glob("*.safetensors"):
        file.rename(file.with_name("pytorch_model.bin"))
    save_pretrained(model, params, tmp_path / "without", companions=folder)
    assert not (tmp_path / "without" / "safety_checker").exists()
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "without")
    assert again.safety_checker is None


def test_conversion(folder, tmp_path, small):
    """Checks that a folder becomes a native one and comes back, with its tokenizer."""
    convert(folder, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "back")
    drawer, wanted = Drawer.load(tmp_path / "native"), small[1].params
    assert drawer.config == small[1].model.config and drawer.fingerprint == short_fingerprint(wanted)
    assert drawer.captions.read("a red cat")[0] == small[0].tokenizer("a red cat").input_ids
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "back")
    assert pipeline.tokenizer("a red cat").input_ids == small[0].tokenizer("a red cat").input_ids
    flat = torch.nn.utils.parameters_to_vector
    assert torch.equal(flat(pipeline.unet.parameters()), flat(small[0].unet.parameters()))
