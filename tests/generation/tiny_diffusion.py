"""Folders of tiny pipelines of Stable Diffusion and of Zeroscope with random weights, written by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

WORDS = ("a", "red", "blue", "cat", "dog", "on", "the", "sofa", "blurry", "small", ",")
LONGEST = 12  # tokens of a text with its beginning and end
# The smallest pipeline: a text is read between the one block of each way.
SMALL = dict(
    unet=dict(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=2,
        sample_size=8,
    ),
    vae=dict(block_out_channels=(8, 8)),
)
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def tokenizer() -> transformers.CLIPTokenizer:
    """Returns CLIP's tokenizer of single letters and of WORDS, with CLIP's special tokens."""
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            vocabulary.append(parts[0])
    merges, vocabulary = list(dict.fromkeys(merges)), list(dict.fromkeys(vocabulary))
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    return transformers.CLIPTokenizer(vocab=ids, merges=merges, model_max_length=LONGEST)


def write(
    folder: Path,
    *,
    scheduler: Any = None,
    text: dict[str, Any] | None = None,
    unet: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    seed: int = 0,
    video: bool = False,
) -> diffusers.DiffusionPipeline:
    """Writes a folder and returns its pipeline.

    Args:
        video: whether it draws videos.
        scheduler: of diffusers; None is Stable Diffusion 1's PNDM.
        text, unet, vae: replace options of the parts.
    """
    words = tokenizer()
    sizes = dict(
        vocab_size=len(words),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=LONGEST,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    width = (text or {}).get("hidden_size", sizes["hidden_size"])
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes | (text or {})))
    options = dict(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    if video:
        options |= dict(
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")
        )
    kind = diffusers.UNet3DConditionModel if video else diffusers.UNet2DConditionModel
    denoiser = kind(**options | (unet or {}))
    options = dict(
        block_out_channels=(16, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    autoencoder = diffusers.AutoencoderKL(**options | (vae or {}))
    for i, part in enumerate((encoder, denoiser, autoencoder)):
        fill(part, seed + i)
    if scheduler is None:
        scheduler = diffusers.PNDMScheduler(**SCHEDULER, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    parts = dict(vae=autoencoder, text_encoder=encoder, tokenizer=words, unet=denoiser, scheduler=scheduler)
    if video:
        pipeline = diffusers.TextToVideoSDPipeline(**parts)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return quiet(pipeline)


def quiet(pipeline: Any) -> Any:
    """Returns a pipeline that shows no progress."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fill(module: torch.nn.Module, seed: int) -> None:
    """Fills every parameter with numbers far from its default, such that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                scale = name.endswith("weight")
                parameter.copy_(0.1 * noise + float(scale))
            elif "embed" in name and "time" not in name:
                parameter.copy_(0.7 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    module.eval()
