"""A training step of a LLaVA-shaped model against transformers and torch, in one run.

    python benchmarks/train_step.py [--repeats 5] [--no-compile] [--tiny]

CLIP's ViT of 12 x 384 on images of 224, a two-layer MLP, LLaMA of 8 x 512, rows of 512 tokens of which 196 are the
image's, batch 8, float32, on every core: forward, backward, clipping and AdamW on every parameter. Both sides read the
same weights from a folder and use the same batch; the losses of the first steps must agree to 1e-3 before anything is
measured. Ours is the step that `mllm train` runs, with one device per core, as in its configs for CPUs; theirs is eager
and compiled, with torch's fused AdamW. The sides run one after the other in their own processes, as a step that keeps
its memory takes up to 17 GB. Medians are printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

CORES = os.cpu_count() or 1
jax.config.update("jax_num_cpu_devices", CORES)

import mllm_jax  # noqa: E402 - the devices are counted at the first import that touches one
from mllm_jax.sharding.mesh import MeshConfig, make_mesh  # noqa: E402
from mllm_jax.training.config import AdamW  # noqa: E402
from mllm_jax.training.objectives.next_token import NextToken  # noqa: E402
from mllm_jax.training.operations.host import keep_freed_memory  # noqa: E402
from mllm_jax.training.optimizer import learning_rate, make_optimizer  # noqa: E402
from mllm_jax.training.step import init_state, make_train_step, place_batch, state_shardings  # noqa: E402

IMAGE_TOKEN = 3
CHECKED = 3  # steps whose losses are compared
TOLERANCE = 1e-3
# No warm-up, so that the first steps already reveal wrong gradients; a schedule so long that the rate is constant.
ADAMW = AdamW(learning_rate=1e-3, warmup_steps=1, end_factor=1.0, weight_decay=0.0)
STEPS = 1_000_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, to try the script out")
    return parser.parse_args()


def reference_config(tiny: bool) -> transformers.LlavaConfig:
    vision = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    text = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1376, vocab_size=32064)
    if tiny:
        vision |= dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)
        text |= dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=300)
    return transformers.LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", image_size=224, patch_size=16, **vision),
        text_config=dict(
            model_type="llama", num_key_value_heads=text["num_attention_heads"], max_position_embeddings=2048, **text
        ),
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )


def make_batch(config: transformers.LlavaConfig, rows: int = 8, length: int = 512) -> dict[str, np.ndarray]:
    """Returns random images and texts: a token, the image, and text that carries loss."""
    rng = np.random.default_rng(0)
    places = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    tokens = rng.integers(IMAGE_TOKEN + 1, config.text_config.vocab_size, (rows, length), dtype=np.int32)
    tokens[:, 1 : 1 + places] = IMAGE_TOKEN
    side = config.vision_config.image_size
    return {"tokens": tokens, "images": rng.normal(size=(rows, 1, side, side, 3)).astype(np.float32)}


class Torch:
    """transformers' model, eager or compiled."""

    def __init__(self, folder: Path, batch: dict, compiled: bool = False):
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
        self.parameters = list(self.model.parameters())
        options = dict(lr=ADAMW.learning_rate, betas=(ADAMW.b1, ADAMW.b2), eps=ADAMW.eps, weight_decay=0.0)
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True, **options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: float(step >= 1))
        tokens = torch.tensor(batch["tokens"], dtype=torch.int64)
        self.inputs = dict(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=torch.tensor(batch["images"][:, 0]).permute(0, 3, 1, 2).contiguous(),
            labels=torch.where(tokens == IMAGE_TOKEN, -100, tokens),
        )
        self.call = torch.compile(self.model, dynamic=False) if compiled else self.model

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.call(**self.inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, ADAMW.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()


class Ours:
    """The step of `mllm train`, every parameter trained."""

    name = "mllm_jax"

    def __init__(self, folder: Path, batch: dict):
        self.mesh = make_mesh(MeshConfig(data=CORES))
        module, params = mllm_jax.from_pretrained(folder, dtype="float32", mesh=self.mesh)
        self.optimizer, schedule = make_optimizer(ADAMW, STEPS), learning_rate(ADAMW, STEPS)
        layout = state_shardings(self.optimizer, params, jax.tree.map(lambda x: x.sharding, params), self.mesh)
        self.state = init_state(self.optimizer, params, layout, jax.random.key(0))
        self.run = make_train_step(module, NextToken(), self.optimizer, schedule, mesh=self.mesh, shardings=layout)
        tokens = batch["tokens"]
        here = tokens == IMAGE_TOKEN
        arrays = dict(
            tokens=tokens,
            segments=np.ones_like(tokens),
            positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
            media_index=np.where(here, here.cumsum(axis=1) - 1, -1).astype(np.int32),
            images=batch["images"],
            loss_weights=1.0 - here.astype(np.float32),
        )
        shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        self.batch = place_batch(arrays, self.mesh, shapes, list(range(len(tokens))))

    def step(self) -> float:
        self.state, metrics = self.run(self.state, {}, self.batch)
        return float(metrics["loss"])


# ---- one process for each side


def serve(kind: type, folder: Path, batch: dict, options: dict, pipe: Connection) -> None:
    """Runs a step on each request and sends (loss, seconds), or sends why it failed and exits."""
    transformers.logging.disable_progress_bar()
    keep_freed_memory()  # as in training
    torch.set_num_threads(CORES)
    try:
        side = kind(folder, batch, **options)
        while pipe.recv():
            start = time.perf_counter()
            loss = side.step()
            pipe.send((loss, time.perf_counter() - start))
    except Exception as error:  # torch.compile raises any error of its back ends
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")


class Failed(Exception):
    """A side that does not run here."""


def measure(kind: type, folder: Path, batch: dict, repeats: int, **options: bool) -> tuple[list[float], float]:
    """Returns the losses of the first steps, in which a side compiles, and the median seconds of the next steps.

    Raises:
        Failed: an error of the side, or the end of its process.
    """
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(kind, folder, batch, options, theirs), daemon=True)
    process.start()
    theirs.close()
    start = time.perf_counter()
    try:
        steps = [_step(pipe) for _ in range(CHECKED)]
        spent = time.perf_counter() - start
        times = [_step(pipe)[1] for _ in range(repeats)]
        pipe.send(False)
    except (EOFError, BrokenPipeError) as error:
        process.join()
        raise Failed(f"its process ended with {process.exitcode}; -9 means a lack of memory") from error
    process.join()
    print(f"losses {', '.join(f'{loss:.5f}' for loss, _ in steps)}; {spent:.0f} s with compiling", flush=True)
    return [loss for loss, _ in steps], statistics.median(times)


