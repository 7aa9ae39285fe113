"""NExT-GPT (arXiv 2309.05519) at its real size: images, videos and sounds in and out of Vicuna-7B.

mllm plan configs/nextgpt_7b.py --topology v5e-256

    CLIP, BEATs -> MLPs -> Vicuna-7B -> mappers -> Stable Diffusion 1.5, Zeroscope, AudioLDM-2

As published: which parts train in the three stages; 4, 24 and 8 signal tokens of images, videos and sounds; the mappers
(4 + 4 layers of width 512); their loss, the mean distance to the frozen text encoders' outputs, beside that of tokens.

Other than published: CLIP L/14 at 336 pixels and BEATs take the place of ImageBind; AudioLDM-2 takes that of AudioLDM,
with the two conditions of `mllm_jax.output_projectors.several`; the frames of a video share the encoder and the
projector of images; and the last stage trains Vicuna whole, where the paper adds LoRA. Lengths of rows, rates and steps
are ours. No full run has been made.

You provide the data, `Mixture((Weighted(source),), ...)`, and the weights, under the names at the top of this file.
"""

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.beats import BEATsConfig
from mllm_jax.encoders.clap_text import ClapTextConfig
from mllm_jax.generators.audioldm2_projection import AudioLDM2ProjectionConfig
from mllm_jax.generators.schedulers.ddim import DDIM
from mllm_jax.generators.unet_audio import AudioUNetConfig
from mllm_jax.generators.unet_video import VideoUNetConfig
from mllm_jax.generators.vae import AutoencoderKLConfig
from mllm_jax.generators.vocoder import VocoderConfig
from mllm_jax.layers.compute import Compute
from mllm_jax.llms import gpt2, t5_encoder
from mllm_jax.models.audioldm2_output import AudioLDM2OutputConfig
from mllm_jax.models.branch import Branch, Connection
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.output import Output
from mllm_jax.models.text_to_video import TextToVideoConfig
from mllm_jax.output_projectors.several import SeveralConditionsConfig
from mllm_jax.output_projectors.transformer import TransformerMapperConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.projectors.stacked import StackedProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Pretrained, Stage
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.objectives.output_alignment import OutputAlignment

VICUNA, CLIP, BEATS = "runs/vicuna-7b-v1.5", "runs/clip-vit-large-patch14-336", "runs/beats-iter3"
STABLE_DIFFUSION, ZEROSCOPE, AUDIOLDM2 = "runs/stable-diffusion-v1-5", "runs/zeroscope-v2-576w", "runs/audioldm2"
SECONDS = 10  # of a sound in one slot
TEXT_VECTORS = 32  # of AudioLDM-2's second condition
OUTPUT_PARTS = ("output_projector_*",)
INPUT_PARTS = ("projector_*",)
LINEAR = dict(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, set_alpha_to_one=False)


def _beside(name: str) -> dict[str, Any]:
    """Returns what another file of this folder defines."""
    return runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))


def zeroscope() -> TextToVideoConfig:
    """Returns Zeroscope: text encoder 340,387,840 parameters, UNet 1,411,233,860, autoencoder 83,653,863."""
    text_encoder = replace(
        _beside("metaquery_sd15")["stable_diffusion"]().text_encoder,
        hidden_size=1024,
        num_layers=23,
        num_heads=16,
        mlp_size=4096,
        activation="gelu",
    )
    scheduler = DDIM(beta_start=0.00085, beta_end=0.012, **LINEAR)
    return TextToVideoConfig(text_encoder, VideoUNetConfig(), AutoencoderKLConfig(), scheduler)


def audioldm2() -> AudioLDM2OutputConfig:
    """Returns AudioLDM-2's base model of 1,049,742,578 parameters, with conditions of 8 x 768 and 32 x 1024."""
    flan_t5 = dict(d_model=1024, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu")
    return AudioLDM2OutputConfig(
        text_encoder=ClapTextConfig(),
        text_encoder_2=t5_encoder.from_hf_config(flan_t5),
        projection_model=AudioLDM2ProjectionConfig(512, 1024, 768),
        language_model=gpt2.from_hf_config({"architectures": ["GPT2Model"]}),
        unet=AudioUNetConfig(),
        vae=AutoencoderKLConfig(1, 1, 8, (128, 256, 512)),
        vocoder=VocoderConfig(64, 1024, (5, 4, 2, 2, 2), (16, 16, 8, 4, 4), normalize=False),
        scheduler=DDIM(beta_start=0.0015, beta_end=0.0195, **LINEAR),
        text_vectors=TEXT_VECTORS,
    )


def outputs() -> dict[str, Output]:
    """Returns the output branches: 4, 24 and 8 signal tokens."""
    image, video, audio = _beside("metaquery_sd15")["stable_diffusion"](), zeroscope(), audioldm2()
    sounds = zip(audio.condition_tokens, audio.condition_size, strict=True)
    several = tuple(TransformerMapperConfig(8, output_size=width, output_tokens=count) for count, width in sounds)
    return {
        "image": Output(TransformerMapperConfig(4, output_size=768), image, tokenizer=f"{STABLE_DIFFUSION}/tokenizer"),
        "video": Output(TransformerMapperConfig(24, output_size=1024), video, tokenizer=f"{ZEROSCOPE}/tokenizer"),
        "audio": Output(SeveralConditionsConfig(several, tokens=8), audio, tokenizer=AUDIOLDM2),
    }


def model() -> MultimodalConfig:
    """Returns the model: 11,254,009,400 parameters."""
    vicuna = _beside("xllm_speech")["model"]().llm
    llm = replace(vicuna, vocab_size=32_064)  # the 36 signal tokens and the placeholder have rows after its 32,000
    inputs = {
        "image": Branch(_beside("llava15_7b")["clip_large"](), MLPProjectorConfig(), Connection(layers=(-2,))),
        "video": Branch("image", "image", Connection(layers=(-2,))),
        "audio": Branch(BEATsConfig(), StackedProjectorConfig(factor=8), seconds=SECONDS),
    }
    return MultimodalConfig(inputs, llm, outputs=outputs(), compute=Compute(dtype="bfloat16", remat="full"))


def config() -> Experiment:
    sources = {
        "llm": VICUNA,
        "encoder_image": CLIP,
        "encoder_audio": BEATS,
        "generator_image": STABLE_DIFFUSION,
        "generator_video": ZEROSCOPE,
        "generator_audio": AUDIOLDM2,
    }
    seen = dict(image=1, video=5, audio=1)
    made = dict(image_targets=1, video_targets=1, audio_targets=1)

    def stage(name: str, objective: Any, trainable: tuple[str, ...], rows: int, length: int, slots, rate, **more):
        data = Mixture((), rows=rows, length=length, slots=slots)
        optimizer = AdamW(rate, warmup_steps=500, weight_decay=0.0, b2=0.999, clip_norm=1.0)
        return Stage(name, objective, trainable, data, 10_000, optimizer, frozen_dtype="bfloat16", **more)

    return Experiment(
        name="nextgpt_7b",
        model=model(),
        pretrained=tuple(Pretrained(part, folder) for part, folder in sources.items()),
        mesh=MeshConfig(data=1, fsdp=-1),
        stages=(
            stage("encode", NextToken(), INPUT_PARTS, 256, 4096, seen, 4e-4),
            stage("decode", OutputAlignment(), OUTPUT_PARTS, 256, 512, made, 4e-4, signal_tokens=True),
            stage("instruct", OutputAlignment(), (*INPUT_PARTS, *OUTPUT_PARTS, "llm/*"), 256, 4096, seen | made, 2e-5),
        ),
    )
