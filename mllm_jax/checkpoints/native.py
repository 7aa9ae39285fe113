"""The library's own model folder: a config and its parameters, sealed by checksums and read onto any sharding.

model.json    the module's config
params/       the parameters, a snapshot (see folder.py)
tokenizer.json, chat_template.jinja, ...   copied from the Hugging Face folder
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.checkpoints.folder import new_folder, record
from mllm_jax.checkpoints.hf import copy_companions
from mllm_jax.checkpoints.leaves import PyTree, flatten
from mllm_jax.checkpoints.training import load_snapshot, save_snapshot, snapshot_meta
from mllm_jax.errors import CheckpointError
from mllm_jax.files import read_json
from mllm_jax.sharding.mesh import param_shardings

MODEL, PARAMS = "model.json", "params"
FORMAT = 1


def is_native(folder: Path) -> bool:
    return (Path(folder) / MODEL).is_file()


def write_native(
    folder: Path, config: Any, params: PyTree, *, companions: Path | None = None, overwrite: bool = False
) -> None:
    """Writes the folder atomically.

    Args:
        config: config of the module, a dataclass.
        companions: a folder whose tokenizer, chat template and generation settings are copied.
        overwrite: whether to replace an existing model.

    Raises:
        CheckpointError: the folder exists, or the disk is full.
        ConfigError: a config that is not plain data.
    """
    text = json.dumps({"format": FORMAT, "config": describe(config)}, indent=2) + "\n"
    params = nn.meta.unbox(params)
    with new_folder(folder, sum(leaf.nbytes for leaf in jax.tree.leaves(params)), overwrite=overwrite) as temporary:
        save_snapshot(temporary / PARAMS, params, {})
        (temporary / MODEL).write_text(text, "utf-8")
        if companions is not None:
            copy_companions(companions, temporary)


def read_native_config(folder: Path) -> Any:
    """Returns the module's config. Raises CheckpointError or ConfigError: absent, damaged, or of another version."""
    path = Path(folder) / MODEL
    try:
        stored = read_json(path, CheckpointError)
        if stored["format"] != FORMAT:
            raise ValueError(f"format {stored['format']!r}")
        return rebuild(stored["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: {type(error).__name__}: {error}",
            f"a model folder of format {FORMAT}",
            "check the path, or use the version that wrote it",
        ) from error


def read_native(folder: Path, abstract: PyTree, *, mesh: jax.sharding.Mesh | None = None) -> PyTree:
    """Reads the parameters in their stored dtypes onto the devices.

    Args:
        abstract: `jax.eval_shape` of `module.init(...)["params"]`, with its logical names.
        mesh: the mesh for `param_shardings`; None means the default device.

    Raises:
        CheckpointError: absent, incomplete or damaged, or not the parameters of that module.
    """
    source = Path(folder).absolute() / PARAMS
    snapshot_meta(source)  # refuses an incomplete folder before its record is used
    dtypes = {path: dtype for path, (_, dtype) in record(source)["leaves"].items()}
    leaves, structure = flatten(nn.meta.unbox(abstract))
    shardings = {} if mesh is None else flatten(param_shardings(abstract, mesh))[0]
    wanted = [
        jax.ShapeDtypeStruct(leaf.shape, dtypes.get(path, leaf.dtype), sharding=shardings.get(path))
        for path, leaf in leaves.items()
    ]
    return load_snapshot(source, jax.tree_util.tree_unflatten(structure, wanted))[0]
