"""Folders of tiny AudioLDM-2 pipelines with random weights, written by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tiny_diffusion import fill, quiet

LETTERS = [chr(i) for i in range(33, 127)]
LONGEST, LONGEST_T5 = 24, 20  # tokens of a text with its beginning and end


def roberta() -> transformers.RobertaTokenizer:
    """Returns RoBERTa's tokenizer of single letters."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {token: i for i, token in enumerate([*special, "\u0120", *LETTERS])}
    return transformers.RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=LONGEST)


def t5() -> transformers.T5Tokenizer:
    """Returns T5's tokenizer of single letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LONGEST_T5)


def parts(seed: int = 0, whole_clap: bool = True, head: bool = True) -> dict[str, Any]:
    """Returns the parts with random weights.

    Args:
        whole_clap: whether the first text encoder is a whole CLAP, as in published folders, or its text part.
        head: whether the language model has its head.
    """
    text = transformers.ClapTextConfig(
        vocab_size=110, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LONGEST + 2, projection_dim=6,
    )  # fmt: skip
    audio = transformers.ClapAudioConfig(
        spec_size=16, num_mel_bins=4, patch_size=2, patch_stride=[2, 2], patch_embeds_hidden_size=8, hidden_size=16,
        depths=[1, 1], num_attention_heads=[1, 2], window_size=2, num_classes=3,
    )  # fmt: skip
    clap = transformers.ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=6)
    kind = transformers.GPT2LMHeadModel if head else transformers.GPT2Model
    sizes = dict(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=64, max_new_tokens=8, bos_token_id=3, eos_token_id=4
    )
    found = dict(
        text_encoder=transformers.ClapModel(clap) if whole_clap else transformers.ClapTextModelWithProjection(text),
        text_encoder_2=transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=110, d_model=10, d_kv=4, d_ff=20, num_layers=2, num_heads=2)
        ),
        projection_model=diffusers.AudioLDM2ProjectionModel(6, 10, 8),
        language_model=kind(transformers.GPT2Config(**sizes)),
        unet=diffusers.AudioLDM2UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=4, cross_attention_dim=[[None, 8, 10]],
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        ),
        vae=diffusers.AutoencoderKL(
            in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.9,
        ),
        vocoder=transformers.SpeechT5HifiGan(
            transformers.SpeechT5HifiGanConfig(
                model_in_dim=8, upsample_initial_channel=16, upsample_rates=[5, 2], upsample_kernel_sizes=[16, 2],
                resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 2]], normalize_before=False, sampling_rate=1000,
            )
        ),
    )  # fmt: skip
    for i, part in enumerate(found.values()):
        fill(part, seed + i)
    with torch.no_grad():
        found["vocoder"].conv_post.weight.mul_(0.3)  # so that tanh does not saturate
    return found


def write(folder: Path, *, scheduler: Any = None, **options: Any) -> diffusers.AudioLDM2Pipeline:
    """Writes a folder and returns its pipeline.

    Args:
        scheduler: of diffusers; None is AudioLDM-2's DDIM.
        options: see `parts`.
    """
    if scheduler is None:
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
            set_alpha_to_one=False,
        )  # fmt: skip
    pipeline = diffusers.AudioLDM2Pipeline(
        **parts(**options),
        tokenizer=roberta(),
        tokenizer_2=t5(),
        feature_extractor=transformers.ClapFeatureExtractor(),
        scheduler=scheduler,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return quiet(pipeline)
