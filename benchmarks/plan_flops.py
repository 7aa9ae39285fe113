"""The plan's FLOPs against hand counts from layer sizes: LLaMA-7B and ViT-L/14, forward and backward, full size.

    python benchmarks/plan_flops.py [llama2_7b] [vit_large_224] [vit_large_336]

Each training step is compiled ahead of time for a TPU slice, without remat, in its own process; no TPU is needed. The
hand count has two FLOPs per weight and input vector, and for attention two per pair of positions and number of q k^T
and of p v, including hidden pairs. The backward pass counts twice that, but once for the patches, as pixels have no
gradient. Attention kernels are counted separately, by formula: they recompute scores and skip hidden blocks.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SLICE = "v5p-16"


def llama(rows: int, length: int = 2048) -> tuple:
    """Returns (experiment, FLOPs of products with weights, of attention); looking up embeddings costs none."""
    from configs.plans import language

    vocab, width, layers, heads, kv_heads, mlp = language.SIZES["llama2_7b"]
    a_layer = width * 128 * (2 * heads + 2 * kv_heads) + 3 * width * mlp
    weights = 6 * rows * length * (layers * a_layer + vocab * width)
    attention = 6 * rows * length * layers * 2 * length * heads * 128
    return language.experiment("llama2_7b", rows=rows, length=length, remat="none"), weights, attention


def vit_large(rows: int, side: int) -> tuple:
    """Returns the same of CLIP's image encoder, trained with the softmax loss against a bag of words."""
    from mllm_jax.data.pipeline import Mixture
    from mllm_jax.encoders.text_encoder import TextTowerConfig
    from mllm_jax.layers.compute import Compute, with_compute
    from mllm_jax.models.clip import DualEncoderConfig
    from mllm_jax.training.objectives.contrastive import Contrastive

    tower = runpy.run_path(str(ROOT / "configs" / "llava15_7b.py"))["clip_large"]()
    tower = with_compute(replace(tower, image_size=side), dtype="bfloat16", remat="none")
    text = TextTowerConfig(vocab_size=32_000, hidden_size=128, num_layers=0, compute=Compute(dtype="bfloat16"))
    base, *_ = llama(rows)
    data = Mixture((), rows=rows, length=32, slots={"image": 1}, layout="caption")
    stage = replace(base.stages[0], objective=Contrastive(), trainable=("*",), data=data, frozen_dtype=None)
    model = DualEncoderConfig(vision=tower, text=text, projection_size=768)
    patches, width, layers, mlp, space = (side // 14) ** 2, 1024, 24, 4096, 768
    vectors = patches + 1  # and the class token
    weights = 6 * rows * layers * vectors * (4 * width**2 + 2 * width * mlp)
    weights += 4 * rows * patches * 14 * 14 * 3 * width + 6 * rows * (width + 128) * space + 6 * rows * rows * space
    attention = 6 * rows * layers * 2 * vectors**2 * width
    return replace(base, name=f"vit_large_{side}", model=model, stages=(stage,)), weights, attention


CASES = {
    "llama2_7b": ("LLaMA-7B, 16 x 2,048 tokens", lambda: llama(16)),
    "vit_large_224": ("ViT-L/14, 64 images of 224", lambda: vit_large(64, 224)),
    "vit_large_336": ("ViT-L/14, 64 images of 336", lambda: vit_large(64, 336)),
}


def one(name: str) -> dict:
    """Returns the figures of a case, compiled in this process."""
    from mllm_jax.planning.plan import make_plan
    from mllm_jax.planning.topologies import topology

    experiment, weights, attention = CASES[name][1]()
    plan = make_plan(experiment, topology(SLICE))
    if plan.dot_flops is None:
        raise SystemExit(f"{name} does not fit on {SLICE}: {plan.notes}")
    names = ("flops", "dot_flops", "kernel_flops", "dense_flops", "compile_seconds", "notes")
    return {key: getattr(plan, key) for key in names} | dict(weights=weights, attention=attention)


def row(name: str, found: dict) -> str:
    """Returns a row of the table, in TFLOP. If attention is compiled to plain products, it counts as products."""
    kernels, attention = found["dense_flops"] - found["dot_flops"], found["attention"]

    def over(counted: float, hand: float) -> str:
        return f"{counted / 1e12:.3f} / {hand / 1e12:.3f} = {counted / hand:.4f}"

    cells = (
        CASES[name][0],
        over(found["flops"], found["weights"] + attention),
        over(found["dot_flops"], found["weights"] + (0 if kernels else attention)),
        f"{over(found['kernel_flops'], attention)}; all blocks {kernels / attention:.3f}" if kernels else "none",
        f"{found['compile_seconds']:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    print(f"{SLICE}, TFLOP a step over all chips, counted / by hand\n")
    print("| step | model FLOPs | compiled products | attention kernels | compiled in |\n|---|---|---|---|---|")
    for name in options.cases or CASES:
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr.strip()[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        print(row(name, found), *(f"  {note}" for note in found["notes"]), sep="\n", flush=True)


if __name__ == "__main__":
    main()
