"""The command line end to end: a tiny run is trained, continued, evaluated, asked, damaged and repaired."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from no_torch import hide_torch
from PIL import Image

from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.cli import main
from mllm_jax.sharding.platform import may_have_accelerator
from mllm_jax.training.config_file import load_config

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke.py"
CUT_OFF = "(cut off after 256 tokens; --max-new-tokens allows more)\n"
TOY = "toy size: at most 8 questions a task, so these accuracies mean little"
STAGES = ("language", "contrastive", "align", "instruct")
MADE = {
    *("config.json", "processor", "run.json", "metrics.jsonl", "tensorboard", "stages", "checkpoints"),
    *("results.json", "examples.json", "predictions.jsonl", "report.html", "goodput.json", "initial", ".mllm_run"),
}
# Runs commands in one process: [exit code, stdout, stderr] of each.
PRELUDE = """
import contextlib, dataclasses, errno, io, json, sys
from mllm_jax.cli import main

def mllm(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
    return [code, out.getvalue(), err.getvalue()]

"""


# For code that imports jax before a command hides what XLA logs.
QUIET = 'import os; os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"\n'


class Machine:
    """Processes of Python with one device, one cache of compiled programs and data prepared only for them."""

    def __init__(self, folder: Path):
        self.folder = folder
        # The process picks the platform without a message, although libtpu is installed; transformers finds no PyTorch.
        quiet = {} if may_have_accelerator(os.environ, Path("/dev"), ()) else {"JAX_PLATFORMS": None}
        quiet["TF_CPP_MIN_LOG_LEVEL"] = None  # jax, imported here, has set it; a shell has not
        emitters = [flag for flag in os.environ["XLA_FLAGS"].split() if "emitters" in flag]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(hide_torch(folder / "hidden")), str(ROOT)]),
            "MLLM_DATA_DIR": str(folder / "data"),
            # Otherwise the compiler would take most of the time.
            "XLA_FLAGS": " ".join(
                ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true", *emitters]
            ),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.environment = {name: x for name, x in (self.environment | quiet).items() if x is not None}

    def call(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def run(self, code: str, before: str = ""):
        """Returns `result` of `code`, which can call `mllm(*arguments)` and must print nothing itself.

        Args:
            before: what is done before all imports.
        """
        done = self.call("-c", before + PRELUDE + code + "\nprint(json.dumps(result))")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == "", "noise"
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def trained(machine):
    """Returns the run folder and the process that trained it as a user does, on a machine without data."""
    folder = machine.folder / "run"
    done = machine.call("-m", "mllm_jax.cli", "train", SMOKE, "--run-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(folder / "a.png")
    Image.new("L", (16, 16), 128).save(folder / "b.png")
    return folder


def values_of(metrics: str) -> list[dict]:
    """Returns the lines of metrics.jsonl without the values that differ between runs."""
    found = [json.loads(line) for line in metrics.splitlines()]
    return [{name: value for name, value in line.items() if name != "timing"} for line in found]


def values(folder: Path) -> list[dict]:
    return values_of((folder / "metrics.jsonl").read_text())


def files(folder: Path, *under: str) -> dict[Path, tuple[int, int]]:
    """Returns every file but the lock, which each start writes."""
    found = [p for name in under for p in (folder / name).rglob("*") if p.name != ".mllm_run"]
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in found}


# ---- a run and its commands


def test_train_leaves_everything_in_the_run_folder(trained):
    folder, done = trained
    assert {p.name for p in folder.iterdir()} == MADE
    assert RunFolder(folder).experiment() == load_config(SMOKE)
    assert [p.name for p in sorted((folder / "stages").iterdir())] == [f"{i}-{s}" for i, s in enumerate(STAGES)]
    train = [line for line in values(folder) if "loss" in line]
    assert [(line["step"], line["stage"]) for line in train] == [(k + 1, STAGES[k // 8]) for k in range(32)]
    assert list((folder / "tensorboard").glob("events*"))
    facts = json.loads((folder / "run.json").read_text())
    assert [stage["name"] for stage in facts["stages"]] == list(STAGES)
    for stage, share in zip(STAGES, ("llm", "encoder_image", "projector_image", "llm"), strict=True):
        assert f"stage {stage}: trainable" in done.stdout and share in facts["parameters"]


def test_results_put_every_accuracy_beside_its_controls(trained):
    folder, done = trained
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == [task.name for task in load_config(SMOKE).evaluation]
    assert {"composition/naming", "composition/yes_no", "unseen/skin_tone", "unseen/category"} <= results.keys()
    for task, found in results.items():
        assert set(found) == {"accuracy", "accuracy_shuffled_media", "majority", "n"}
        assert found["n"] == 8 and all(0 <= value <= 1 for name, value in found.items() if name != "n")
        kind = task.rpartition("/")[2]
        assert re.search(rf"│ {kind} ", done.stdout), f"{kind} is cut off in the table"


def test_the_report_shows_24_images_with_their_answers(trained):
    folder, _ = trained
    examples = json.loads((folder / "examples.json").read_text())
    assert {example["task"] for example in examples} == set(json.loads((folder / "results.json").read_text()))
    assert all(e["image_png_base64"] and e["question"] and e["reference"] for e in examples)
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 24 and "http://" not in report.replace("http://www.w3.org", "")


def test_a_normal_run_prints_nothing_on_stderr(trained):
    """Checks a machine's first run, which prepares the data; on stdout are only the library's own lines."""
    _, done = trained
    assert done.stderr == ""
    names = "|".join(STAGES)
    lines_of = rf"\d+ CPU device\(s\) on|stage ({names})[:,] |({names})  \d+/8  loss|[┏┃┡│├└]|/.*report\.html$"
    printed = re.compile(lines_of)
    first, *lines, toy, report, following = done.stdout.splitlines()
    assert first.startswith(f"mllm train {SMOKE}: ") and toy == TOY
    assert report == f"{trained[0]}/report.html" and following.startswith(f"next: mllm generate {trained[0]} --image ")
    assert not [line for line in lines if not printed.match(line)]


def test_the_same_command_again_trains_nothing_more(machine, trained):
    folder, _ = trained
    kept = ("stages", "checkpoints", "tensorboard", "config.json", "metrics.jsonl")
    before, results, metrics = files(folder, *kept), (folder / "results.json").read_bytes(), values(folder)
    # A run's folder is a name of the config in it.
    commands = [["train", str(SMOKE), "--run-dir", str(folder)], ["train", str(folder)]]
    for code, out, err in machine.run(f"result = [mllm(*command) for command in {commands!r}]"):
        first, _, done, *_ = out.splitlines()  # the second line is that of the devices
        assert (code, err) == (0, "") and first.startswith("mllm train ") and "tokens/s" not in out
        assert done == f"nothing to train: all stages of {folder} are done"
    assert files(folder, *kept) == before and values(folder) == metrics
    assert (folder / "results.json").read_bytes() == results, "the same parameters give other answers"
    assert {p.name for p in folder.iterdir()} == MADE
    assert len(json.loads((folder / "run.json").read_text())["stages"]) == 4


def test_another_config_on_the_same_folder_is_refused(trained, capsys):
    folder, _ = trained
    before = files(folder, ".")
    code = main(["train", str(SMOKE), "--run-dir", str(folder), "--stages.0.steps", "3", "--seed", "7"])
    out, message = capsys.readouterr()
    assert code == 2 and out.count("\n") == 1 and message.count("to do: ") == 1
    assert "stages.0.steps: 8 -> 3" in message and "seed: 0 -> 7" in message and "--fresh" in message
    assert files(folder, ".") == before


def test_evaluation_of_some_tasks_keeps_the_others_and_depends_on_no_batch_size(machine, trained):
    folder, copy = trained[0], machine.folder / "evaluated"
    shutil.copytree(folder, copy)
    code, small = machine.run(
        f"""
from mllm_jax.evaluation.run import evaluate_run
printed = mllm("evaluate", {str(copy)!r}, "--tasks", "naming", "scene3_count")
small = evaluate_run({str(copy)!r}, tasks=["naming", "scene3_count"], batch_size=8)
result = [printed, small]""",
        QUIET,
    )
    assert code[0] == 0 and code[2] == "" and code[1].endswith(f"{copy}/report.html\n")
    assert "naming" in code[1] and "scene3_count" in code[1] and "yes_no" not in code[1]
    kinds = ("naming", "scene3_count")
    assert list(small) == [f"{split}/{kind}" for split in ("composition", "unseen") for kind in kinds]
    for name in ("results.json", "examples.json", "predictions.jsonl"):
        assert (copy / name).read_text() == (folder / name).read_text(), f"64 rows a batch and 8 differ in {name}"


def test_generate_answers(machine, trained, image_folder):
    folder, a, b = trained[0], image_folder / "a.png", image_folder / "b.png"
    asked = {
        "greedy": [a],
        "the likeliest of one": [a, "--temperature 5 --top-k 1"],
        "two": [a, b, "--temperature 1"],
        "none": ["--temperature 1"],
        "sampled": [a, "--temperature 1 --top-k 50 --seed 1"],
        "short": [a, "--temperature 1 --top-k 50 --seed 1 --max-new-tokens 6"],
        "another seed": [a, "--temperature 1 --top-k 50 --seed 2"],
    }
    commands = {}
    for name, parts in asked.items():
        options = [word for part in parts if isinstance(part, str) for word in part.split()]
        images = [word for part in parts if isinstance(part, Path) for word in ("--image", str(part))]
        commands[name] = [str(folder), *images, "What is this?", *options]
    printed = machine.run(f"result = {{n: mllm('generate', *c) for n, c in {commands!r}.items()}}")
    assert all(code == 0 and out.endswith("\n") for code, out, _ in printed.values()), printed
    assert printed["short"][2] == "(cut off after 6 tokens; --max-new-tokens allows more)\n"
    assert {err for name, (_, _, err) in printed.items() if name != "short"} <= {"", CUT_OFF}, printed
    # After 32 steps the likeliest answer may be empty, but a sampled one is not.
    said = {name: out.strip() for name, (_, out, _) in printed.items()}
    assert said["the likeliest of one"] == said["greedy"] != said["sampled"] != said["another seed"]
    assert said["two"] and said["none"]
    assert 1 < len(said["short"]) < len(said["sampled"])
    # Except its last letter, whose bytes may be cut.
    assert said["sampled"].startswith(said["short"][:-1]), "a seed does not repeat its answer"


def test_chat_talks_about_images_from_a_pipe(machine, trained, image_folder):
    folder, a = trained[0], image_folder / "a.png"
    lines = f"/image {image_folder / 'absent.png'}\n/image {a}\nWhat is this?\n/reset\nWhat is this?\n"
    chat, about, alone = machine.run(
        f"""
how = ("--max-new-tokens", 24, "--temperature", 1, "--top-k", 50, "--seed", 1)
sys.stdin = io.StringIO({lines!r})
result = [mllm("chat", {str(folder)!r}, *how)]
result += [mllm("generate", {str(folder)!r}, *image, "What is this?", *how) for image in (["--image", {str(a)!r}], [])]
"""
    )
    note = "[cut off; --max-new-tokens allows more]\n"
    assert chat[0] == about[0] == alone[0] == 0 and chat[2] == "", chat
    refusal, answers = chat[1].split(f"{about[1].strip()}\n", 1)
    assert "absent.png" in refusal and refusal.count("to do: ") == 1 and "> " not in chat[1]
    assert answers.replace(note, "").strip() == alone[1].strip() != about[1].strip()


# ---- full disks, other settings, damage


def test_a_disk_that_is_full_while_saving_costs_no_finished_checkpoint(machine, trained):
    folder, short = machine.folder / "full", machine.folder / "short.py"
    short.write_text(
        f"""
import dataclasses, runpy
from mllm_jax.training.config import TokenizerConfig

def config():
    smoke = runpy.run_path({str(SMOKE)!r})["config"]()
    tokenizer = TokenizerConfig(512, path={str(trained[0] / "processor" / "tokenizer.json")!r})
    return dataclasses.replace(smoke, stages=smoke.stages[:1], tokenizer=tokenizer, evaluation=())
"""
    )
    printed = machine.run(
        f"""
from pathlib import Path
from mllm_jax.checkpoints import folder

run = Path({str(folder)!r})
result = []

def train(*options):
    printed = mllm("train", {str(short)!r}, "--run-dir", run, *options)
    kept = sorted(p.name for p in (run / "checkpoints" / "0-language").iterdir())
    result.append([*printed, kept, (run / "metrics.jsonl").read_text()])

def full(real, after):
    calls = iter(range(after))
    def work(*args):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)
    return work

