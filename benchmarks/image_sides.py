"""A UNet's folder as generate_image.py runs it, by each library; alone, it prints the peak memory of one of them.

    python benchmarks/image_sides.py mllm_jax|diffusers FOLDER [--rows 2] [--side 64] [--steps 20]

The figure is the largest resident size of a process, in bytes, that imports one library only, reads the weights and
makes one step and one image.
"""

from __future__ import annotations

import argparse
import os
import resource
from pathlib import Path

import numpy as np

TEXT = 77, 768
GUIDANCE = 7.5
# Of Stable Diffusion's DDIM.
SCHEDULER = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
    set_alpha_to_one=False,
)  # fmt: skip


def inputs_of(rows: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns latents [rows, side, side, 4], timesteps [rows] and texts [rows, 77, 768]."""
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(rows, side, side, 4)).astype(np.float32)
    return latents, np.full(rows, 500), rng.normal(size=(rows, *TEXT)).astype(np.float32)


class Torch:
    """diffusers, eager or compiled: `run` makes a step, or images by the loop of a pipeline.

    Half of the rows are images: the first half of the texts is negative.
    """

    def __init__(self, folder: Path, inputs: tuple, steps: int, compiled: bool = False):
        import torch
        from diffusers import DDIMScheduler, UNet2DConditionModel

        torch.set_num_threads(os.cpu_count())
        self.torch, self.name, self.steps = torch, "diffusers" + ", torch.compile" * compiled, steps
        model = UNet2DConditionModel.from_pretrained(folder).eval()
        self.model = torch.compile(model, dynamic=False) if compiled else model
        self.scheduler = DDIMScheduler(**SCHEDULER)
        latents, timesteps, self.text = (torch.tensor(each) for each in inputs)
        self.inputs = latents.permute(0, 3, 1, 2).contiguous(), timesteps, self.text

    def run(self, which: str):
        with self.torch.inference_mode():
            found = self.model(*self.inputs).sample if which == "step" else self._images()
        return found.permute(0, 2, 3, 1)

    def _images(self):
        self.scheduler.set_timesteps(self.steps)
        latents = self.inputs[0][: len(self.text) // 2]
        for timestep in self.scheduler.timesteps:
            both = self.model(self.torch.cat([latents] * 2), timestep, self.text).sample
            without, with_text = both.chunk(2)
            noise = without + GUIDANCE * (with_text - without)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        return latents


class _Unet:
    """A UNet as the sampler calls a model: texts are vectors already, and latents are the result."""

    def __init__(self, unet):
        self.unet = unet

    def apply(self, variables, *inputs, method: str):
        return self.unet.apply(variables, *inputs) if method == "denoise" else inputs[0]


class Ours:
    """mllm_jax: `run` makes a jitted step, or images by the library's compiled loop."""

    name = "mllm_jax"

    def __init__(self, folder: Path, inputs: tuple, steps: int):
        import jax

        import mllm_jax
        from mllm_jax.generation.diffusion import Sampler, SamplerInputs, SamplingPlan
        from mllm_jax.generators.schedulers.ddim import DDIM

        module, self.params = mllm_jax.from_pretrained(folder, dtype="float32")
        self.inputs = [jax.numpy.asarray(each) for each in inputs]
        self.step = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))
        latents, _, text = inputs
        images = len(text) // 2
        self.sampler = Sampler(_Unet(module), self.params)
        self.asked = SamplerInputs(
            tokens=text[images:], negatives=text[:images], seeds=np.zeros(images, np.uint32),
            guidance=np.float32(GUIDANCE), latents=latents[:images],
        )  # fmt: skip
        self.plan = SamplingPlan(DDIM(**SCHEDULER), steps, latents.shape[1:], guided=(0, steps))
        self.wait = jax.block_until_ready

    def run(self, which: str):
        if which == "step":
            return self.wait(self.step(self.params, *self.inputs))
        return self.sampler(self.asked, self.plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=("mllm_jax", "diffusers"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    make = Ours if options.library == "mllm_jax" else Torch
    side = make(options.folder, inputs_of(options.rows, options.side), options.steps)
    for which in ("step", "image"):
        side.run(which)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
