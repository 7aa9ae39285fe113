"""A run that is killed again and again ends with the same bits as one that was not, on one device and on eight."""

from __future__ import annotations

import json
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tiny_runs import (
    STEPS,
    Setting,
    arrays,
    experiment,
    hashes,
    metrics,
    start,
    start_command,
)

pytestmark = pytest.mark.slow

STAGES = ("language", "contrastive", "align", "instruct")
PAUSE = 0.1  # seconds before each step of a run that is killed in the middle of a stage
MESHES = {
    "one device": (1, {"data": 1}),
    "eight devices": (8, {"data": 2, "fsdp": 2, "tensor": 2}),
}


def kill_points(seed: int) -> list[tuple[int, int]]:
    """Draws five (stage, steps done) pairs in order: one in each stage, and a second one in a random stage."""
    rng = random.Random(seed)
    twice = rng.randrange(len(STAGES))
    points = [(i, rng.randint(2, 6)) for i in range(len(STAGES)) if i != twice]
    return sorted([*points, (twice, rng.randint(1, 2)), (twice, rng.randint(5, 6))])


@dataclass(frozen=True)
class Pair:
    """A run without kills and one with five; `copies` are the latter's folder after each kill."""

    setting: Setting
    whole: Path
    killed: Path
    copies: dict[tuple[int, int], Path]
    printed: list[str]