def _step(pipe: Connection) -> tuple[float, float]:
    pipe.send(True)
    answer = pipe.recv()
    if isinstance(answer, str):
        raise Failed(answer)
    return answer


def check(ours: list[float], theirs: list[float], name: str) -> None:
    """Stops the program if the losses of the first steps differ."""
    if theirs[-1] > theirs[0] - 1e-3:
        raise SystemExit(f"the loss of {name} does not fall: {theirs}: nothing is measured")
    if not np.abs(np.array(ours) / theirs - 1).max() <= TOLERANCE:
        raise SystemExit(f"{Ours.name}: losses {ours}, {name}: {theirs}: nothing is measured")


def main() -> None:
    options = arguments()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = reference_config(options.tiny)
    batch = make_batch(config)
    sides = {Ours.name: (Ours, {}), "transformers": (Torch, {"compiled": False})}
    if not options.no_compile:
        sides["transformers, torch.compile"] = (Torch, {"compiled": True})
    losses, medians = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = transformers.LlavaForConditionalGeneration(config)
        print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {CORES} cores")
        model.save_pretrained(folder)
        del model
        for name, (kind, how) in sides.items():
            print(f"{name}: ", end="", flush=True)
            try:
                losses[name], medians[name] = measure(kind, folder, batch, options.repeats, **how)
            except Failed as reason:  # torch.compile does not run everywhere
                if not how.get("compiled"):
                    raise SystemExit(f"{reason}") from reason
                print(f"skipped: {reason}")
                continue
            if name != Ours.name:
                check(losses[Ours.name], losses[name], name)
    print(f"\nfloat32, {batch['tokens'].shape} tokens, medians of {options.repeats}\n")
    print("| library | s a step | tokens/s | mllm_jax is faster by |\n|---|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {batch['tokens'].size / median:,.0f} | {median / medians[Ours.name]:.2f} |")


if __name__ == "__main__":
    main()
