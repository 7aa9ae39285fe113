"""The number of devices of a CPU if the config gives none: the same for every command."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from toy_data import MODEL, Toy

from mllm_jax import Experiment, MeshConfig, Mixture, NextToken, Stage, TokenizerConfig, Weighted
from mllm_jax.cli import evaluate, generate, runs
from mllm_jax.cli.runs import fitting_cpu_devices

ROOT = Path(__file__).parents[1]


def experiment(*rows: int, accumulate: int = 1, validation: int | None = None, **mesh: int) -> Experiment:
    data = Mixture((Weighted(Toy()),), length=64)
    stages = tuple(
        Stage(
            f"stage{number}",
            NextToken(),
            ("*",),
            replace(data, rows=count),
            1,
            accumulate=accumulate,
            validation=None if validation is None else replace(data, rows=validation),
        )
        for number, count in enumerate(rows)
    )
    return Experiment("devices", MODEL, stages, TokenizerConfig(320), mesh=MeshConfig(**mesh))


@pytest.mark.parametrize(
    "cores,made,devices",
    [
        (2, dict(rows=(16,)), 2),
        (64, dict(rows=(16, 64)), 8),
        (8, dict(rows=(16, 12)), 4),
        (6, dict(rows=(16,)), 4),
        (4, dict(rows=(9,)), 3),
        (4, dict(rows=(7, 5)), 1),
        (1, dict(rows=(16,)), 1),
        (8, dict(rows=(16,), accumulate=4), 4),
        (8, dict(rows=(16,), validation=2), 2),
        (8, dict(rows=(4,), tensor=2), 8),  # the rows are sharded over 4 of them
        (8, dict(rows=(6,), data=3, tensor=2), 6),
        (8, dict(rows=(16,), data=1, fsdp=4, context=1, tensor=1), 4),
        (2, dict(rows=(16,), data=1, fsdp=4), 1),  # refused later, by the mesh
    ],
)
def test_the_largest_number_that_fits(cores, made, devices):
    made = dict(made)
    assert fitting_cpu_devices(experiment(*made.pop("rows"), **made), cores) == devices


CODE = """
    import sys
    from mllm_jax.sharding import cpu
    cpu.cores = lambda: 4
    sys.path[:0] = ["{tests}", "{tests}/training"]
    from dataclasses import replace
    from test_cpu_devices import experiment
    from mllm_jax.cli.runs import use_cpu_devices
    use_cpu_devices(replace(experiment(12, 9), cpu_devices={asked}), say=True)
    import jax
    print(jax.device_count())
"""


@pytest.mark.parametrize(
    "asked,wanted",
    [(None, ["3 CPU device(s) on 4 core(s); --cpu-devices N takes another number", "3"]), (2, ["2"])],
)
def test_a_process_has_them(asked, wanted):
    code = textwrap.dedent(CODE.format(tests=ROOT / "tests", asked=asked))
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    environment |= {"PYTHONPATH": f"{ROOT}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == wanted, done.stderr


def test_several_processes_choose_nothing(monkeypatch):
    """Checks that processes, which must agree, do not choose for themselves."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(runs, "_set_cpu_devices", lambda devices, required: chosen.append(devices))
    chosen: list[int] = []
    runs.use_cpu_devices(experiment(16), runs.Hosts("localhost:1", 2, 0))
    assert chosen == []
    runs.use_cpu_devices(experiment(16), runs.Hosts())
    assert chosen == [fitting_cpu_devices(experiment(16), len(os.sched_getaffinity(0)))]


class _Reached(Exception):
    pass


@pytest.mark.parametrize("command", ["generate", "evaluate", "evaluate with questions"])
def test_commands_on_a_run_choose_alike(command, monkeypatch, tmp_path):
    """Checks that commands open a run on the devices that it is trained on."""
    made = experiment(16)

    def chosen(given, *_, **__):
        assert given is made
        raise _Reached

    monkeypatch.setattr(runs, "experiment_of", lambda run: made)
    monkeypatch.setattr(evaluate, "experiment_of", lambda run: made)
    monkeypatch.setattr(runs, "use_cpu_devices", chosen)
    monkeypatch.setattr(evaluate, "use_cpu_devices", chosen)
    for place in ("mllm_jax.checkpoints.run.is_run", "mllm_jax.cli.evaluate.is_run"):
        monkeypatch.setattr(place, lambda folder: True)
    (tmp_path / "config.json").write_text("{}")
    questions = tmp_path / "q.json"
    questions.write_text('[{"question": "a?", "answer": "b"}]')
    arguments = dict(
        generate=(generate.run, [str(tmp_path), "what?"]),
        evaluate=(evaluate.run, [str(tmp_path)]),
    ).get(command, (evaluate.run, [str(tmp_path), "--questions", str(questions)]))
    with pytest.raises(_Reached):
        arguments[0](arguments[1])
