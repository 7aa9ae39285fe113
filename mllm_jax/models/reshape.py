"""A stored model with another image size or another vocabulary.

Position tables are resampled like transformers' `interpolate_pos_encoding`. Rows of embedding and head follow their
tokens. All other parameters are read unchanged, so that any such model streams onto its devices.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mllm_jax.checkpoints.leaves import PyTree, flatten
from mllm_jax.errors import ConfigError
from mllm_jax.models.vocabulary import with_ids_of

logger = logging.getLogger("mllm_jax.models")
NOISE = 0.1  # of new rows that differ, as a share of the standard deviation of the stored ones
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A vocabulary that replaces the stored one.

    Attributes:
        rows: int[n], each token's row in the stored vocabulary; -1: it has none, and gets the mean of all rows.
        axes: {path: axis} of the parameters that have a row for each token.
        held: the number of rows of the stored vocabulary.
        seed: with one, normal noise is added to the mean in each new row, as signal tokens must differ from each other.
            Its deviation is NOISE times that of the stored rows from their mean.
    """

    rows: np.ndarray
    axes: Mapping[str, int]
    held: int
    seed: int | None = None

    def __str__(self) -> str:
        kept = int((self.rows >= 0).sum())
        new = len(self.rows) - kept
        how = "by their token's text" if self.seed is None else "as they are"
        return (
            f"vocabulary of {self.held:,} tokens changed to {len(self.rows):,}: {kept:,} rows kept {how}, {new:,} new "
            f"ones begin at the mean{'' if self.seed is None else ', with a little noise'}"
        )

    def make(self, path: str) -> Callable:
        """Returns a function that maps a stored parameter to the new one."""
        axis = self.axes[path]

        def made(table):
            mean = table.astype(jnp.float32).mean(axis=axis, keepdims=True)
            known = jnp.asarray(self.rows >= 0).reshape([-1 if i == axis else 1 for i in range(table.ndim)])
            kept = jnp.take(table, np.maximum(self.rows, 0), axis=axis)
            if self.seed is not None:
                key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(path.encode()))
                deviation = jnp.sqrt(jnp.square(table.astype(jnp.float32) - mean).mean())
                mean += NOISE * deviation * jax.random.normal(key, kept.shape)
            return jnp.where(known, kept, mean.astype(table.dtype))

        return made


def with_image_size(config: Any, size: int) -> Any:
    """Returns the config of a model or part for images of another size.

    Raises:
        ConfigError: its images have no single size, patches do not fill the new size, or parts no longer fit.
    """
    resized = _resized(config, size)
    if resized is None:
        raise ConfigError(
            f"image_size={size} for a {type(config).__name__}",
            "a model with one image size: this one takes images of any size, or of sizes that its parts fix",
            "leave image_size out; a processor's own settings bound the pixels of images of any size",
        )
    check_image_size(config, resized)
    return resized