def make_pair(base: Path, devices: int, mesh: dict[str, int]) -> Pair:
    """Makes a pair; the whole run compiles and the killed one reads the cache, so the two are compared too."""
    setting = Setting(devices, mesh, base / "compiled")
    whole, killed = base / "whole", base / "killed"
    start(setting, whole, record=base / "whole.batches").end(expected=0)
    copies, printed = {}, []
    for stage, steps in kill_points(seed=devices):
        # The kill follows the end of the step; the run waits two steps later, in case the end is noticed late.
        hold = (STAGES[stage], steps + 1)
        run = start(setting, killed, pause=PAUSE, record=base / "killed.batches", hold=hold)
        # Kills from step 4 on leave the checkpoint of step 3; earlier ones may leave it half written.
        saved = killed / "checkpoints" / f"{stage}-{STAGES[stage]}" / "00000003" if steps > 3 else killed
        goal = stage * STEPS + steps
        run.wait_for(lambda lines, goal=goal, saved=saved: lines and lines[-1]["step"] >= goal and saved.is_dir())
        run.process.kill()
        printed.append(run.end(expected=-signal.SIGKILL))
        left = metrics(killed)[-1]
        assert (left["stage"], left["step"] < (stage + 1) * STEPS) == (STAGES[stage], True), "killed at another step"
        assert not (killed / "stages" / f"{stage}-{STAGES[stage]}").exists()
        copies[stage, steps] = shutil.copytree(killed, base / f"killed-{stage}-{steps}")
    printed.append(start(setting, killed, record=base / "killed.batches").end(expected=0))
    return Pair(setting, whole, killed, copies, printed)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Starts a future Pair for each mesh; they run in parallel."""
    with ThreadPoolExecutor(len(MESHES)) as pool:
        yield {
            name: pool.submit(make_pair, tmp_path_factory.mktemp(name.replace(" ", "-")), *mesh)
            for name, mesh in MESHES.items()
        }


@pytest.fixture
def pair(pairs, request) -> Pair:
    return pairs[getattr(request, "param", "one device")].result()


on_every_mesh = pytest.mark.parametrize("pair", MESHES, indirect=True)


def assert_same_leaves(expected: Path, found: Path) -> None:
    wanted, got = arrays(expected), arrays(found)
    assert wanted and wanted.keys() == got.keys()
    assert not [path for path in wanted if wanted[path] != got[path]]


def assert_same_end(expected: Path, found: Path) -> None:
    """Checks that metrics, all parameters and facts are equal, except seconds."""
    assert metrics(found) == metrics(expected)
    for i, stage in enumerate(STAGES):
        name = Path("stages") / f"{i}-{stage}"
        assert_same_leaves(expected / name, found / name)
        meta, other = (json.loads((run / name / "record.json").read_text())["meta"] for run in (expected, found))
        assert meta["frozen"] == other["frozen"]


@on_every_mesh
def test_killed_five_times_it_ends_with_the_same_bits(pair):
    assert len(pair.copies) == 5 and {stage for stage, _ in pair.copies} == {0, 1, 2, 3}
    assert_same_end(pair.whole, pair.killed)
    lines = metrics(pair.killed)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, len(STAGES) * STEPS + 1))


@on_every_mesh
def test_and_with_the_same_optimizer_state(pair):
    """Checks the checkpoints: parameters, moments, step and key, with the data step and the scores."""
    for i, stage in enumerate(STAGES):
        kept = [
            sorted(p.name for p in (run / "checkpoints" / f"{i}-{stage}").iterdir())
            for run in (pair.whole, pair.killed)
        ]
        last = i + 1 == len(STAGES)  # it keeps its end, so that more steps can follow
        assert kept[0] == kept[1] == (["00000006", "00000008"] if last else ["00000003", "00000006"])
        for step in kept[0]:
            folders = [run / "checkpoints" / f"{i}-{stage}" / step for run in (pair.whole, pair.killed)]
            assert_same_leaves(*folders)
            assert any("/opt_state/" in path for path in arrays(folders[0]))
            records = [json.loads((folder / "record.json").read_text()) for folder in folders]
            assert records[0] == records[1]
            assert records[0]["meta"]["data_step"] == int(step)


@on_every_mesh
def test_each_start_goes_on_from_the_last_checkpoint(pair):
    resumed = 0
    for (stage, copy), printed in zip(((s, c) for (s, _), c in pair.copies.items()), pair.printed[1:], strict=True):
        folder = copy / "checkpoints" / f"{stage}-{STAGES[stage]}"
        # A kill between a checkpoint's manifest and its renaming leaves `00000003.writing`, which is ignored.
        complete = sorted(int(p.parent.name) for p in folder.glob("*/manifest.json") if p.parent.name.isdecimal())
        said = f"stage {STAGES[stage]}: resumed at step "
        assert f"{said}{complete[-1]}" in printed if complete else said not in printed
        resumed += bool(complete)
    assert resumed >= 2
    trained_twice = len((pair.killed.parent / "killed.batches").read_text().splitlines())
    assert len(STAGES) * STEPS < trained_twice <= len(STAGES) * STEPS + 5 * 6
    # A repeated step gets the same batch again: `hashes` has the last one, the file all of them.
    lines = [json.loads(line) for line in (pair.killed.parent / "killed.batches").read_text().splitlines()]
    expected = hashes(pair.whole.parent / "whole.batches")
    assert len(expected) == len(STAGES) * STEPS == len(set(expected.values()))
    assert all(expected[line["stage"], line["step"]] == line["hash"] for line in lines)


def test_eight_devices_then_four(pairs, tmp_path):
    pair = pairs["eight devices"].result()
    copy = next(copy for (stage, steps), copy in sorted(pair.copies.items()) if stage == 1 and steps >= 2)
    folder = shutil.copytree(copy, tmp_path / "run")
    four = replace(pair.setting, devices=4, mesh={"data": 2, "fsdp": 1, "tensor": 2})
    record = tmp_path / "batches"
    start(four, folder, record=record).end(expected=0)
    found, expected = hashes(record), hashes(pair.whole.parent / "whole.batches")
    assert {stage for stage, _ in found} == {"contrastive", "align", "instruct"}
    assert found.items() <= expected.items()
    lines, wanted = metrics(folder), metrics(pair.whole)
    assert [(line["stage"], line["step"], "loss" in line) for line in lines] == [
        (line["stage"], line["step"], "loss" in line) for line in wanted
    ]
    for line, other in zip(lines, wanted, strict=True):
        name = "loss" if "loss" in line else "validation_loss"
        assert line[name] == pytest.approx(other[name], rel=1e-4), (line["stage"], line["step"])


def rewound(pair: Pair, target: Path, stage: int) -> Path:
    """Copies the whole run as it was before a stage, except its checkpoints of that stage."""
    folder = shutil.copytree(pair.whole, target)
    for i, name in enumerate(STAGES):
        if i >= stage:
            shutil.rmtree(folder / "stages" / f"{i}-{name}")
        if i > stage:
            shutil.rmtree(folder / "checkpoints" / f"{i}-{name}")
    kept = [
        line
        for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        if json.loads(line)["step"] <= stage * STEPS + 3
    ]
    (folder / "metrics.jsonl").write_text("".join(kept))
    return folder


def test_a_truncated_checkpoint_is_passed_over_and_said(pair, tmp_path):
    folder = rewound(pair, tmp_path / "run", stage=2)
    newest = folder / "checkpoints" / "2-align" / "00000006"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    printed = " ".join(start(pair.setting, folder).end(expected=0).split())
    assert "resumed at step 3" in printed
    assert "checkpoint of step 6 not used" in printed and largest.name in printed
    assert_same_end(pair.whole, folder)


def test_sigterm_saves_and_leaves_with_130(pair, tmp_path):
    folder = rewound(pair, tmp_path / "run", stage=3)
    shutil.rmtree(folder / "checkpoints" / "3-instruct")
    before = [line for line in (folder / "metrics.jsonl").open() if json.loads(line)["step"] <= 3 * STEPS]
    (folder / "metrics.jsonl").write_text("".join(before))
    config = tmp_path / "config.py"
    config.write_text(
        "from tiny_runs import experiment, watch_steps\n"
        f"def config():\n    watch_steps(None, 0, ('instruct', 4), {str(tmp_path / 'gate')!r})\n"
        f"    return experiment({pair.setting.mesh})\n"
    )
    command = ["-m", "mllm_jax.cli", "train", str(config), "--run-dir", str(folder)]
    run = start_command(command, pair.setting, folder)
    run.wait_for(lambda lines: lines[-1]["step"] > 3 * STEPS)
    run.process.send_signal(signal.SIGTERM)
    (tmp_path / "gate").touch()
    printed = run.end(expected=130)
    step = metrics(folder)[-1]["step"] - 3 * STEPS
    assert 1 <= step < 6
    assert f"stopped at step {step} of stage instruct" in printed
    assert (folder / "checkpoints" / "3-instruct" / f"{step:08d}" / "manifest.json").is_file()
    printed = start_command(command, pair.setting, folder).end(expected=0)
    assert f"stage instruct: resumed at step {step}" in printed
    assert_same_end(pair.whole, folder)


def test_fresh_removes_what_a_run_writes_and_nothing_else(pair, tmp_path):
    folder = shutil.copytree(pair.whole, tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    (folder / "images").mkdir()
    run = start(pair.setting, folder, fresh=True, pause=PAUSE, hold=("language", 4))
    run.wait_for(lambda lines: 0 < len(lines) < STEPS)
    run.process.kill()
    printed = run.end(expected=-signal.SIGKILL)
    assert "resumed" not in printed
    assert not (folder / "stages").exists() or not list((folder / "stages").iterdir())
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["0-language"]
    lines = metrics(folder)
    assert lines == metrics(pair.whole)[: len(lines)]
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "images").is_dir()


def test_the_kill_points_differ_and_cover_the_stages():
    for seed in range(20):
        points = kill_points(seed)
        assert len(set(points)) == 5 and {stage for stage, _ in points} == {0, 1, 2, 3}
    assert kill_points(1) != kill_points(8)
    assert [stage.name for stage in experiment({"data": 1}).stages] == list(STAGES)
