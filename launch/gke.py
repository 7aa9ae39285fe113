#!/usr/bin/env python3
"""Submits a training job to TPU slices of a GKE cluster, from launch/jobset.yaml.

    python launch/gke.py --name align --tpu v5e --topology 16x16 --image IMAGE -- train configs/llava15_7b.py
    python launch/gke.py --name big --tpu v5p --topology 4x4x8 --slices 2 --image IMAGE --dry-run -- train CONFIG

The arguments after -- are those of mllm; `--run-dir /shared/runs/NAME` is added if it is missing. Several slices are
joined by the data centre's network: give the mesh data=<slices> or a multiple of it. The claim is a volume that many
hosts mount for writing, with atomic renames of folders, such as Filestore. A bucket without a hierarchical namespace
has none.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from string import Template

# GKE's names; hosts of multi-host slices have four chips each.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "v7x": "tpu7x",
}
DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "v7x": 3}
# The existing slices: of two dimensions these; of three these, and others whose sides are multiples of 4.
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
CHIPS_A_HOST = 4


def main(arguments: list[str] | None = None) -> int:
    about = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description=about[0], epilog=about[2])
    parser.add_argument("--name", required=True, help="name of the job: lower case, digits and hyphens")
    parser.add_argument("--tpu", required=True, choices=sorted(ACCELERATORS))
    parser.add_argument("--topology", required=True, help="chips of one slice, such as 16x16 or 4x4x8")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--image", required=True)
    parser.add_argument("--claim", default="shared", help="PersistentVolumeClaim, mounted at /shared (default: shared)")
    parser.add_argument("--restarts", type=int, default=100, help="restarts after a lost host (default: 100)")
    parser.add_argument("--grace", type=int, default=120, help="seconds to save after a notice (default: 120)")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest and submit nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and mllm's arguments")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if command[:1] != ["train"]:
        parser.error("give mllm's arguments after --, such as: -- train configs/llava15_7b.py")
    try:
        text = manifest(options, command)
    except ValueError as error:
        parser.error(str(error))
    if options.dry_run:
        print(text)
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode


def manifest(options: argparse.Namespace, command: list[str]) -> str:
    """Returns the filled-in manifest. Raises ValueError for an impossible name, topology or number."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        raise ValueError(f"--name {options.name}: lower case letters, digits and hyphens, 40 at most, a letter first")
    if not re.fullmatch(r"\d+(x\d+){1,2}", options.topology):
        raise ValueError(f"--topology {options.topology}: chips along each side, such as 4x4 or 4x4x4")
    sides = [int(side) for side in options.topology.split("x")]
    if len(sides) != DIMENSIONS[options.tpu]:
        raise ValueError(f"--topology {options.topology}: {options.tpu} has {DIMENSIONS[options.tpu]} sides")
    if options.topology not in (FLAT if len(sides) == 2 else CUBIC) and (
        len(sides) == 2 or sides != sorted(sides) or not all(side and side % 4 == 0 for side in sides)
    ):
        known = ", ".join(FLAT) if len(sides) == 2 else f"{', '.join(CUBIC)}, or multiples of 4 in rising order"
        raise ValueError(f"--topology {options.topology}: there are {known}")
    chips = math.prod(sides)
    if chips % CHIPS_A_HOST or options.slices < 1 or options.restarts < 0 or options.grace < 1:
        raise ValueError(
            f"{chips} chips in {options.slices} slice(s): whole hosts of {CHIPS_A_HOST}, one slice or more"
        )
    if not any(word.split("=")[0] == "--run-dir" for word in command):
        command = [*command, "--run-dir", f"/shared/runs/{options.name}"]
    check_paths(command)
    values = {
        "NAME": options.name,
        "ACCELERATOR": ACCELERATORS[options.tpu],
        "TOPOLOGY": options.topology,
        "SLICES": options.slices,
        "HOSTS": chips // CHIPS_A_HOST,
        "CHIPS": CHIPS_A_HOST,
        "IMAGE": json.dumps(options.image),
        "ARGS": json.dumps(command),  # JSON is YAML
        "CLAIM": options.claim,
        "RESTARTS": options.restarts,
        "GRACE": options.grace,
    }
    template = (Path(__file__).parent / "jobset.yaml").read_text()
    head, body = template.split("apiVersion", 1)  # the comments of the template are not submitted
    return Template("apiVersion" + body).substitute(values)


def check_paths(command: list[str]) -> None:
    """Raises ValueError for a bucket's address, or a run folder that the hosts do not share."""
    for word, after in zip(command, [*command[1:], ""], strict=True):
        if re.match(r"[a-z0-9]+://", value := word.split("=", 1)[-1]):
            raise ValueError(
                f"{value}: runs and data must be on a disk that all hosts mount, not in a bucket; "
                "name a folder under /shared, where --claim is mounted"
            )
        if word.split("=")[0] == "--run-dir":
            folder = value if "=" in word else after
            if not folder.startswith("/shared/") and "://" not in folder:
                raise ValueError(
                    f"--run-dir {folder}: a folder of one host only; name one under /shared, where --claim is mounted"
                )


if __name__ == "__main__":
    sys.exit(main())
