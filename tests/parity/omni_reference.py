"""A tiny random Qwen2.5-Omni thinker of transformers with its processor, of which only the part that needs torchvision
is ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from composed_checks import WORDS, tokenizer
from einops import rearrange
from test_qwen_vl_parity import TEXT
from transformers import Qwen2_5OmniThinkerConfig, WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerForConditionalGeneration
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import VideosKwargs

AUDIO = dict(
    num_mel_bins=8,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    d_model=16,
    max_source_positions=9,
    n_window=4,
    output_dim=32,
)
MARKS = dict(
    image_token="<|IMAGE|>",
    video_token="<|VIDEO|>",
    audio_token="<|AUDIO|>",
    vision_bos_token="<|vision_bos|>",
    vision_eos_token="<|vision_eos|>",
    audio_bos_token="<|audio_bos|>",
    audio_eos_token="<|audio_eos|>",
)
IMAGE, VIDEO, AUDIO_ID, VISION_START, VISION_END, AUDIO_START, AUDIO_END = (len(WORDS) + i for i in range(7))
TOWER = dict(
    depth=2,
    num_heads=2,
    patch_size=4,
    hidden_size=24,
    intermediate_size=40,
    out_hidden_size=32,
    window_size=16,
    fullatt_block_indexes=[1],
)
ROPE = dict(rope_type="default", rope_theta=1000.0, mrope_section=[2, 1, 1])
# text_config, vision_config, audio_config, the rest.
CASES = {
    "plain": (dict(), dict(), dict(), dict(seconds_per_chunk=1)),
    "tied, averages over two chunks": (
        dict(num_key_value_heads=4, rope_parameters=ROPE | dict(mrope_section=[1, 1, 2])),
        dict(num_heads=3, fullatt_block_indexes=[]),
        dict(n_window=3, activation_function="relu", encoder_attention_heads=4),
        dict(tie_word_embeddings=True),
    ),
    "other steps of time": (
        dict(num_key_value_heads=1, use_sliding_window=True, sliding_window=50, max_window_layers=1),
        dict(depth=1, hidden_size=32, fullatt_block_indexes=[0], window_size=24),
        dict(n_window=9, encoder_layers=1, num_mel_bins=5),
        dict(seconds_per_chunk=1, position_id_per_seconds=13),
    ),
}
SEEN, HEARD, WATCHED = (
    "<|vision_bos|> <|IMAGE|> <|vision_eos|>",
    "<|audio_bos|> <|AUDIO|> <|audio_eos|>",
    "<|vision_bos|> <|VIDEO|> <|vision_eos|>",
)
RATE = 16_000


def noise(seconds: float) -> np.ndarray:
    samples = np.random.default_rng(round(1000 * seconds)).normal(size=round(RATE * seconds))
    return (0.1 * samples).astype(np.float32)


def frames(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)


def save_reference(folder: Path, name: str, randomise) -> tuple:
    """Saves a random model with the files of its processor; returns it and transformers' processor."""
    text, vision, audio, rest = CASES[name]
    ids = dict(image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=AUDIO_ID)
    ids |= dict(vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
    ids |= dict(audio_start_token_id=AUDIO_START, audio_end_token_id=AUDIO_END)
    config = Qwen2_5OmniThinkerConfig(
        text_config=TEXT | dict(vocab_size=AUDIO_END + 1, rope_parameters=ROPE) | text,
        vision_config=TOWER | vision,
        audio_config=AUDIO | audio,
        **ids,
        **rest,
    )
    reference = randomise(Qwen2_5OmniThinkerForConditionalGeneration(config)).eval()
    reference.tie_weights()
    reference.generation_config.eos_token_id = None
    reference.save_pretrained(folder)
    words = tokenizer(**MARKS)
    assert words.convert_tokens_to_ids(list(MARKS.values())) == list(range(IMAGE, AUDIO_END + 1))
    words.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=dict(shortest_edge=128, longest_edge=1024))
    sounds = WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins, chunk_length=4)
    # One file for both, as the hub's.
    settings = sounds.to_dict() | images.to_dict() | dict(image_processor_type="Qwen2VLImageProcessor")
    settings["feature_extractor_type"] = "WhisperFeatureExtractor"
    settings.pop("mel_filters", None)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    made = Qwen2_5OmniProcessor.__new__(Qwen2_5OmniProcessor)
    made.tokenizer, made.image_processor, made.feature_extractor = words, images, sounds
    made.video_processor, made.chat_template = Cut(), None
    for name, mark in MARKS.items():
        setattr(made, name, mark)
        setattr(made, f"{name}_id", words.convert_tokens_to_ids(mark))
    return reference, made


class Cut:
    """The part of transformers' processor of videos that cuts patches from frames that need no resizing."""

    merge_size = temporal_patch_size = 2
    valid_kwargs = VideosKwargs

    def __call__(self, videos, **_) -> dict:
        mean, std = np.float32([0.48145466, 0.4578275, 0.40821073]), np.float32([0.26862954, 0.26130258, 0.27577711])
        patches, grids = [], []
        for shown in videos:
            shown = np.concatenate([shown, shown[-1:]]) if len(shown) % 2 else shown
            cut = "(f t) (h p a) (w q b) c -> (f h w p q) (c t a b)"
            patches.append(rearrange((shown.astype(np.float32) / 255 - mean) / std, cut, t=2, p=2, q=2, a=4, b=4))
            grids.append([len(shown) // 2, shown.shape[1] // 4, shown.shape[2] // 4])
        return dict(pixel_values_videos=torch.tensor(np.concatenate(patches)), video_grid_thw=torch.tensor(grids))
