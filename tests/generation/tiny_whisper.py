"""A folder of a tiny multilingual Whisper with random weights, its tokenizer and settings, and transformers' texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

RATE, CHUNK = 16_000, 2  # samples a second, and seconds of a window
POSITIONS, LONGEST, MEL = 50 * CHUNK, 40, 8
SPECIAL = [
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|ja|>", "<|translate|>", "<|transcribe|>"),
    *("<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
]
LETTERS = ["Ġ", *map(chr, range(33, 127))]  # a space and the printable characters of ASCII
END = len(LETTERS)
IDS = {token: END + i for i, token in enumerate(SPECIAL)}
TIMES = END + len(SPECIAL)
VOCABULARY = TIMES + POSITIONS + 1
GENERATION = dict(
    lang_to_id={token: IDS[token] for token in SPECIAL[2:5]},
    task_to_id=dict(translate=IDS["<|translate|>"], transcribe=IDS["<|transcribe|>"]),
    is_multilingual=True,
    no_timestamps_token_id=IDS["<|notimestamps|>"],
    prev_sot_token_id=IDS["<|startofprev|>"],
    decoder_start_token_id=IDS["<|startoftranscript|>"],
    bos_token_id=END,
    eos_token_id=END,
    pad_token_id=END,
    max_length=LONGEST,
    max_initial_timestamp_index=20,
    alignment_heads=[[0, 1], [1, 0], [1, 1]],
    suppress_tokens=[3, 12, *(IDS[token] for token in SPECIAL[1:2] + SPECIAL[5:10])],
    begin_suppress_tokens=[0, END],
)


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of single letters with Whisper's special tokens and times."""
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([f"<|{0.02 * n:.2f}|>" for n in range(POSITIONS + 1)])
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), SPECIAL[0])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **ends).save_pretrained(folder)


def make(folder: Path, seed: int = 3, ends: float = 1.0, width: float = 0.1, **generation: Any) -> Path:
    """Writes the folder.

    Args:
        ends: the weight of the end in every logit; with more, texts are shorter.
        width: of the embeddings, which are also the head; with less, all times together are likelier than a letter.
        generation: replaces settings of generation_config.json; those that are None are left out.
    """
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=MEL,
        d_model=24,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_source_positions=POSITIONS,
        max_target_positions=LONGEST,
        median_filter_width=5,
        **{f"{name}_token_id": GENERATION[f"{name}_token_id"] for name in ("decoder_start", "bos", "eos", "pad")},
    )
    model = transformers.WhisperForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            elif "embed" in name:
                parameter.copy_(width * noise)
            else:
                parameter.copy_(3.0 * noise / parameter[0].numel() ** 0.5)
        decoder = model.model.decoder
        decoder.layer_norm.bias.add_(ends * decoder.embed_tokens.weight[END])
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    transformers.WhisperFeatureExtractor(feature_size=MEL, chunk_length=CHUNK).save_pretrained(folder)
    settings = {name: value for name, value in (GENERATION | generation).items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def sound(seconds: float, seed: int = 0) -> tuple[np.ndarray, int]:
    """Returns noise that changes four times a second."""
    rng = np.random.default_rng(seed)
    count = round(seconds * RATE)
    level = np.repeat(10.0 ** rng.uniform(-2.5, -0.5, count // 4_000 + 1), 4_000)[:count]
    noise = np.convolve(rng.normal(size=count), rng.normal(size=9), mode="same") / 3
    return np.clip(level * noise, -1, 1).astype(np.float32), RATE


class Reference:
    """transformers' Whisper of a folder."""

    def __init__(self, folder: Path):
        self.model = transformers.WhisperForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
        self.model.eval()
        self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)

    def __call__(self, samples: np.ndarray, *, whole: bool = False, **options: Any) -> dict[str, Any]:
        """Returns what `generate` does for one recording, which is not padded to a window if it is `whole`."""
        long = whole or len(samples) > CHUNK * RATE
        how = dict(truncation=False, padding="longest") if long else {}
        given = self.extractor([samples], sampling_rate=RATE, return_tensors="pt", return_attention_mask=True, **how)
        timed = options.pop("timed", True)
        with torch.no_grad():
            return self.model.generate(
                given.input_features,
                attention_mask=given.attention_mask,
                return_timestamps=timed,
                return_segments=True,
                **options,
            )
