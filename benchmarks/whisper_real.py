"""Word error rates of a real Whisper on Asterisk's prompts, beside transformers'.

    python benchmarks/whisper_real.py runs/whisper-tiny.en runs/asterisk [--prompts 100] [--threads N]

Both folders are made as configs/speech_asterisk.py says. The prompts have four words or more and are spread evenly over
all of them; both sides read them in batches of 8. Texts are compared after Whisper's own English normaliser.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import torch
import transformers

from mllm_jax.data.audio import as_audio
from mllm_jax.data.processing.text_normalizer import EnglishNormalizer
from mllm_jax.datasets.asterisk_speech import AsteriskSpeech
from mllm_jax.evaluation.metrics import wer
from mllm_jax.generation.assistant import Assistant

BATCH = 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("whisper", help="Whisper's Hugging Face folder")
    parser.add_argument("speech", help="folder of Asterisk's unpacked packages")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def prompts(folder: str, count: int) -> list[tuple[str, str]]:
    source = AsteriskSpeech(folder=os.path.abspath(folder)).build()
    pairs = [(str(source.folder / f"{p.name}.wav"), p.text) for p in source.prompts if len(p.text.split()) >= 4]
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, count).astype(int)]


def ours(folder: str, paths: list[str]) -> list[str]:
    plain = dict(temperatures=(0.0,), compression_ratio=None, logprob=None, no_speech=None)
    return [found.text for found in Assistant.load(folder).transcribe(paths, batch_size=BATCH, **plain)]


def theirs(folder: str, paths: list[str]) -> list[str]:
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    processor, said = transformers.WhisperProcessor.from_pretrained(folder), []
    for start in range(0, len(paths), BATCH):
        heard = [as_audio(path) for path in paths[start : start + BATCH]]
        features = processor(heard, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.inference_mode():
            said += processor.batch_decode(model.generate(features), skip_special_tokens=True)
    return [text.strip() for text in said]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    chosen, normalise, said = prompts(options.speech, options.prompts), EnglishNormalizer(options.whisper), {}
    targets = [normalise(text) for _, text in chosen]
    for name, transcribe in {"mllm_jax": ours, "transformers": theirs}.items():
        start, cpu = time.perf_counter(), time.process_time()
        said[name] = transcribe(options.whisper, [path for path, _ in chosen])
        took, used = time.perf_counter() - start, time.process_time() - cpu
        rate = 100 * wer([normalise(text) for text in said[name]], targets)
        print(f"{name}: word error rate of {len(chosen)} prompts {rate:.2f} %")
        print(f"{name}: {took:.0f} s, {used:.0f} CPU s with loading")
    equal = sum(a == b for a, b in zip(*said.values(), strict=True))
    print(f"equal transcripts: {equal} of {len(chosen)}")


if __name__ == "__main__":
    main()