def check_image_size(stored: Any, config: Any) -> None:
    """Refuses an image size that differs from the stored config's and that patches do not fill.

    Raises:
        ConfigError: names the nearest sizes that patches fill.
    """
    theirs = _image_parts(stored)
    for name, part in _image_parts(config).items():
        patch, size = getattr(part, "patch_size", 1), part.image_size
        if name in theirs and size != theirs[name].image_size and (size < patch or size % patch):
            low = max(size // patch, 1) * patch
            raise ConfigError(
                f"{name or type(part).__name__}: images of {size} pixels a side in patches of {patch}",
                "a whole number of patches",
                f"set image_size to {low} or {low + patch}",
            )


def fitted(stored: Any, config: Any, *, vocabulary: bool = False) -> Any:
    """Returns the stored config with the image size of the other config.

    Args:
        vocabulary: whether to take the other's vocabulary too, see `mllm_jax.models.vocabulary`.
    """
    size = getattr(config, "image_size", None)
    if size is not None and size != getattr(stored, "image_size", size) and _image_parts(stored):
        check_image_size(stored, config)
        stored = with_image_size(stored, size)
    return with_ids_of(stored, config) if vocabulary and type(stored) is type(config) else stored


def changed_leaves(stored: Shapes, wanted: Shapes) -> list[str]:
    """Returns the parameters whose shape differs from the stored one."""
    return [path for path, shape in wanted.items() if path in stored and tuple(stored[path]) != tuple(shape)]


def reshaped(
    params: PyTree,
    wanted: PyTree,
    config: Any,
    *,
    vocabulary: Vocabulary | None = None,
    report: Callable[[str], None] = logger.info,
) -> PyTree:
    """Converts stored parameters to the shapes of another config of the model.

    Args:
        params: the stored parameters.
        wanted: ShapeDtypeStructs of the parameters, perhaps with shardings for the changed ones.
        config: the config of `wanted`.
        vocabulary: None: the stored one.
        report: is called with a line for each kind of change.

    Raises:
        ConfigError: parameters depend on the image size and cannot be resampled.
    """
    leaves, structure = flatten(params)
    targets = flatten(nn.meta.unbox(wanted))[0]
    fixed, words = [], {} if vocabulary is None else vocabulary.axes
    if vocabulary is not None:
        report(str(vocabulary))
    changed = changed_leaves({p: x.shape for p, x in leaves.items()}, {p: x.shape for p, x in targets.items()})
    for path in dict.fromkeys([*words, *changed]):
        table, target = leaves[path], targets[path]
        part, _, name = path.partition("/")
        parts = getattr(config, "parts", None) or {}
        owner, name = (parts[part], name) if part in parts else (config, path)
        if path in words:
            make = vocabulary.make(path)
        elif (make := _resampling(owner, name)) is not None:
            before, after = (math.isqrt(x.shape[0]) for x in (table, target))
            resampled = part if part in parts else type(owner).__name__
            report(f"positions of {resampled} resampled from {before} x {before} to {after} x {after}")
        else:
            fixed.append(f"{path} {list(table.shape)}, which would be {list(target.shape)}")
            continue
        leaves[path] = jax.jit(make, out_shardings=getattr(target, "sharding", None))(table)
    if fixed:
        shown = "".join(f"\n    {line}" for line in fixed[:5])
        raise ConfigError(
            f"another image size for parameters that fit only one size:{shown}",
            "the image size of the stored model: relative positions and maps of whole regions do not resize",
            "keep the stored image size, or train this part from scratch instead of reading it",
        )
    return jax.tree_util.tree_unflatten(structure, list(leaves.values()))


def _resized(config: Any, size: int) -> Any:
    """Returns the config with another image size; None if it has no image size."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if "image_size" in fields:
        return dataclasses.replace(config, image_size=size)
    if "inputs" in fields:
        branch = fields["inputs"].get("image")
        encoder = None if branch is None or isinstance(branch.encoder, str) else _resized(branch.encoder, size)
        if encoder is None:
            return None
        changes: dict[str, Any] = {
            "inputs": {**fields["inputs"], "image": dataclasses.replace(branch, encoder=encoder)}
        }
        if fields.get("resolutions"):  # the same numbers of tiles
            side = branch.encoder.image_size
            changes["resolutions"] = tuple(tuple(n // side * size for n in pair) for pair in fields["resolutions"])
        return dataclasses.replace(config, **changes)
    for name in ("vision", "encoder", "model"):
        if dataclasses.is_dataclass(part := fields.get(name)):
            return None if (part := _resized(part, size)) is None else dataclasses.replace(config, **{name: part})
    return None


def _image_parts(config: Any) -> dict[str, Any]:
    """Returns the parts of a model that read images of one size, by name; for a single part, {"": part}."""
    parts = getattr(config, "parts", None) or {"": config}
    return {name: part for name, part in parts.items() if isinstance(getattr(part, "image_size", None), int)}


def _resampling(owner: Any, name: str) -> Callable | None:
    """Returns a function that resamples a stored parameter of an encoder; None if it cannot be resampled."""
    return owner.resample if name in getattr(owner, "resampled", ()) else None
