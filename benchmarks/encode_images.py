"""Images per second against transformers and timm, of the forward pass and with all gradients, in one run.

    python benchmarks/encode_images.py [--models vit clip nfnet] [--batch 8] [--repeats 5] [--no-compile] [--tiny]

ViT-B/16 and CLIP's ViT-L/14 at 224 pixels against transformers, NFNet-F0 at 192 against timm (see
tests/parity/timm_reference.py; skipped if absent), float32, on every core. Both sides read the same random weights from
a folder. Outputs must agree to 1e-4 and gradients to 1e-3 before anything is measured. Runs alternate; medians are
printed. torch.compile needs a C++ compiler; the table reports its failure.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from einops import rearrange

import mllm_jax
from mllm_jax.training.operations.host import keep_freed_memory

PASSES = ("forward", "forward+backward")
TOLERANCES = {"forward": 1e-4, "forward+backward": 1e-3}
LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14)
TINY = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64, patch_size=16)
TINY_NFNET = dict(depths=(1, 1, 1, 1), channels=(16, 24, 40, 32), stem_chs=32, group_size=8, num_features=48)


@dataclass(frozen=True)
class Case:
    """A reference model, its functions for writing and calling it, and the side of its images."""

    model: torch.nn.Module
    save: Callable[[torch.nn.Module, Path], None]
    call: Callable[[torch.nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    library: str
    pixels: int
    channels_last: bool = False


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    parser.add_argument("--tiny", action="store_true", help="models of two small layers, to try the script out")
    return parser.parse_args()


# ---- the models


def transformers_case(model: torch.nn.Module) -> Case:
    def call(model, pixels):
        out = model(pixel_values=pixels)
        return out.last_hidden_state, out.pooler_output

    return Case(model, lambda model, folder: model.save_pretrained(folder), call, "transformers", 224)


def vit(tiny: bool) -> Case:
    return transformers_case(transformers.ViTModel(transformers.ViTConfig(**TINY if tiny else {})))


def clip(tiny: bool) -> Case:
    config = transformers.CLIPVisionConfig(**TINY if tiny else LARGE, image_size=224)
    return transformers_case(transformers.CLIPVisionModel(config))


def nfnet(tiny: bool) -> Case | None:
    import pytest

    sys.path.append(str(Path(__file__).parents[1] / "tests" / "parity"))
    from timm_reference import timm_or_skip

    try:
        timm = timm_or_skip()
    except pytest.skip.Exception as reason:
        print(f"nfnet skipped: {reason}")
        return None

    def call(model, pixels):
        maps = model.forward_features(pixels)
        return maps.flatten(2).transpose(1, 2), model.forward_head(maps, pre_logits=True)

    model = timm.create_model("dm_nfnet_f0", num_classes=0, **TINY_NFNET if tiny else {})
    save = lambda model, folder: timm.models.save_for_hf(model, folder, safe_serialization=True)  # noqa: E731
    return Case(model, save, call, "timm", 192, channels_last=True)


CASES = {"vit": vit, "clip": clip, "nfnet": nfnet}


def randomise(model: torch.nn.Module) -> None:
    """Sets weights that keep the size of activations; no gain or bias is 0, so that all of them count."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape)) if parameter.ndim else parameter.fill_(0.2)


# ---- the sides: `run(pass)` computes, waits, and returns (features, pooled), or loss and gradients


class Torch:
    """The reference, eager or compiled; NFNet also with channels last, which may be faster."""

    def __init__(self, case: Case, pixels: np.ndarray, weights: tuple, compiled=False, channels_last=False):
        self.name = case.library + ", channels last" * channels_last + ", torch.compile" * compiled
        self.model = case.model.eval()
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        pixels = torch.tensor(rearrange(pixels, "b h w c -> b c h w"))
        self.pixels = pixels.contiguous(memory_format=self.layout)
        self.weights = [torch.tensor(weight) for weight in weights]
        self.call = torch.compile(case.call, dynamic=False) if compiled else case.call

    def run(self, which: str):
        self.model.to(memory_format=self.layout)
        if which == "forward":
            with torch.inference_mode():
                return self.call(self.model, self.pixels)
        self.model.zero_grad(set_to_none=True)
        loss = sum(
            (out * weight).mean() for out, weight in zip(self.call(self.model, self.pixels), self.weights, strict=True)
        )
        loss.backward()
        return loss


class Ours:
    """mllm_jax from the same folder, jitted."""

    name = "mllm_jax"

    def __init__(self, folder: Path, pixels: np.ndarray, weights: tuple):
        self.module, self.params = mllm_jax.from_pretrained(folder, dtype="float32")
        self.pixels, self.weights = jnp.asarray(pixels), [jnp.asarray(weight) for weight in weights]

        def forward(params, pixels):
            out = self.module.apply({"params": params}, pixels)
            return out.last_hidden_state, out.pooler_output

        def loss(params, pixels):
            return sum((out * weight).mean() for out, weight in zip(forward(params, pixels), self.weights, strict=True))

        self.passes = dict(zip(PASSES, (jax.jit(forward), jax.jit(jax.value_and_grad(loss))), strict=True))

    def run(self, which: str):
        return jax.block_until_ready(self.passes[which](self.params, self.pixels))


