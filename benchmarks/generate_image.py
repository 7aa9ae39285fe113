"""Seconds of a step and of an image, and the memory, of Stable Diffusion 1.5's UNet against diffusers, in one run.

    python benchmarks/generate_image.py [--width 0.25] [--side 64] [--batch 2] [--steps 20] [--repeats 5] [--compile]

The UNet has a share of the published width, by default a quarter (80, 160, 320 and 320 channels), and reads 77 text
vectors of 768; latents are 64 x 64, float32, on every core. Both sides read the same random weights from a folder.
A step is one call of the UNet for the whole batch. An image is all steps of DDIM with guidance, a doubled batch: on our
side the library's compiled loop, on the other that of a diffusers pipeline. Neither has a text encoder or a decoder.
Outputs of both must agree to 1e-4 before anything is measured. Runs alternate; medians are printed. Compiling and
reading are not in the seconds. The memory is the largest resident size of a process that imports one side only, reads
the weights, and makes a step and an image: see image_sides.py. torch.compile needs a C++ compiler; the table reports
its failure. `--width 1` reads 3.4 GB of weights on each side; take `--repeats 1`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from diffusers import UNet2DConditionModel
from encode_images import agree, measure, randomise
from image_sides import TEXT, Ours, Torch, inputs_of

from mllm_jax.training.operations.host import keep_freed_memory

CHANNELS, GROUPS, HEADS = (320, 640, 1280, 1280), 32, 8  # of Stable Diffusion 1.5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=0.25, help="share of Stable Diffusion 1.5's channels")
    parser.add_argument("--side", type=int, default=64, help="of the latents; an eighth of the image's")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step: 2 is one image with guidance")
    parser.add_argument("--steps", type=int, default=20, help="of an image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes")
    options = parser.parse_args()
    if options.batch % 2:
        parser.error(f"--batch {options.batch}: an image with guidance has two rows; give an even number")
    return options


def unet_of(width: float) -> UNet2DConditionModel:
    channels = tuple(int(each * width) for each in CHANNELS)
    # As many channels a group as divide the first width, at most those of the published model.
    groups = next(groups for groups in range(GROUPS, 0, -1) if all(each % groups == 0 for each in channels))
    return UNet2DConditionModel(
        block_out_channels=channels, norm_num_groups=groups, attention_head_dim=HEADS, cross_attention_dim=TEXT[1]
    ).eval()


def peak(name: str, folder: str, options: argparse.Namespace) -> str:
    """Returns the peak memory of a library in a process of its own."""
    script = Path(__file__).with_name("image_sides.py")
    sizes = ["--rows", options.batch, "--side", options.side, "--steps", options.steps]
    done = subprocess.run([sys.executable, script, name, folder, *map(str, sizes)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} alone failed:\n{done.stderr}")
    return f"{int(done.stdout.split()[-1]) / 2**30:.2f} GiB"


def main() -> None:
    options = arguments()
    keep_freed_memory()
    model = unet_of(options.width)
    randomise(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"UNet of {count:,} parameters, {options.batch} latents of {options.side} x {options.side}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        memory = {name: peak(name, folder, options) for name in ("mllm_jax", "diffusers")}
        given = Path(folder), inputs_of(options.batch, options.side), options.steps
        sides = [Ours(*given), Torch(*given), *([Torch(*given, compiled=True)] if options.compile else [])]
    for which in ("step", "image"):
        agree(which, "forward", np.asarray(sides[0].run(which)), sides[1].run(which).numpy())
    found = {which: measure(sides, which, options.repeats) for which in ("step", "image")}
    print(f"\nfloat32, batch {options.batch}, {os.cpu_count()} threads, medians of {options.repeats}\n")
    print(f"| library | a step, s | mllm_jax is faster by | an image of {options.steps} steps, s | by | peak memory |")
    print("|---|---|---|---|---|---|")
    for side in sides:
        figures = []
        for times in found.values():
            seconds, base = times[side.name], times["mllm_jax"]
            figures += [seconds, ""] if isinstance(seconds, str) else [f"{seconds:.3f}", f"{seconds / base:.2f}"]
        print(f"| {side.name} | {' | '.join(figures)} | {memory.get(side.name, '')} |")


if __name__ == "__main__":
    main()
