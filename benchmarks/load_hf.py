"""Host memory and time of loading a random LLaMA folder, compared with transformers, in one table.

    python benchmarks/load_hf.py [--gigabytes 1] [--devices 8] [--repeats 3] [--dtype bfloat16] [--folder TMP]

Each reading runs in its own process, after its libraries were imported and a tiny model of the same kind was loaded.
transformers only maps the files, so it has two rows: one with each page touched, as a first step of computation does,
and one with every parameter copied to its own memory, as here. The kernel measures memory: "peak" is the high-water
mark of resident memory above the initial one, "beside the weights" is the peak without the loaded parameters. The files
are read once beforehand, so that all sides find them in the page cache. Readings alternate; the median of each figure
is printed. CPU seconds are those of all threads; on a busy machine they are more reliable than the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mllm_jax.checkpoints.components import Component
from mllm_jax.checkpoints.hf import float_dtype, write_config
from mllm_jax.checkpoints.safetensors_files import Spec, plan_files, write_file, write_index

ROOT = Path(__file__).parents[1]
SHAPE = dict(hidden_size=2048, intermediate_size=5632, vocab_size=32000, num_attention_heads=32, num_key_value_heads=4)
TINY = dict(hidden_size=64, intermediate_size=128, vocab_size=64, num_attention_heads=4, num_key_value_heads=2)
MEASURE = """
import gc, json, sys, time
from pathlib import Path

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024

def measure(load, tiny, folder, nbytes):
    model = load(tiny)
    del model
    gc.collect()
    before, begun, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    model = load(folder)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    print(json.dumps(dict(seconds=seconds, cpu=cpu, peak=status("VmHWM") - before, loaded=nbytes(model))))

tiny, folder, devices = sys.argv[1:]
"""
OURS = """
import jax, mllm_jax
from mllm_jax.sharding.mesh import make_mesh

mesh = make_mesh(mllm_jax.MeshConfig(data=1, fsdp=int(devices))) if int(devices) > 1 else None
measure(
    lambda folder: mllm_jax.from_pretrained(folder, mesh=mesh)[1], tiny, folder,
    lambda params: sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards),
)
"""
THEIRS = """
import torch, transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

def load(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    for parameter in model.parameters():
        if copied:
            parameter.data = parameter.data.clone()
        else:
            parameter.detach().view(-1).view(torch.uint8)[::4096].sum()
    return model

measure(
    load, tiny, folder,
    lambda model: sum(p.numel() * p.element_size() for p in model.parameters()),
)
"""


def tensors(config: dict, dtype: np.dtype) -> dict[str, Spec]:
    """Returns the tensors of a LLaMA by name."""
    width, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (vocab, width), "lm_head": (vocab, width), "model.norm": (width,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj": (width, width) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj": (kv, width) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj": (mlp, width) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (width, mlp)}
        shapes |= {f"{layer}.{name}_layernorm": (width,) for name in ("input", "post_attention")}
    return {f"{name}.weight": Spec(dtype, shape) for name, shape in shapes.items()}


def write_random(folder: Path, sizes: dict, layers: int, dtype: np.dtype) -> None:
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        num_hidden_layers=layers,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        torch_dtype=dtype.name,
        **sizes,
    )
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files = plan_files(tensors(config, dtype), 400_000_000)
    for name, part in files.items():
        write_file(folder / name, part, (rng.random(s.shape, np.float32).astype(dtype) for s in part.values()))
    if len(files) > 1:
        write_index(Component(folder), files)
    write_config(folder, config)


def layers_for(nbytes: float, dtype: np.dtype) -> int:
    """Returns the number of layers with which the folder has about this size."""
    one, two = (sum(spec.nbytes for spec in tensors(SHAPE | {"num_hidden_layers": n}, dtype).values()) for n in (1, 2))
    return max(1, math.ceil((nbytes - one) / (two - one)) + 1)


def measured(code: str, tiny: Path, folder: Path, devices: int) -> dict[str, float]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", MEASURE + code, str(tiny), str(folder), str(devices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folders")
    options = parser.parse_args()
    dtype = float_dtype(options.dtype)
    sides = {
        f"mllm_jax, {options.devices} devices": (OURS, options.devices),
        "mllm_jax, 1 device": (OURS, 1),
        "transformers, mapped": ("copied = False" + THEIRS, 1),
        "transformers, copied": ("copied = True" + THEIRS, 1),
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        tiny, folder = Path(place) / "tiny", Path(place) / "large"
        write_random(tiny, TINY, 2, dtype)
        write_random(folder, SHAPE, layers_for(options.gigabytes * 1e9, dtype), dtype)
        files = list(folder.glob("*.safetensors"))
        size = sum(len(path.read_bytes()) for path in files)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(options.repeats):
            for name, (code, devices) in sides.items():
                found[name].append(measured(code, tiny, folder, devices))
    table = Table(
        "reader",
        "s",
        "CPU s",
        "loaded MB",
        "peak MB",
        "beside the weights MB",
        title=f"{size / 1e9:.2f} GB, {len(files)} files",
    )
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        beside = middle["peak"] - middle["loaded"]
        figures = (f"{value / 1e6:.1f}" for value in (middle["loaded"], middle["peak"], beside))
        table.add_row(name, f"{middle['seconds']:.2f}", f"{middle['cpu']:.2f}", *figures)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
