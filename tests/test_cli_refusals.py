"""The command line's refusals, in one message each, and its help; no model is run here."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import mllm_jax
from mllm_jax.cli import main
from mllm_jax.cli.arguments import check_arguments
from mllm_jax.cli.caches import keep_compiled_programs, lengths_folder
from mllm_jax.cli.commands import COMMANDS
from mllm_jax.errors import ConfigError
from mllm_jax.training.config_file import load_config
from mllm_jax.training.operations.run_folder import open_run

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a folder that looks like a finished run until its parameters are read."""
    experiment = load_config(SMOKE)
    folder = open_run(tmp_path_factory.mktemp("runs") / "run", experiment)
    for index, stage in enumerate(experiment.stages):
        folder.snapshot(index, stage.name).mkdir(parents=True)
    return folder.path


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*.*")}


def check_refusal(code, out: str, err: str) -> str:
    """Checks one message in three parts, no traceback, exit code 2, and on stdout at most the command's first line."""
    assert code == 2, out + err
    assert "Traceback" not in err and re.fullmatch(r"(mllm \w+ [^\n]*\n)?", out), out
    assert err.count("expected: ") == 1 and err.count("to do: ") == 1, err
    return err


# ---- bad input, refused before anything is loaded


def png_of(width: int, height: int) -> bytes:
    """Returns a PNG whose header declares a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_IMAGES = {
    "missing.png": (None, "cannot be read"),
    "text.png": (b"no picture", "cannot be decoded"),
    "empty.png": (b"", "cannot be decoded"),
    "cut.png": ("cut", "cannot be decoded"),
    "huge.png": (png_of(10_000, 10_000), "10000 x 10000 pixels"),
    "vast.png": (png_of(2**31 - 1, 2**31 - 1), "header declares"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_before_the_model_is_loaded(run, tmp_path, capsys, monkeypatch, name):
    content, named = BAD_IMAGES[name]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(tmp_path / "a.png")
    if content == "cut":
        whole = (tmp_path / "a.png").read_bytes()
        content = whole[: len(whole) // 2]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("mllm_jax.generation.assistant.load_run", None)
    images = ["--image", str(tmp_path / "a.png"), "--image", str(tmp_path / name)]
    message = check_refusal(main(["generate", str(run), *images, "What?"]), *capsys.readouterr())
    assert name in message and named in message and "a.png" not in message


def config_file(folder: Path, text: str) -> str:
    (folder / "experiment.py").write_text(text)
    return str(folder / "experiment.py")


REPLACED = "import dataclasses, mllm_jax\nx = dataclasses.replace(mllm_jax.AdamW(), warmup_step=1)\n"
BAD_CONFIGS = {
    "a dict": ("def config():\n    return {}\n", "config() returns dict"),
    "nothing": ("def config():\n    pass\n", "config() returns NoneType"),
    "no function": ("config = 3\n", "without config()"),
    "empty": ("", "without config()"),
    "syntax": ("def config(:\n", "SyntaxError"),
    "import": ("import a_package_of_the_moon\n", "line 1: ModuleNotFoundError: No module named 'a_package_of"),
    "error": ("def config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
    "key": (
        "from mllm_jax import ViTConfig\n\nViTConfig(hiden_size=8)\n",
        "line 3: ViTConfig has no field 'hiden_size'",
    ),
    "key named": ("from mllm_jax import ViTConfig\n\nViTConfig(hiden_size=8)\n", "did you mean 'hidden_size'?"),
    "far key": ("import mllm_jax\nmllm_jax.AdamW(lr=1)\n", "line 2: AdamW has no field 'lr'"),
    "far key named": ("import mllm_jax\nmllm_jax.AdamW(lr=1)\n", "expected: some of learning_rate, warmup_steps, "),
    "replaced key": (REPLACED, "line 2: AdamW has no field 'warmup_step'"),
    "replaced key named": (REPLACED, "did you mean 'warmup_steps'?"),
    "missing key": ("import mllm_jax\nmllm_jax.Stage(name='a')\n", "line 2: TypeError: "),
    "wrong value": ("import mllm_jax\nmllm_jax.Sampling(top_k=-1)\n", "top_k >= 0"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused_with_their_line(tmp_path, capsys, case):
    text, named = BAD_CONFIGS[case]
    message = check_refusal(main(["train", config_file(tmp_path, text)]), *capsys.readouterr())
    assert message.startswith("ConfigError: ") and named in message


def test_a_config_that_was_edited_at_once_is_read_anew(tmp_path):
    """Checks a file of equal length and age, which a cache could take for the previous one."""
    text = SMOKE.read_text()
    names = []
    for name in ("smoke", "smoky"):
        path = Path(config_file(tmp_path, text.replace('name="smoke"', f'name="{name}"')))
        os.utime(path, (1e9, 1e9))
        names.append(load_config(path).name)
    assert names == ["smoke", "smoky"] and not (tmp_path / "__pycache__").exists()


REFUSED = {
    "no command of ours": (["sing", "x"], "see `mllm --help`"),
    "an option first": (["--fresh"], "see `mllm --help`"),
    "no config": (["train"], "without a config"),
    "an option before the config": (["train", "--fresh", str(SMOKE)], "before any option"),
    "an absent config": (["train", "/nowhere/x.py"], "no config at /nowhere/x.py"),
    "a folder as config": (["train", str(ROOT)], "no config at"),
    "an impossible mesh": (["train", str(SMOKE), "--mesh.data", "3", "--run-dir", "{new}"], "mesh {'data': 3,"),
    "two axes that take the rest": (
        ["train", str(SMOKE), "--mesh.fsdp", "-1", "--run-dir", "{new}"],
        "at most one of them -1",
    ),
    "no CPU device": (["train", str(SMOKE), "--cpu-devices", "0", "--run-dir", "{new}"], "cpu_devices 0"),
    "no steps": (["train", str(SMOKE), "--stages.1.steps", "0", "--run-dir", "{new}"], "stage 'contrastive': 0 steps"),
    "sizes that contradict": (
        ["train", str(SMOKE), "--model.inputs.image.projector.output-size", "48", "--run-dir", "{new}"],
        "projector.output_size 48",
    ),
    "planning nothing": (["plan", "--topology", "v5e-4"], "without a config"),
    "an unknown slice": (["plan", str(SMOKE), "--topology", "v5e-250"], "topology 'v5e-250'"),
    "an unknown stage": (["plan", str(SMOKE), "--topology", "8xh100", "--stage", "dance"], "stage 'dance'"),
    "a mesh that the chips do not fill": (
        ["plan", str(SMOKE), "--topology", "8xh100", "--mesh.data", "3"],
        "on 8 device",
    ),
    "a run folder below a file": (["train", str(SMOKE), "--run-dir", str(SMOKE / "x")], "Not a directory"),
    "a run folder of other files": (["train", str(SMOKE), "--run-dir", str(ROOT / "configs")], "and no run"),
    "other files, afresh": (["train", str(SMOKE), "--run-dir", str(ROOT / "configs"), "--fresh"], "and no run"),
    "a broken run": (["train", str(SMOKE), "--run-dir", "{broken}"], "config.json: "),
    "evaluating a broken run": (["evaluate", "{broken}"], "config.json: "),
    "asking a broken run": (["generate", "{broken}", "What?"], "config.json: "),
    "evaluating no run": (["evaluate", "{new}"], "no config.json"),
    "asking nothing": (["generate", "{run}"], "what to ask"),
    "asking no run": (["generate", "{new}", "What?"], "no config.json"),
    "chatting with no run": (["chat", "{new}"], "no config.json"),
    "asking a file": (["generate", str(SMOKE), "What?"], "no config.json"),
    "an unknown task": (["evaluate", "{run}", "--tasks", "naming", "singing"], "tasks ['singing']"),
    "no task": (["evaluate", "{run}", "--tasks"], "some of composition/naming, "),
    "a negative temperature": (["generate", "{run}", "What?", "--temperature", "-1"], "temperature >= 0"),
    "top-p of nothing": (["generate", "{run}", "What?", "--top-p", "0"], "0 < top_p <= 1"),
    "an answer of nothing": (["generate", "{run}", "What?", "--max-new-tokens", "0"], "max_new_tokens 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_message(run, tmp_path, capsys, monkeypatch, case):
    arguments, named = REFUSED[case]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"class": ')
    places = {"{run}": str(run), "{broken}": str(tmp_path / "broken"), "{new}": str(tmp_path / "new")}
    monkeypatch.chdir(tmp_path)
    before = files(run), files(ROOT / "configs")
    message = check_refusal(main([places.get(a, a) for a in arguments]), *capsys.readouterr())
    assert named in message
    assert (files(run), files(ROOT / "configs")) == before
    assert not (tmp_path / "new").exists() and not (tmp_path / "runs").exists(), "a folder is left"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", str(SMOKE), "--stages.0.stps", "3"], "--stages.0.steps"),
        (["train", str(SMOKE), "--stages.0.steps", "many"], "invalid literal"),
        (["evaluate", "run", "--task", "naming"], "--tasks"),
        (["evaluate"], "a folder that `mllm train` made"),
        (["generate", "run", "What?", "--picture", "a.png"], "--picture"),
    ],
)
def test_unknown_and_missing_options_are_reported(capsys, arguments, named):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and re.fullmatch(r"(mllm \w+ [^\n]*\n)?", out)
    assert named in err and "Traceback" not in err


def test_a_failing_disk_or_file_elsewhere_is_one_message(capsys, monkeypatch):
    def fail(arguments):
        raise OSError(28, "No space left on device", "/x")

    monkeypatch.setattr("mllm_jax.cli.evaluate.run", fail)
    assert "No space left on device: '/x'" in check_refusal(main(["evaluate"]), *capsys.readouterr())


def test_an_interruption_is_no_traceback_and_a_bug_is_one(capsys, monkeypatch):
    def fail(arguments):
        raise KeyboardInterrupt if arguments else ZeroDivisionError

    monkeypatch.setattr("mllm_jax.cli.evaluate.run", fail)
    assert main(["evaluate", "run"]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        main(["evaluate"])


# ---- help


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(capsys, arguments):
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(f"mllm {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("command, option", [("train", "--run-dir"), ("plan", "--topology")])
def test_help_says_that_the_config_brings_the_options(capsys, command, option):
    for flag in ("-h", "--help"):
        assert main([command, flag]) == 0
        out, err = capsys.readouterr()
        assert err == "" and "Name a config" in out and option in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["train", str(SMOKE), "--help-all"],
            ("--run-dir", "--fresh", "--stages.3.optimizer.learning-rate", "--mesh.fsdp"),
        ),
        (["plan", str(SMOKE), "--help-all"], ("--topology", "--stage", "--search", "--json", "--mesh.fsdp")),
        (["evaluate", "--help"], ("--tasks", "PATH")),
        (["generate", "--help"], ("--image", "--temperature", "--top-k", "--seed", "--max-new-tokens", "default: 256")),
    ],
)
def test_help_lists_the_options(capsys, arguments, named):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    words = " ".join(out.replace("│", " ").split())  # wherever a line breaks
    assert stop.value.code == 0 and err == "" and all(option in words for option in named)


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize(
    ("command", "config", "named"),
    [
        ("train", "quickstart.py", ("--run-dir DIR", "--fresh", "--stages.N.steps", "4 instruct  ", "--cpu-devices 2")),
        ("train", "qwen25vl_7b.py", ("--no-compile-cache", "0 instruct", "--model.compute.dtype bfloat16", "--seed 0")),
        ("plan", "smoke.py", ("--topology TOPOLOGY", "--stages.N.data.rows", "--model.llm.hidden-size 32")),
    ],
)
def test_the_help_of_a_config_fits_a_screen(capsys, command, config, named, option):
    assert main([command, str(ROOT / "configs" / config), option]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(text in out for text in named) and "--help-all" in out
    assert len(out.splitlines()) <= 40 and max(map(len, out.splitlines())) <= 100


def test_the_help_of_a_word_lists_the_fields_with_it(capsys):
    assert main(["train", str(SMOKE), "--help-all", "learning_rate"]) == 0
    rates = capsys.readouterr().out.splitlines()
    assert [line.split() for line in rates] == [[f"--stages.{i}.optimizer.learning-rate", "0.001"] for i in range(4)]
    assert main(["train", str(SMOKE), "--help-all", "compute.remat"]) == 0
    out = capsys.readouterr().out
    assert "--model.compute.remat REMAT" in out and "--model.llm.compute.remat" in out
    assert out.count("recomputed in the backward pass") == 1, "said once"
    named = "--help-all singing: no field's name contains it"
    assert named in check_refusal(main(["train", str(SMOKE), "--help-all", "singing"]), *capsys.readouterr())


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version(capsys, option):
    assert main([option]) == 0
    assert capsys.readouterr() == (f"mllm_jax {mllm_jax.__version__}\n", "")


def test_a_run_folder_stands_for_its_config(run, capsys):
    assert main(["train", str(run), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"--run-dir {run}" in out and "instruct" in out


# ---- before anything is loaded


def test_every_command_prints_something_before_it_loads_for_seconds():
    """Checks the first line of each command, and the libraries that were loaded when it was printed."""
    code = """
