"""One small step compiled for 16 chips, compared with hand counts; and steps that are refused or do not fit."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from tiny import LANGUAGE, experiment, hand_counted

from mllm_jax.cli import main
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError, PlanError
from mllm_jax.layers.compute import with_compute
from mllm_jax.planning import compile as compiling
from mllm_jax.planning import search as searching
from mllm_jax.planning.compile import OutOfMemory, topology_mesh
from mllm_jax.planning.hlo import account
from mllm_jax.planning.plan import make_plan
from mllm_jax.planning.plan_report import render, show, show_search
from mllm_jax.planning.topologies import topology
from mllm_jax.sharding.chips import GIB
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config_file import load_config
from mllm_jax.training.features import stage_spec
from mllm_jax.training.flops import count_flops

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan():
    return make_plan(experiment(), topology("v5e-16"))


def text_of(parts) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in parts:
        console.print(part)
    return console.export_text()


# ---- the compiled step


def test_compiled_flops_are_those_worked_out_by_hand(plan):
    weights, attention = hand_counted(16 * 128, 128, 512, 256, 2, 2, 2, 704)
    assert plan.flops == pytest.approx(weights + attention, rel=0.01)
    # A kernel recomputes scores in its backward pass, so only products outside of kernels are known to 2 %.
    assert plan.dot_flops == pytest.approx(weights + (0 if plan.kernel_flops else attention), rel=0.02)
    assert plan.model_flops["llm"].backward == 2 * plan.model_flops["llm"].forward


def test_fsdp_sends_what_theory_says():
    """Checks (n-1)/n of every layer's weights gathered in bf16 for each of two passes, and its gradient reduced once.

    The head is gathered once, as its passes are adjacent; the embedding table is not gathered.
    """
    plan = make_plan(experiment(remat="full"), topology("v5e-16"))
    assert plan.recompute > 1.2
    weights, table = plan.memory.parameters / 4 * 16, 512 * 256
    sent = {kind: nbytes for kind, link, _, nbytes in plan.collectives}
    gathered = 2 * (weights - 2 * table) + table
    assert sent["all-gather"] == pytest.approx(gathered * 2 * 15 / 16, rel=0.1)
    reduced = sent.get("all-reduce", 0) + 2 * sent.get("all-reduce-scatter", 0) + 2 * sent.get("reduce-scatter", 0)
    assert reduced == pytest.approx(2 * weights * 2 * 15 / 16, rel=0.1)


def test_memory_is_what_the_shapes_say(plan):
    memory = plan.memory
    assert memory.optimizer == pytest.approx(2 * memory.parameters, rel=0.01)
    assert plan.fits and memory.state < memory.peak < memory.available == 15.75 * GIB
    assert memory.batch == 5 * 128 * 4


def test_times_follow_from_the_counts(plan):
    chip, times = topology("v5e-16").chip, plan.times
    assert times.compute == pytest.approx(plan.compiled_flops / 16 / chip.flops)
    assert times.overlapped == max(times.compute, times.hbm, times.ici) < times.serial
    assert plan.mfu(times.compute) == pytest.approx(1 / plan.recompute, rel=0.02)


def test_the_report_fits_on_a_screen_and_into_a_file(plan, tmp_path):
    text = text_of(render(plan))
    assert len(text.splitlines()) < 40
    assert "fits" in text and "all-gather" in text and "nothing overlapped" in text
    plan.write(tmp_path / "new" / "plan.json")
    stored = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert stored["flops"] == plan.flops and stored["mfu"]["overlapped"] == plan.mfu(plan.times.overlapped)


# ---- several slices


def test_a_gradient_goes_over_dcn_between_slices():
    two = topology("2xv5e-4")
    mesh = topology_mesh(MeshConfig(data=2, fsdp=-1), two)
    weight = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16, sharding=rows)
    gradient = jax.grad(lambda w, x: jnp.square((x @ w).astype(jnp.float32)).sum())
    compiled = jax.jit(gradient, out_shardings=weight.sharding).lower(weight, x).compile()
    counted = account(compiled.as_text(), [device.slice_index for device in mesh.devices.flat])
    # A chip's quarter of the gradient, halved for each of the two steps in a ring of two.
    assert counted.by_kind()["all-reduce", "DCN"] == (1, 512 * 512 * 2 / 4)
    assert counted.ici_bytes > 0


def test_only_data_goes_over_slices():
    with pytest.raises(ConfigError, match="raise experiment.mesh.data"):
        topology_mesh(MeshConfig(data=1, fsdp=-1), topology("2xv5e-4"))


# ---- model FLOPs at full size, without compiling


def test_model_flops_of_llama_7b_are_those_worked_out_by_hand():
    full = make_plan(LANGUAGE["experiment"]("llama2_7b", rows=64, length=2048), topology("64xh100"))
    assert full.flops == pytest.approx(sum(hand_counted(64 * 2048, 2048, *LANGUAGE["SIZES"]["llama2_7b"])), rel=0.02)


def test_model_flops_of_vit_large_are_those_worked_out_by_hand():
    config = ViTConfig(image_size=224, patch_size=16, hidden_size=1024, num_layers=24, num_heads=16, mlp_size=4096)
    model = config.make()
    images = jax.ShapeDtypeStruct((4, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    patches = 14 * 14
    weights = 24 * (4 * 1024**2 + 2 * 1024 * 4096) + 16 * 16 * 3 * 1024
    forward = 2 * 4 * patches * (weights + 24 * 2 * patches * 1024)
    assert count_flops(model.apply, params, images) == pytest.approx(forward, rel=0.02)


# ---- steps that do not fit, and missing compilers


def test_what_does_not_fit_is_a_plan_with_advice():
    big = experiment(rows=4, vocab_size=3_000_000, mesh=MeshConfig(data=1, fsdp=-1))
    plan = make_plan(big, topology("v5e-1"))
    assert plan.fits is False and plan.memory.state > plan.memory.available
    assert "chips" in plan.advice[0]
    assert "does not fit" in text_of(render(plan))


@pytest.mark.parametrize(
    "message, needed, available",
    [
        ("RESOURCE_EXHAUSTED: ... HLO temporaries (200.00G) exceeds available HBM (15.75G).", 200, 15.75),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.52G of 15.75G hbm.", 19.52, 15.75),
        ("RESOURCE_EXHAUSTED: something else", None, None),
    ],
)
def test_figures_of_the_compilers_refusal(message, needed, available):
    error = OutOfMemory(message, "the step")
    assert (error.needed, error.available) == tuple(value and value * GIB for value in (needed, available))


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match="mllm-jax\\[plan\\]"):
        compiling.topology_devices(topology("v5e-4"))


def test_rows_that_the_mesh_does_not_divide_are_named():
    plan = make_plan(experiment(rows=6), topology("8xh100"))
    assert "does not divide" in plan.notes[0] and "data x fsdp 2 devices" in plan.advice[0]


# ---- GPUs, from shapes


def test_gpus_are_estimated():
    plan = make_plan(replace(experiment(rows=64), mesh=MeshConfig(1, -1)), topology("16xh100"))
    assert plan.compiled is False and plan.fits is None and plan.dense_flops == plan.flops
    again = make_plan(
        replace(experiment(rows=64), model=with_compute(experiment().model, remat="full")), topology("16xh100")
    )
    assert again.recompute == pytest.approx(4 / 3, rel=0.01)
    assert {link for _, link, _, _ in plan.collectives} == {"ICI", "DCN"}  # two nodes of eight
    assert "may fit" in text_of(render(plan)) and "NVLink" in text_of(render(plan))


# ---- batches without data


def test_batches_of_the_smoke_config():
    smoke = load_config(ROOT / "configs" / "smoke.py")
    text, pairs, images = (stage_spec(smoke, smoke.stages[i]) for i in (0, 1, 3))
    assert "images" not in text and text["tokens"].shape == (8, 128)
    assert pairs["images"].shape == (16, 1, 16, 16, 3)
    assert images["images"].shape == (8, 2, 16, 16, 3) and images["images"].dtype == "uint8"


def test_batches_of_packed_patches():
    plan = load_config(ROOT / "configs" / "qwen25vl_7b.py")
    shapes = stage_spec(plan, plan.stages[0])
    assert shapes["positions"].shape == (256, 8192, 3)  # M-RoPE
    assert shapes["patches"].shape == (256, 16_384, 3 * 2 * 14 * 14)
    assert shapes["patch_coordinates"].shape == (256, 16_384, 2)


# ---- the command


def test_the_command_plans_and_writes_the_figures(tmp_path, capsys):
    options = ["--stage", "align", "--mesh.data", "1", "--mesh.fsdp", "-1", "--json", str(tmp_path / "plan.json")]
    assert main(["plan", str(ROOT / "configs" / "smoke.py"), "--topology", "8xh100", *options]) == 0
    assert "stage align on 8xh100" in capsys.readouterr().out
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored["mesh"]["fsdp"] == 8 and stored["model_flops"]["encoder_image"]["backward"] == 0


# ---- the search


def test_the_search_skips_what_cannot_do_better(monkeypatch, plan):
    """Checks a fake plan in which one piece fits with full remat, and two pieces fit with any."""
    asked = []

    def pretend(candidate, where, stage):
        pieces, mesh = candidate.stages[0].accumulate, candidate.mesh
        remat = candidate.model.parts["llm"].remat
        fits = pieces >= 2 or remat == "full"
        asked.append((mesh.tensor, pieces, remat))
        sizes = dict(data=mesh.data, fsdp=mesh.fsdp, context=1, tensor=mesh.tensor)
        slower = replace(plan.times, compute=1.0 + pieces + mesh.tensor)
        return replace(plan, fits=fits, mesh=sizes, accumulate=pieces, remat=remat, times=slower)

    monkeypatch.setattr(searching, "make_plan", pretend)
    best, tried = searching.search(experiment(rows=32), topology("v5e-16"), limit=8)
    assert asked[:3] == [(1, 1, "dots"), (1, 2, "dots"), (1, 1, "full")]
    assert len(tried) <= 8 and all(found.fits for found in best)
    assert [found.times.expected for found in best] == sorted(found.times.expected for found in best)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_search(best, tried, console)
    show(best[0], console)
    assert "does not fit" in console.export_text()


def test_a_search_without_a_candidate_says_so(monkeypatch):
    monkeypatch.setattr(searching, "make_plan", lambda *_: pytest.fail("nothing is to be compiled"))
    large = experiment(hidden_size=8192, mlp_size=32_768, num_layers=80, num_heads=64, num_kv_heads=8)
    with pytest.raises(ConfigError, match="GiB a device for parameters, optimizer and layer inputs alone"):
        searching.search(large, topology("v5e-16"))
    with pytest.raises(ConfigError, match="rows that data x fsdp divides"):
        searching.search(experiment(rows=6), topology("v5e-16"))
