"""The memory of a reading, measured by the kernel in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mllm_jax.checkpoints.components import Component
from mllm_jax.checkpoints.safetensors_files import Spec, plan_files, write_file, write_index

ROOT = Path(__file__).parents[2]
WIDTH, MLP, LAYERS, VOCAB = 1024, 2816, 4, 4096  # 4 layers of about 48 MB in float32
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# A small model is loaded first, so that the weights are measured and not the imports.
READER = """
import json, sys
from pathlib import Path
import jax, numpy as np
import mllm_jax
from mllm_jax import MeshConfig
from mllm_jax.sharding.mesh import make_mesh

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024

small, large, devices = sys.argv[1:]
mesh = make_mesh(MeshConfig(fsdp=int(devices), data=1)) if int(devices) > 1 else None
module, params = mllm_jax.from_pretrained(small, mesh=mesh)
reports = []
before = status("VmRSS")
module, params = mllm_jax.from_pretrained(large, mesh=mesh, report=reports.append)
print(json.dumps(dict(
    peak=status("VmHWM") - before,
    after=status("VmRSS") - before,
    loaded=sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards),
    reported=reports[0].peak_host_bytes,
    mapped=reports[0].mapped_bytes,
    heavy=[name for name in ("torch", "transformers", "orbax", "safetensors") if name in sys.modules],
    total=float(sum(np.asarray(leaf[..., :1]).astype(np.float64).sum() for leaf in jax.tree.leaves(params))),
)))
"""


def tensors(width: int, mlp: int, vocab: int) -> dict[str, Spec]:
    shapes = {"model.embed_tokens": (vocab, width), "lm_head": (vocab, width), "model.norm": (width,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj": (mlp, width) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (width, mlp)}
        shapes |= {f"{layer}.{name}_layernorm": (width,) for name in ("input", "post_attention")}
    return {f"{name}.weight": Spec(np.dtype(np.float32), shape) for name, shape in shapes.items()}


def write(folder: Path, config: dict) -> int:
    specs = tensors(config["hidden_size"], config["intermediate_size"], config["vocab_size"])
    rng = np.random.default_rng(0)
    files = plan_files(specs, 10**8)
    for name, part in files.items():
        write_file(folder / name, part, (rng.random(spec.shape, np.float32) for spec in part.values()))
    if len(files) > 1:
        write_index(Component(folder), files)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(spec.nbytes for spec in specs.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    small, large = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("large")
    write(small, CONFIG | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64})
    yield small, large, write(large, CONFIG)
    for path in large.glob("*.safetensors"):
        path.unlink()


def measure(small: Path, large: Path, devices: int) -> dict:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", READER, str(small), str(large), str(devices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_reading_takes_little_more_than_what_it_loads(folders):
    """Checks the extra memory: the largest group of tensors and 15 % of the file; on a mesh, a shard's part of it."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc on this system")
    size, group = folders[2], 4 * LAYERS * WIDTH * MLP
    one, eight = measure(*folders[:2], devices=1), measure(*folders[:2], devices=8)
    print({"file": size, "group": group, "one device": one, "eight": eight})
    for found, devices in ((one, 1), (eight, 8)):
        assert not found["heavy"], "reading needs none of these"
        assert found["loaded"] == size and found["peak"] >= size
        assert found["peak"] - size <= (group + 0.15 * size) / devices
        assert found["after"] - size <= 0.05 * size, "some memory is not freed"
        assert found["reported"] == group / devices and found["mapped"] < 5e6
    assert one["total"] == eight["total"] != 0
