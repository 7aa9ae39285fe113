"""Tokens per second against transformers' `generate`, prefill and decode separately, in one run.

    python benchmarks/generate.py [--folder FOLDER] [--batch 1 8] [--prompt 512] [--new 64] [--repeats 5] [--compile]

Without a folder: SmolLM2-135M's shape with random weights, float32, written to a temporary folder that both libraries
load. Prefill is the time until the first token, decode the time of each further token. Runs alternate, medians are
printed, and the tokens of both sides are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from mllm_jax.data.processing.media import Encoded
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.options import Options

SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=100_000.0,
    tie_word_embeddings=True,
)
TINY = SMOLLM2 | dict(vocab_size=256, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3)
TINY |= dict(num_key_value_heads=1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a Hugging Face folder instead of random weights")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, to try the script out")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true", help="also torch.compile with a static cache")
    parser.add_argument("--int8", action="store_true", help="also our int8 storage")
    return parser.parse_args()


def random_folder(folder: Path, sizes: dict) -> Path:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # a small embedding, else a tied head repeats the last token
                parameter.normal_(std=0.1 if "embed" in name else parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    Tokenizer.train([], 300).save(folder)  # prompts and the compared answers are ids
    return folder


class Torch:
    """A side with transformers' generate; the first run of each shape, which may compile, is not measured."""

    def __init__(self, folder: Path, compiled: bool):
        self.name = "transformers, torch.compile" if compiled else "transformers"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)
        if compiled:
            self.options["cache_implementation"] = "static"
            self.model.forward = torch.compile(self.model.forward, dynamic=False)

    def tokens(self, prompts: np.ndarray, new: int) -> np.ndarray:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **self.options)
        return out[:, prompts.shape[1] :].numpy()


class Ours:
    """A side with mllm_jax, from the same folder."""

    def __init__(self, folder: Path, rows: int, int8: bool = False):
        self.name = "mllm_jax, int8" if int8 else "mllm_jax"
        self.assistant, self.rows = Assistant.load(folder, dtype="float32", int8=int8), rows

    def tokens(self, prompts: np.ndarray, new: int) -> np.ndarray:
        options = Options(max_new_tokens=new, ignore_eos=True)
        encoder = self.assistant.processor.encoder
        rows = [encoder.lay_out(ids, (), "a prompt") for ids in prompts.tolist()]
        given = [Encoded(row, np.zeros(len(row.tokens), np.float32)) for row in rows]
        return np.array([answer.tokens for answer in self.assistant.complete(given, options, batch_size=self.rows)])


def seconds(side, prompts: np.ndarray, new: int) -> float:
    start = time.perf_counter()
    side.tokens(prompts, new)
    return time.perf_counter() - start


def measure(sides: list, prompts: np.ndarray, new: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Returns prefill seconds and decode seconds a step of each side; medians of alternating runs."""
    answers = {side.name: (side.tokens(prompts, 1), side.tokens(prompts, new))[1] for side in sides}
    first = answers[sides[0].name]
    print(f"  {len(np.unique(first))} different tokens")
    for name, found in answers.items():
        print(f"  {name}: {100 * (found == first).mean():.1f} % of its tokens are those of {sides[0].name}")
    prefill, whole = ({side.name: [] for side in sides} for _ in range(2))
    for _ in range(repeats):
        for side in sides:
            prefill[side.name].append(seconds(side, prompts, 1))
            whole[side.name].append(seconds(side, prompts, new))
    found = {}
    for side in sides:
        start = statistics.median(prefill[side.name])
        found[side.name] = start, (statistics.median(whole[side.name]) - start) / (new - 1)
    return found


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or random_folder(Path(temporary), TINY if options.tiny else SMOLLM2)
        sides = [Torch(folder, False), Ours(folder, max(options.batch))]
        sides += [Ours(folder, max(options.batch), int8=True)] if options.int8 else []
        sides += [Torch(folder, True)] if options.compile else []
    vocabulary = sides[0].model.config.vocab_size
    lines = []
    for rows in options.batch:
        prompts = np.random.default_rng(0).integers(0, vocabulary, (rows, options.prompt))
        print(f"batch {rows}, prompts of {options.prompt} tokens, answers of {options.new}")
        found = measure(sides, prompts, options.new, options.repeats)
        base = found[sides[0].name]
        for name, (prefill, step) in found.items():
            lines.append(
                f"| {rows} | {name} | {rows * options.prompt / prefill:,.0f} | {base[0] / prefill:.2f} "
                f"| {rows / step:,.1f} | {base[1] / step:.2f} |"
            )
    print(f"\nfloat32, {options.threads} threads, medians of {options.repeats}; ratios to {sides[0].name}\n")
    print("| batch | library | prefill tokens/s | ratio | decode tokens/s | ratio |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
