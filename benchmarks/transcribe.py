"""Seconds of sound a second against transformers, and faster-whisper if it is installed; Whisper base's shape.

    python benchmarks/transcribe.py [--beams 1 5] [--clips 2] [--tokens 60] [--repeats 5] [--threads N] [--tiny]

The weights are random, float32, in a temporary folder that all sides open (faster-whisper converts it). Texts never
end, so that every side writes `--tokens` tokens for each clip of 30 seconds, one clip at a time. Runs alternate, the
first of each is not measured, medians are printed, and the texts are compared. CPU seconds count all threads; beside
other work they say more than the time. faster-whisper also needs `ctranslate2`;
an environment of its own may have it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from mllm_jax.generation.assistant import Assistant

RATE, SECONDS, WORDS, TIMES = 16_000, 30, 50_257, 1_501
SPECIAL = [
    *("<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in list(LANGUAGES)[:99])),
    *("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
]
IDS = {token: WORDS + i for i, token in enumerate(SPECIAL)}
END, NO_TIMES = WORDS, IDS["<|notimestamps|>"]
NEVER = [*range(END, NO_TIMES + 1 + TIMES)]  # no end, no special tokens, no times: all sides write text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=60, help="of each clip; people speak about 80 in 30 seconds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tiny", action="store_true", help="a model of one small layer, to try the script out")
    return parser.parse_args()


def random_folder(folder: Path, tokens: int, tiny: bool) -> Path:
    torch.manual_seed(0)
    width, layers, heads = (64, 1, 2) if tiny else (512, 6, 8)
    sizes = dict(d_model=width, encoder_layers=layers, decoder_layers=layers)
    sizes |= dict(encoder_attention_heads=heads, decoder_attention_heads=heads)
    sizes |= dict(encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width)
    start = IDS["<|startoftranscript|>"]
    ids = dict(bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=start)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **ids))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(std=2.0 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    generation = dict(
        **ids,
        lang_to_id={f"<|{code}|>": IDS[f"<|{code}|>"] for code in list(LANGUAGES)[:99]},
        task_to_id={task: IDS[f"<|{task}|>"] for task in ("transcribe", "translate")},
        is_multilingual=True,
        no_timestamps_token_id=NO_TIMES,
        prev_sot_token_id=IDS["<|startofprev|>"],
        suppress_tokens=NEVER,
        max_length=tokens,
    )
    (folder / "generation_config.json").write_text(json.dumps(generation))
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"Ġw{n}" for n in range(WORDS - 256))]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([f"<|{0.02 * n:.2f}|>" for n in range(TIMES)])
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), SPECIAL[0])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **ends).save_pretrained(folder)
    return folder


class Torch:
    """A side with transformers' generate."""

    name = "transformers"

    def __init__(self, folder: Path):
        self.model = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def text(self, samples: np.ndarray, beams: int) -> str:
        features = self.extractor(samples, sampling_rate=RATE, return_tensors="pt").input_features
        with torch.inference_mode():
            found = self.model.generate(features, language="en", task="transcribe", num_beams=beams)
        return self.tokenizer.decode(found[0], skip_special_tokens=True).strip()


class Ours:
    """A side with mllm_jax."""

    name = "mllm_jax"

    def __init__(self, folder: Path):
        self.assistant = Assistant.load(folder, dtype="float32")

    def text(self, samples: np.ndarray, beams: int) -> str:
        one = dict(temperatures=(0.0,), compression_ratio=None, logprob=None, no_speech=None)
        return self.assistant.transcribe((samples, RATE), language="en", beams=beams, **one).text


class FasterWhisper:
    """A side with faster-whisper."""

    def __init__(self, folder: Path, kind: str, tokens: int, threads: int):
        from ctranslate2.converters import TransformersConverter
        from faster_whisper import WhisperModel

        self.name, self.tokens = f"faster-whisper, {kind}", tokens
        files = ["tokenizer.json", "preprocessor_config.json"]
        converted = TransformersConverter(str(folder), copy_files=files).convert(str(folder / kind), quantization=kind)
        self.model = WhisperModel(converted, device="cpu", compute_type=kind, cpu_threads=threads)

    def text(self, samples: np.ndarray, beams: int) -> str:
        segments, _ = self.model.transcribe(
            samples,
            language="en",
            beam_size=beams,
            temperature=0.0,
            without_timestamps=True,
            max_new_tokens=2 * self.tokens - 4,  # CTranslate2 writes half of this and the prompt of 4
            suppress_tokens=NEVER,
            compression_ratio_threshold=None,
            log_prob_threshold=None,
            no_speech_threshold=None,
        )
        return "".join(segment.text for segment in segments).strip()


def seconds(side, clips: list[np.ndarray], beams: int) -> tuple[float, float]:
    """Returns the seconds of all clips, and the CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    for clip in clips:
        side.text(clip, beams)
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    clips = [
        0.1 * np.random.default_rng(i).normal(size=RATE * SECONDS).astype(np.float32) for i in range(options.clips)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_folder(Path(temporary), options.tokens, options.tiny)
        sides = [Torch(folder), Ours(folder)]
        if importlib.util.find_spec("faster_whisper"):
            sides += [FasterWhisper(folder, kind, options.tokens, options.threads) for kind in ("float32", "int8")]
        else:
            print("faster-whisper is not installed here: it is left out")
        for beams in options.beams:
            texts = {side.name: side.text(clips[0], beams).split() for side in sides}
            for name, text in texts.items():
                print(f"beams {beams}, {name}: {len(text)} words, as transformers: {text == texts[sides[0].name]}")
            took = {side.name: [] for side in sides}
            for _ in range(options.repeats):
                for side in sides:
                    took[side.name].append(seconds(side, clips, beams))
            found = {
                name: [statistics.median(each) for each in zip(*times, strict=True)] for name, times in took.items()
            }
            print("\n| beams | library | seconds of sound a second | ratio | CPU seconds a clip | ratio |")
            print("|---|---|---|---|---|---|")
            whole, used = found[sides[0].name]
            for name, (took_s, cpu_s) in found.items():
                speed, ratios = SECONDS * len(clips) / took_s, (whole / took_s, used / cpu_s)
                each = cpu_s / len(clips)
                print(
                    f"| {beams} | {name} | {speed:.2f} | {ratios[0]:.2f} | {each:.2f} | {ratios[1]:.2f} |", flush=True
                )
    print(f"\n{options.threads} threads, {options.tokens} tokens a clip of 30 s, medians of {options.repeats}")


if __name__ == "__main__":
    main()