import contextlib, io, json, sys, types
from mllm_jax.cli import commands, main

def load(name):
    print([name for name in ("jax", "flax", "tyro", "numpy", "rich", "transformers") if name in sys.modules])
    return types.SimpleNamespace(run=lambda arguments: 0)

class Terminal(io.StringIO):
    def isatty(self):
        return True

commands.importlib = types.SimpleNamespace(import_module=load)
found = {}
for name in commands.COMMANDS:
    for stderr in (Terminal(), io.StringIO()):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(stderr):
            assert main([name, "THIS"]) == 0
        found.setdefault(name, []).append([out.getvalue(), stderr.getvalue()])
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == COMMANDS.keys()
    for name, doing in COMMANDS.items():
        (out, terminal), (piped, err) = found[name]
        first = f"mllm {name} THIS: {doing}\n" if doing else ""
        if name in ("generate", "transcribe", "chat"):  # their output is answers
            assert (out, terminal, piped, err) == ("[]\n", first, "[]\n", "")
        else:
            assert (out, terminal, piped, err) == (f"{first}[]\n", "", f"{first}[]\n", "")
    assert [name for name, doing in COMMANDS.items() if not doing] == ["models"], "which loads little itself"


UNUSABLE = {
    "a bucket to train in": ["train", str(SMOKE), "--run-dir", "gs://bucket/run"],
    "spelt in one word": ["train", str(SMOKE), "--run_dir=gs://bucket/run"],
    "another bucket": ["train", str(SMOKE), "--fresh", "--run-dir", "s3://bucket/run"],
    "a bucket after a flag": ["convert", "--overwrite", "hdfs://node/model", "out"],
    "a bucket to evaluate": ["evaluate", "gs://bucket/run"],
    "a bucket to ask": ["generate", "gs://bucket/run", "What?"],
    "an image from a bucket": ["generate", "run", "--image", "gs://bucket/a.png", "What?"],
    "a bucket to write": ["convert", "model", "gs://bucket/model"],
    "images from a bucket": ["embed", "model", "--images", "a.png", "https://host/b.png", "--out", "x.npz"],
    "a NUL byte": ["generate", "run", "Wh\0at?"],
    "a NUL byte in a name": ["train", "a\0.py"],
    "no UTF-8": ["generate", "run", os.fsdecode(b"\xff")],
    "no UTF-8 in a text": ["embed", "model", "--text", os.fsdecode(b"\xff"), "--out", "x.npz"],
    "no UTF-8 in a command": [os.fsdecode(b"\xff")],
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_no_command_can_use_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch, case):
    monkeypatch.setattr("mllm_jax.cli.commands.importlib.import_module", None)
    monkeypatch.chdir(tmp_path)
    out, err = main(UNUSABLE[case]), capsys.readouterr()
    message = check_refusal(out, *err)
    assert message.startswith("ConfigError: ") and err.out == "" and not list(tmp_path.iterdir())


