"""Checks of launch/ for clusters without a cluster: schema, syntax, dry runs, refusals."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mllm_jax.planning import topologies

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ("launch/slurm.sbatch", "launch/tpu_vm.sh", ".ci/run")
GKE = ("--name", "big", "--image", "registry/mllm:1", "--dry-run")

# Fields of jobset.x-k8s.io/v1alpha2 (CRD of JobSet), and of the Job and Pod in it that the manifest uses.
JOBSET = {"replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "coordinator"}
FAILURE = {"maxRestarts", "restartStrategy", "rules"}
NETWORK = {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"}
REPLICATED = {"name", "replicas", "template", "dependsOn", "groupName"}
JOB = {"parallelism", "completions", "completionMode", "backoffLimit", "podFailurePolicy", "template"}
POD = {"restartPolicy", "terminationGracePeriodSeconds", "nodeSelector", "containers", "volumes"}


def call(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=60)


def gke(*arguments: str) -> subprocess.CompletedProcess[str]:
    return call(sys.executable, "launch/gke.py", *GKE, *arguments)


def manifest(*arguments: str) -> dict:
    done = gke(*arguments)
    assert done.returncode == 0, done.stderr
    (found,) = yaml.safe_load_all(done.stdout)
    return found


@pytest.fixture(scope="module")
def two_slices() -> dict:
    return manifest(
        "--tpu", "v5p", "--topology", "4x4x8", "--slices", "2", "--", "train", "configs/smoke.py", "--x=a b"
    )


def test_the_jobset_has_what_its_schema_asks_for_and_nothing_else(two_slices):
    assert (two_slices["apiVersion"], two_slices["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = two_slices["spec"]
    assert set(spec) <= JOBSET and set(spec["failurePolicy"]) <= FAILURE and set(spec["network"]) <= NETWORK
    for rule in spec["failurePolicy"]["rules"]:
        assert set(rule) == {"name", "action", "onJobFailureReasons"}
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (group,) = spec["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    assert set(group) <= REPLICATED and set(job) <= JOB and set(pod) <= POD
    # A pod failure policy needs pods that are not restarted in place, an index needs indexed completion.
    assert (pod["restartPolicy"], job["completionMode"], job["backoffLimit"]) == ("Never", "Indexed", 0)
    (container,) = pod["containers"]
    (policy,) = job["podFailurePolicy"]["rules"]
    assert policy["action"] == "FailJob" and policy["onExitCodes"]["containerName"] == container["name"]
    assert policy["onExitCodes"] | {"containerName": ""} == {"containerName": "", "operator": "In", "values": [2]}
    mounts, volumes = ({v["name"] for v in x} for x in (container["volumeMounts"], pod["volumes"]))
    assert mounts == volumes


def test_slices_hosts_and_chips_follow_from_the_topology(two_slices):
    (group,) = two_slices["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    assert (group["replicas"], job["parallelism"], job["completions"]) == (2, 32, 32)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
    }
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": 4}


def test_the_command_reaches_mllm_word_by_word(two_slices):
    container = two_slices["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["train", "configs/smoke.py", "--x=a b", "--run-dir", "/shared/runs/big"]
    assert container["image"] == "registry/mllm:1"
    given = manifest(
        "--tpu", "v5e", "--topology", "4x4", "--", "train", "configs/smoke.py", "--run-dir", "/shared/other"
    )
    container = given["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["train", "configs/smoke.py", "--run-dir", "/shared/other"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tpu", "v5e", "--topology", "4x4x4", "--", "train", "c.py"),
        ("--tpu", "v5p", "--topology", "16x16", "--", "train", "c.py"),
        ("--tpu", "v5e", "--topology", "1x2", "--", "train", "c.py"),
        ("--tpu", "v5e", "--topology", "16x17", "--", "train", "c.py"),
        ("--tpu", "v6e", "--topology", "16x32", "--", "train", "c.py"),
        ("--tpu", "v5p", "--topology", "8x4x4", "--", "train", "c.py"),
        ("--tpu", "v4", "--topology", "4x4x6", "--", "train", "c.py"),
        ("--tpu", "v5e", "--topology", "big", "--", "train", "c.py"),
        ("--tpu", "v5e", "--topology", "4x4", "--slices", "0", "--", "train", "c.py"),
        ("--tpu", "v5e", "--topology", "4x4", "--name", "Big_1", "--", "train", "c.py"),
        ("--tpu", "v5e", "--topology", "4x4", "--", "evaluate", "run"),
        ("--tpu", "v5e", "--topology", "4x4"),
    ],
)
def test_gke_refuses_what_cannot_be(arguments):
    done = gke(*arguments)
    assert done.returncode == 2 and not done.stdout and "error: " in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("--run-dir", "gs://bucket/run"),
        ("--run-dir=gs://bucket/run",),
        ("--stages.0.data.path", "s3://bucket/records.json"),
    ],
)
def test_gke_refuses_a_bucket_where_a_mounted_disk_is_needed(words):
    done = gke("--tpu", "v5e", "--topology", "4x4", "--", "train", "c.py", *words)
    assert done.returncode == 2 and not done.stdout
    assert "://bucket" in done.stderr and "name a folder under /shared" in done.stderr


@pytest.mark.parametrize("words", [("--run-dir", "runs/x"), ("--run-dir=/tmp/x",), ("--run-dir",)])
def test_gke_refuses_a_run_folder_of_one_host(words):
    done = gke("--tpu", "v5e", "--topology", "4x4", "--", "train", "c.py", *words)
    assert done.returncode == 2 and "a folder of one host only" in done.stderr


def test_gke_knows_every_slice_that_the_planner_knows():
    spec = importlib.util.spec_from_file_location("gke", LAUNCH / "gke.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    for generation, shapes in topologies._SHAPES.items():
        for shape in shapes.values():
            options = argparse.Namespace(
                name="x", image="x", claim="x", slices=1, restarts=0, grace=1, tpu=generation, topology=shape
            )
            if math.prod(map(int, shape.split("x"))) >= module.CHIPS_A_HOST:
                assert shape in module.manifest(options, ["train", "c.py"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound_bash(script):
    done = call("bash", "-n", script)
    assert done.returncode == 0, done.stderr


def test_shellcheck_finds_nothing(require_asset):
    check = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    require_asset(check, "shellcheck, of the test extra")
    done = call(check, *SCRIPTS)
    assert done.returncode == 0, done.stdout


def test_slurm_prints_its_command_and_refuses_nothing_to_train():
    done = call("bash", "launch/slurm.sbatch", "configs/smoke.py", "--run-dir", "/shared/a b", DRY_RUN="1")
    assert done.stdout.split(" mllm ")[1].strip() == r"train configs/smoke.py --run-dir /shared/a\ b"
    assert done.stdout.startswith("srun --kill-on-bad-exit=1 ")
    done = call("bash", "launch/slurm.sbatch")
    assert done.returncode == 2 and "to do:" in done.stderr


FAKE = {
    "srun": 'echo "srun $*" >> "$CALLS"; n=$(wc -l < "$CALLS"); set -- $CODES; exit "${!n}"',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"',
}


@pytest.mark.parametrize(
    ("codes", "calls", "code"),
    [("0", 1, 0), ("2", 1, 2), ("3 250 0", 3, 0), ("3 3 3", 3, 3), ("3 130", 3, 0)],
)
def test_slurm_starts_again_after_failures_only(tmp_path, codes, calls, code):
    """Checks the loop around srun with fake programs in its place."""
    for name, body in FAKE.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "calls"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "CALLS": str(log), "CODES": codes, "RESTARTS": "2", "SLURM_JOB_ID": "17"}
    done = call("bash", "launch/slurm.sbatch", "configs/smoke.py", **settings)
    lines = log.read_text().splitlines()
    assert (done.returncode, len(lines)) == (code, calls), done.stderr
    assert ("scontrol requeue 17" in lines) == ("130" in codes)


def tpu_vm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return call("bash", "launch/tpu_vm.sh", *arguments)


def test_tpu_vm_prints_its_commands():
    one = tpu_vm("create", "--dry-run", "big", "--tpu", "v5litepod-256", "--zone", "z").stdout
    assert "--accelerator-type v5litepod-256 --runtime-version v2-alpha-tpuv5-lite --node-id big-0" in one
    two = tpu_vm("create", "--dry-run", "big", "--tpu", "v5p-128", "--zone", "z", "--slices", "2", "--spot").stdout
    assert "--node-count 2 --node-prefix big --spot" in two
    install = tpu_vm("install", "--dry-run", "big", "--zone", "z", "--nfs", "10.0.0.2:/share").stdout
    assert "scp --recurse" in install and r"mount\ -t\ nfs\ 10.0.0.2:/share\ /shared" in install
    train = tpu_vm("train", "--dry-run", "big", "--zone", "z", "--slices", "2", "--", "configs/smoke.py", "--x=a b")
    lines = sorted(train.stdout.splitlines())
    assert [f"big-{i} --zone z --worker=all" in line for i, line in enumerate(lines)] == [True, True]
    assert "--run-dir" in lines[0] and "/shared/runs/big" in lines[0]
    assert "delete big --zone z" in tpu_vm("delete", "--dry-run", "big", "--zone", "z").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("start", "big"),
        ("create", "big"),
        ("create", "--dry-run", "big", "--zone", "z", "--tpu", "v9"),
        ("install", "--dry-run", "big", "--zone", "z"),
        ("train", "--dry-run", "big", "--zone", "z"),
        ("train", "--dry-run", "big", "other", "--zone", "z", "--", "c.py"),
        ("create", "--dry-run", "big", "--zone", "z", "--slices", "many"),
        ("create", "--dry-run", "big", "--zone", "z", "--what"),
    ],
)
def test_tpu_vm_refuses_what_cannot_be(arguments):
    done = tpu_vm(*arguments)
    assert done.returncode == 2 and "expected:" in done.stderr


def test_the_image_holds_what_the_package_is_built_from():
    copied = [
        line.split()[1:-1] for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line.startswith("COPY")
    ]
    names = {name for line in copied for name in line}
    assert {"pyproject.toml", "README.md", "LICENSE", "mllm_jax", "configs"} <= names
    assert all((ROOT / name).exists() for name in names)