# In the background, while it is being written: the first weights and step 3 are saved, step 6 is not.
seal, folder._seal = folder._seal, full(folder._seal, 2)
train()
folder._seal = seal
# Before it begins, because there is too little room.
free, folder.free_bytes = folder.free_bytes, lambda path: 1000
train()
folder.free_bytes = free
train()
# The newest checkpoint is cut in half, and the stage's end was not reached.
(run / "stages" / "0-language").rename(run.parent / "aside")
newest = max((p for p in (run / "checkpoints/0-language/00000008/arrays").rglob("*") if p.is_file()),
             key=lambda p: p.stat().st_size)
newest.write_bytes(newest.read_bytes()[:100])
train()
train("--stages.0.steps", 3)
train("--stages.0.steps", 3, "--fresh")
""",
        QUIET,
    )
    in_background, before, done, cut, refused, fresh = printed
    for code, _, err, kept, _ in (in_background, before):
        assert code == 2 and err.count("to do: ") == 1 and "CheckpointError" in err and "Traceback" not in err
        assert kept == ["00000003"], "the finished checkpoint is gone, or half a one is left"
        assert "the checkpoints before it are untouched" in err
    assert "No space left on device" in in_background[2] and "1,000 bytes" in before[2]
    assert "resumed at step 3" in before[1] and "resumed at step 3" in done[1]
    assert done[0] == 0 and done[2] == "" and done[3] == ["00000006", "00000008"]
    whole = [line for line in values(trained[0]) if line["stage"] == "language"]
    for _, _, _, _, metrics in (done, cut):
        assert values_of(metrics) == whole, "not what the run gives that no disk disturbed"
    assert cut[2].startswith("warning: checkpoint of step 8 not used: ") and cut[2].count("\n") == 1
    assert cut[0] == 0 and "checkpoint of step 8 not used" in cut[1] and "resumed at step 6" in cut[1]
    assert refused[0] == 2 and "stages.0.steps: 8 -> 3" in refused[2]
    assert fresh[0] == 0 and "resumed" not in fresh[1] and "3/3" in fresh[1] and fresh[3] == ["00000003"]
    assert [line["step"] for line in values_of(fresh[4])] == [1, 2, 3]
    assert RunFolder(folder).experiment().stages[0].steps == 3


def test_after_damage_the_message_names_what_is_damaged(machine, trained):
    folder = machine.folder / "damaged"
    shutil.copytree(trained[0], folder)
    arrays = RunFolder(folder).snapshot(3, "instruct") / "arrays"
    victim = max((p for p in arrays.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    unfinished = machine.folder / "unfinished"
    shutil.copytree(trained[0], unfinished)
    for stage in ("2-align", "3-instruct"):
        shutil.rmtree(unfinished / "stages" / stage)
    begun = machine.folder / "begun"
    shutil.copytree(unfinished, begun)
    shutil.rmtree(begun / "stages")
    printed = machine.run(
        f"""
folder, unfinished = {str(folder)!r}, {str(unfinished)!r}
result = [mllm("evaluate", folder), mllm("train", {str(SMOKE)!r}, "--run-dir", folder)]
result += [mllm("generate", unfinished, "What is this?"), mllm("generate", {str(begun)!r}, "What is this?")]
"""
    )
    for code, _, err in printed[:2]:
        assert code == 2 and "3-instruct" in err and "is corrupt" in err and err.count("to do: ") == 1
    code, out, err = printed[2]
    warning = f"warning: {unfinished} is trained in part: stage align, instruct has not ended\n"
    assert code == 0 and err.removesuffix(CUT_OFF) == warning and out
    assert printed[3][0] == 2 and "no stage is finished" in printed[3][2] and printed[3][2].count("to do: ") == 1