def test_addresses_are_words_where_words_are_asked_for():
    check_arguments(["generate", "run", "--image", "a.png", "https://host/what"])
    check_arguments(["embed", "model", "--text", "gs://a", "s3://b", "--out", "x.npz"])
    check_arguments(["chat", "model", "--system", "gs://a"])
    check_arguments(["train", "c.py", "--stages.0.data.sources.0.source.folder", "gs://a"])


def test_a_composed_run_is_not_converted(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mllm_jax.models.run_weights.load_run", None)
    message = check_refusal(main(["convert", str(run), str(tmp_path / "out")]), *capsys.readouterr())
    assert "composed here" in message and f"mllm generate {run}" in message and not list(tmp_path.iterdir())


def test_a_reader_that_has_read_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "mllm_jax.cli", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_home_that_cannot_be_written_costs_only_what_would_be_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "MLLM_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    before = jax.config.jax_compilation_cache_dir
    try:
        keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert lengths_folder() is None
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("warning: compiled programs are not kept: ")
    monkeypatch.setenv("MLLM_DATA_DIR", str(tmp_path))
    assert lengths_folder() == tmp_path / "mllm_jax_lengths"


def test_every_refusal_has_three_parts():
    with pytest.raises(ConfigError) as refusal:
        load_config(Path("/nowhere/x.py"))
    assert str(refusal.value).splitlines()[1:] == [
        "  expected: a Python file with `def config() -> Experiment`",
        "  to do:    check the path",
    ]
