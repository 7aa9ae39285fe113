"""Tiny references of Qwen2-Audio in torch, their processors, and texts and sounds for them."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mllm_jax import (
    Processor,
    from_pretrained,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
HEARD = dict(model_type="qwen2_audio_encoder", encoder_ffn_dim=20, scale_embedding=True)
WRITES = dict(model_type="qwen2", vocab_size=len(LETTERS) + len(SPECIAL) + 2, intermediate_size=36)
# (audio_config, text_config, seconds of a slot, samples from one frame to the next)
CASES = {
    "untied": (
        dict(num_mel_bins=10, d_model=24, encoder_layers=2, encoder_attention_heads=3, max_source_positions=50),
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
        1,
        160,
    ),
    # transformers 5 has a head of its own, whatever the option says.
    "tied": (
        dict(num_mel_bins=7, d_model=20, encoder_layers=1, encoder_attention_heads=2, max_source_positions=100),
        dict(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True
        ),
        2,
        160,
    ),
    # 25 vectors, of which the last has no partner.
    "odd": (
        dict(
            num_mel_bins=8, d_model=28, encoder_layers=3, encoder_attention_heads=2, max_source_positions=25,
            activation_function="gelu_pytorch_tanh",
        ),
        dict(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="default", rope_theta=5000.0),
        ),
        1,
        320,
    ),
}  # fmt: skip
MARK = "<|audio_bos|><|AUDIO|><|audio_eos|>"
TEXTS = [
    f"Audio 1: {MARK}\nAudio 2: {MARK}\nWhich is louder?",
    "What is a sound?",
    f"{MARK}Say it.",
    f"<|im_start|>user\n{MARK}And{MARK}{MARK}? <|im_end|>",
]
LENGTHS = [(0.31, 1.0), (), (0.77,), (0.08, 0.5063, 0.215)]  # seconds
NEW_TOKENS = 16


def sound(seconds: float) -> np.ndarray:
    """Returns noise whose loudness and colour change, a function of the length alone."""
    count = int(16_000 * seconds)
    rng = np.random.default_rng(count)
    noise = np.convolve(rng.normal(size=count + 8), rng.normal(size=9), "valid")
    return (noise * np.linspace(0.02, 0.2, count) ** 2).astype(np.float32)


SOUNDS = [[sound(seconds) for seconds in row] for row in LENGTHS]
GIVEN = [[(samples, 16_000) for samples in row] for row in SOUNDS]


def processor_of(seconds: int, hop: int, mel: int) -> transformers.Qwen2AudioProcessor:
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ends = dict(pad_token="<|endoftext|>", eos_token="<|im_end|>")
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
    words.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    heard = transformers.WhisperFeatureExtractor(mel, chunk_length=seconds, hop_length=hop, return_attention_mask=True)
    return transformers.Qwen2AudioProcessor(heard, words)


class Loaded:
    """A reference with its folder and processor, and the model read from the folder."""

    def __init__(self, case: str, folder: Path, randomise):
        audio, text, seconds, hop = CASES[case]
        self.case, self.folder = case, folder
        self.theirs = processor_of(seconds, hop, audio["num_mel_bins"])
        self.ids = {token: self.theirs.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
        config = transformers.Qwen2AudioConfig(
            audio_config=HEARD | audio,
            text_config=WRITES | text | dict(eos_token_id=self.ids["<|im_end|>"]),
            audio_token_index=self.ids["<|AUDIO|>"],
        )
        model = transformers.Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation="eager")
        self.reference = randomise(model, seed=5)
        self.reference.generation_config.eos_token_id = None
        self.reference.save_pretrained(folder)
        self.theirs.save_pretrained(folder)
        self.model, self.params = from_pretrained(folder)
        self.ours = Processor.from_pretrained(folder)
        self.apply = jax.jit(self.model.apply)
        self.batch = self.ours(TEXTS, audios=GIVEN)

    def inputs(self, side: str = "right", texts=TEXTS, sounds=SOUNDS) -> dict:
        self.theirs.tokenizer.padding_side = side
        flat = [samples for row in sounds for samples in row]
        how = dict(sampling_rate=16_000, return_tensors="pt", padding=True)
        return dict(self.theirs(text=texts, audio=flat or None, **how))