# ---- are they equal


def agree(what: str, which: str, ours, theirs) -> None:
    """Stops the program if two arrays, or trees of them, differ by more than the tolerance of the pass."""
    ours, theirs = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (ours, theirs))
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not error <= TOLERANCES[which]:
        raise SystemExit(f"{what}: relative error {error:.1e} above {TOLERANCES[which]:.0e}: nothing is measured")
    print(f"  {what}: largest difference {error:.1e} of the largest value")


@contextmanager
def gradients_as_weights(model: torch.nn.Module) -> Iterator[None]:
    """Replaces the model's weights by its gradients, so that these can be written and read like weights."""
    kept = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.grad
    yield
    for name, parameter in model.named_parameters():
        parameter.data = kept[name]


def check(case: Case, ours: Ours, theirs: Torch, passes: list[str]) -> None:
    for what, mine, their in zip(("features", "pooled"), ours.run("forward"), theirs.run("forward"), strict=True):
        agree(what, "forward", np.asarray(mine), their.numpy())
    if "forward+backward" in passes:
        theirs.run("forward+backward")
        with tempfile.TemporaryDirectory() as folder, gradients_as_weights(case.model):
            case.save(case.model, Path(folder))
            wanted = mllm_jax.from_pretrained(folder, dtype="float32")[1]
        found = ours.run("forward+backward")[1]
        for (path, mine), their in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
            # The bias of the keys cancels in the softmax: its gradient is a rounding error.
            if jax.tree_util.keystr(path).endswith("['k']['bias']"):
                continue
            error = np.abs(mine - their).max() / np.abs(their).max()
            if not error <= TOLERANCES["forward+backward"]:
                raise SystemExit(f"gradient of {jax.tree_util.keystr(path)}: relative error {error:.1e}")
        agree("gradients", "forward+backward", found, wanted)


# ---- time


def measure(sides: list, which: str, repeats: int) -> dict[str, float | str]:
    """Returns the median seconds of each side in alternating runs, or why it failed.

    The first run of each side, which may compile, is not measured.
    """
    found: dict[str, float | str] = {}
    for side in sides:
        try:
            side.run(which)
        except Exception as error:  # torch.compile raises any error of its back ends
            if "torch.compile" not in side.name:
                raise
            found[side.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    running = [side for side in sides if side.name not in found]
    seconds = {side.name: [] for side in running}
    for _ in range(repeats):
        for side in running:
            start = time.perf_counter()
            side.run(which)
            seconds[side.name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {side.name: found.get(side.name, medians.get(side.name)) for side in sides}


def sides_of(case: Case, options: argparse.Namespace) -> list:
    """Returns the checked sides, mllm_jax first."""
    randomise(case.model)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(options.batch, case.pixels, case.pixels, 3)).astype(np.float32)
    with torch.no_grad():
        shapes = [out.shape for out in case.call(case.model.eval(), torch.zeros(1, 3, case.pixels, case.pixels))]
    weights = tuple(rng.normal(size=shape[1:]).astype(np.float32) for shape in shapes)
    with tempfile.TemporaryDirectory() as folder:
        case.save(case.model, Path(folder))
        ours = Ours(Path(folder), pixels, weights)
    theirs = Torch(case, pixels, weights)
    check(case, ours, theirs, options.passes)
    more = [Torch(case, pixels, weights, channels_last=True)] if case.channels_last else []
    more += [] if options.no_compile else [Torch(case, pixels, weights, True)]
    return [ours, theirs, *more]


def lines_of(model: str, which: str, found: dict[str, float | str], batch: int) -> list[str]:
    """Returns rows of the table; the ratio is the speed of mllm_jax over that of the library."""
    base = found[Ours.name]
    lines = []
    for name, seconds in found.items():
        figures = seconds + " | " if isinstance(seconds, str) else f"{batch / seconds:,.2f} | {seconds / base:.2f}"
        lines.append(f"| {model} | {which} | {name} | {figures} |")
    return lines


def main() -> None:
    options = arguments()
    transformers.logging.disable_progress_bar()
    keep_freed_memory()  # as in training; it affects both sides, which share one allocator
    threads = os.cpu_count()
    torch.set_num_threads(threads)
    lines = []
    for model in options.models:
        case = CASES[model](options.tiny)
        if case is None:
            lines.append(f"| {model} | | skipped: no timm | | |")
            continue
        count = sum(parameter.numel() for parameter in case.model.parameters())
        print(f"{model}: {count:,} parameters, {options.batch} images of {case.pixels} x {case.pixels}")
        sides = sides_of(case, options)
        for which in options.passes:
            lines += lines_of(model, which, measure(sides, which, options.repeats), options.batch)
    print(f"\nfloat32, batch {options.batch}, {threads} threads, medians of {options.repeats}\n")
    print("| model | pass | library | images/s | mllm_jax is faster by |")
    print("|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
