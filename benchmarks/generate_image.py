"""Seconds of one step of Stable Diffusion 1.5's UNet against diffusers, in one run.

    python benchmarks/generate_image.py [--width 0.25] [--side 64] [--batch 2] [--repeats 5] [--compile]

The UNet has a share of the published width, by default a quarter (80, 160, 320 and 320 channels), and reads 77 text
vectors of 768; latents are 64 x 64, float32, on every core. Both sides read the same random weights from a folder.
Outputs must agree to 1e-4 before anything is measured. Runs alternate; medians are printed. torch.compile needs a C++
compiler; the table reports its failure.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from encode_images import agree, measure, randomise

import mllm_jax
from mllm_jax.training.operations.host import keep_freed_memory

CHANNELS, GROUPS, HEADS = (320, 640, 1280, 1280), 32, 8  # of Stable Diffusion 1.5
TEXT = 77, 768
STEP = "forward"  # the pass of `measure` and of `agree`


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=0.25, help="share of Stable Diffusion 1.5's channels")
    parser.add_argument("--side", type=int, default=64, help="of the latents; an eighth of the image's")
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes")
    return parser.parse_args()


def unet_of(width: float) -> UNet2DConditionModel:
    channels = tuple(int(each * width) for each in CHANNELS)
    # As many channels a group as divide the first width, at most those of the published model.
    groups = next(groups for groups in range(GROUPS, 0, -1) if all(each % groups == 0 for each in channels))
    return UNet2DConditionModel(
        block_out_channels=channels, norm_num_groups=groups, attention_head_dim=HEADS, cross_attention_dim=TEXT[1]
    ).eval()


class Torch:
    """diffusers, eager or compiled."""

    def __init__(self, model: UNet2DConditionModel, latents: np.ndarray, timesteps, text, compiled: bool = False):
        self.name = "diffusers" + ", torch.compile" * compiled
        self.inputs = (
            torch.tensor(rearrange(latents, "b h w c -> b c h w")),
            torch.tensor(timesteps),
            torch.tensor(text),
        )
        self.model = torch.compile(model, dynamic=False) if compiled else model

    def run(self, which: str):
        with torch.inference_mode():
            return rearrange(self.model(*self.inputs).sample, "b c h w -> b h w c")


class Ours:
    """mllm_jax from the same folder, jitted."""

    name = "mllm_jax"

    def __init__(self, folder: Path, *inputs: np.ndarray):
        module, self.params = mllm_jax.from_pretrained(folder, dtype="float32")
        self.inputs = [jnp.asarray(each) for each in inputs]
        self.step = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))

    def run(self, which: str):
        return jax.block_until_ready(self.step(self.params, *self.inputs))


def main() -> None:
    options = arguments()
    keep_freed_memory()
    threads = os.cpu_count()
    torch.set_num_threads(threads)
    model = unet_of(options.width)
    randomise(model)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(options.batch, options.side, options.side, 4)).astype(np.float32)
    text = rng.normal(size=(options.batch, *TEXT)).astype(np.float32)
    inputs = latents, np.full(options.batch, 500), text
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = Ours(Path(folder), *inputs)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"UNet of {count:,} parameters, {options.batch} latents of {options.side} x {options.side}")
    theirs = Torch(model, *inputs)
    agree("output", STEP, np.asarray(ours.run(STEP)), theirs.run(STEP).numpy())
    sides = [ours, theirs, *([Torch(model, *inputs, compiled=True)] if options.compile else [])]
    found = measure(sides, STEP, options.repeats)
    print(f"\nfloat32, batch {options.batch}, {threads} threads, medians of {options.repeats}\n")
    print("| library | seconds a step | mllm_jax is faster by |")
    print("|---|---|---|")
    for name, seconds in found.items():
        figures = f"{seconds} |" if isinstance(seconds, str) else f"{seconds:.3f} | {seconds / found[ours.name]:.2f}"
        print(f"| {name} | {figures} |")


if __name__ == "__main__":
    main()
