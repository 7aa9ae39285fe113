"""The families of models, and public functions to load a model or its config, save it, and list supported ones."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from mllm_jax.checkpoints.architectures import ARCHITECTURES, find, known
from mllm_jax.checkpoints.components import DIFFUSERS_STEM, Component, component_of, new_component
from mllm_jax.checkpoints.config_options import named_as
from mllm_jax.checkpoints.hf import ReadReport, float_dtype, read_config, read_weights, write_weights
from mllm_jax.checkpoints.leaves import PyTree
from mllm_jax.checkpoints.native import is_native, read_native, read_native_config
from mllm_jax.checkpoints.safetensors_files import has_weights, read_folder
from mllm_jax.checkpoints.table import Family
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.layers.compute import with_compute
from mllm_jax.models.companions import fitting
from mllm_jax.models.parts import family_of as part_family
from mllm_jax.models.pipelines import PipelineConfig, is_pipeline, read_parts, read_pipeline, write_pipeline
from mllm_jax.models.reshape import reshaped, with_image_size
from mllm_jax.sharding.cpu import prepare_cpu
from mllm_jax.sharding.mesh import param_shardings


@dataclasses.dataclass(frozen=True)
class SupportedModel:
    """One row of `supported_models`.

    Attributes:
        architectures: as config.json names them.
        reading, writing: whether its folders can be read and written.
        oracle: the reference of its parity tests.
    """

    name: str
    architectures: tuple[str, ...]
    reading: bool
    writing: bool
    oracle: str


def supported_models() -> list[SupportedModel]:
    """Lists the models that `from_pretrained` reads, a row for each family. `mllm models` prints them as a table."""
    modules = dict.fromkeys(found.module for found in ARCHITECTURES)
    families = [family for module in modules for family in importlib.import_module(module).FAMILIES]
    return [
        SupportedModel(f.name, f.architectures, bool(f.from_hf), bool(f.to_hf), f.oracle or f.architectures[0])
        for f in families
    ]


def family_of_component(component: Component, hf_config: Mapping[str, Any]) -> Family:
    """Returns the family that reads a component: of its class in model_index.json, or else of its config.json."""
    if not component.class_name:
        return family_of(hf_config)
    if (found := find(component.class_name, hf_config)) is None:
        raise ConfigError(
            f"{component.folder}: a component of class {component.class_name!r}",
            f"one of {', '.join(dict.fromkeys(entry.name for entry in ARCHITECTURES))}",
            "read the other components by themselves, or convert another checkpoint",
        )
    return part_family(found)


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """Returns the family that reads a config.json. Raises ConfigError if it names no supported architecture."""
    architectures = named_as(hf_config)[0]
    if not architectures and isinstance(named := hf_config.get("architecture"), str):
        architectures = (named,)  # as in timm's files
    if not architectures:
        raise ConfigError(
            f"config.json with architectures={hf_config.get('architectures')!r}",
            "the name of the model's class, such as LlamaForCausalLM",
            "add the entry `architectures` as the model's own repository has it",
        )
    name = next((name for name in architectures if find(name, hf_config)), architectures[0])
    return part_family(known(name, hf_config))


def family_of_config(config: Any) -> Family:
    """Returns the family that writes a module's config: `config.family` is the architecture's name."""
    if not isinstance(name := getattr(config, "family", None), str):
        raise ConfigError(
            f"a {type(config).__name__} without a family",
            "a config from a Hugging Face folder, or one that names the architecture for writing it",
            "set its field `family`, or save a training checkpoint instead",
        )
    return part_family(known(name))


def abstract_params(config: Any, family: Family) -> PyTree:
    """Returns shapes, dtypes and logical names of the parameters of `config.make()`; computes nothing."""
    return abstract_init(config.make(), *jax.eval_shape(lambda: family.sample(config)))


def abstract_init(module: nn.Module, *arguments: Any, **options: Any) -> PyTree:
    """Does the same for any module; arguments, perhaps abstract, and options are those of its `init` after the key."""
    leaves, tree = jax.tree.flatten(arguments)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    try:
        hash(module)
        trace = _traced_init
    except TypeError:  # its config has a list or a dict
        trace = _traced_init.__wrapped__
    traced = trace(module, tree, shapes, tuple(options.items()))
    return jax.tree.map(lambda leaf: leaf, traced)  # a caller may change its copy


@lru_cache(maxsize=64)
def _traced_init(module: nn.Module, tree: Any, leaves: tuple, options: tuple) -> PyTree:
    """Traces a module's `init`, which takes a second for a tiny model and ten for a large one."""
    arguments = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    return jax.eval_shape(partial(module.init, **dict(options)), jax.random.key(0), *arguments)["params"]


def pretrained_config(folder: str | Path) -> Any:
    """Returns the config of the module of `from_pretrained(folder)`, such as a DecoderConfig; reads no weights.

    Raises:
        CheckpointError: the folder has no model.
        ConfigError: the architecture, or one of its options, is not supported.
    """
    return read_pretrained(folder)[0]


def read_pretrained(folder: str | Path | Component) -> tuple[Any, Family]:
    """Does the same, and returns the folder's family; for a native folder, the family that writes it.

    The headers of stored weights settle what config.json leaves open, and bound its numbers of layers.
    """
    if not isinstance(folder, Component) and is_native(Path(folder)):
        config = read_native_config(Path(folder))
        return config, family_of_config(config)
    if is_pipeline(folder):
        return read_pipeline(Path(folder), read_pretrained)
    component = component_of(folder)
    hf_config = read_config(component)
    family = family_of_component(component, hf_config)
    if component.class_name and not named_as(hf_config)[0]:
        hf_config |= {"architectures": [component.class_name]}
    config = family.from_hf(hf_config)
    if has_weights(component):
        stored = read_folder(component)
        require_layers(component.folder, config, stored)
        config = family.settle(config, stored)
    return config, family


def from_pretrained(
    folder: str | Path | Component,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    image_size: int | None = None,
    report: Callable[[ReadReport], None] | None = None,
) -> tuple[nn.Module, PyTree]:
    """Loads the module and the parameters of a folder: a Hugging Face one of any supported model, or a native one.

    Args:
        folder: config.json with (sharded) safetensors, or a folder of `mllm convert`; a pipeline's folder, with a
            model_index.json, or one of its components, see `mllm_jax.checkpoints.components.components_of`.
        dtype: of the parameters and of the computation; None: that of the stored parameters, for the computation that
            of most of them.
        mesh: on which the parameters are sharded; None puts them on the default device.
        image_size: of the images that the model reads; None: the folder's. For another size, position tables are
            resampled like transformers' `interpolate_pos_encoding`.
        report: is called with statistics of reading Hugging Face files; by default they are logged.

    Returns:
        (module, params) for `module.apply({"params": params}, ...)`.

    Raises:
        ConfigError: the architecture, one of its options, or the image size is not supported.
        CheckpointError: files are absent or damaged, tensors do not fit, or the model is larger than the devices.
    """
    prepare_cpu()
    if dtype is not None:
        dtype = float_dtype(dtype)
    config, family = read_pretrained(folder)
    resized = config if image_size is None else with_image_size(config, image_size)
    abstract = abstract_params(config, family)
    if not isinstance(folder, Component) and is_native(Path(folder)):
        params = read_native(Path(folder), abstract, mesh=mesh)
        if dtype is not None:
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    elif is_pipeline(folder):
        params = read_parts(Path(folder), config, abstract, mesh=mesh, dtype=dtype, report=report)
    else:
        params = read_weights(
            component_of(folder), family.table(config), abstract, mesh=mesh, dtype=dtype, report=report
        )
    if resized != config:
        config, abstract = resized, abstract_params(resized, family)
        params = reshaped(params, placed(abstract, mesh), config)
    computed = _dtype_of(params)
    # float32 is the default: the config stays as the family reads it.
    module = with_compute(config, dtype=None if computed == "float32" else computed).make()
    if isinstance(config, PipelineConfig):
        module = module.clone(companions=str(folder))
    return module, params


def placed(abstract: PyTree, mesh: jax.sharding.Mesh | None) -> PyTree:
    """Returns the parameters of `abstract_params` as ShapeDtypeStructs, with their shardings if there is a mesh."""
    plain = nn.meta.unbox(abstract)
    if mesh is None:
        return plain
    shardings = param_shardings(abstract, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, shardings)


def save_pretrained(
    module: nn.Module,
    params: PyTree,
    folder: str | Path,
    *,
    companions: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes a Hugging Face folder that transformers, or diffusers, opens; it appears whole or not at all.

    Args:
        module: as `from_pretrained` returns it; its config names the architecture to write.
        companions: a folder whose tokenizer, chat template and generation settings are copied; None: for a pipeline
            the folder that it was read from.
        max_shard_bytes: a larger model is split over several files with an index.
        dtype: of the stored parameters; None: that of each parameter.
        overwrite: whether to replace an existing model.

    Raises:
        ConfigError: the module has no family.
        CheckpointError: the parameters are not this module's, the folder exists, or the disk is full.
    """
    config, how = module.config, dict(max_shard_bytes=max_shard_bytes, dtype=dtype, overwrite=overwrite)
    companions = None if companions is None else Path(companions)
    if isinstance(config, PipelineConfig):
        if companions is None and module.companions is not None:
            companions = Path(module.companions)
        write_pipeline(Path(folder), config, params, save_pretrained, companions=companions, **how)
        return
    family = family_of_config(config)
    written = family.to_hf(config)
    target = new_component(folder, written)
    if target.stem != DIFFUSERS_STEM:  # diffusers takes the dtype of the tensors
        written |= {"torch_dtype": _dtype_of(params) if dtype is None else str(float_dtype(dtype))}
    with fitting(config, companions) as beside:
        write_weights(target, family.table(config), params, config=written, companions=beside, **how)


def _dtype_of(params: PyTree) -> str:
    """Returns the dtype of most numbers, so that wider norms do not decide."""
    sizes: Counter[str] = Counter()
    for leaf in jax.tree.leaves(params):
        sizes[str(leaf.dtype)] += leaf.size
    return sizes.most_common(1)[0][0]


FEW_LAYERS = 100  # a number for which an error message can list the missing tensors


def require_layers(folder: Path, config: Any, stored: Iterable[str]) -> None:
    """Refuses a config with more layers than the stored tensors, before anything is allocated for each layer.

    Args:
        stored: the names of the tensors, in which layers are numbered.

    Raises:
        CheckpointError: names both numbers of layers.
    """
    most = 1 + max((int(number) for name in stored for number in re.findall(r"(?<=\.)\d{1,9}(?=\.)", name)), default=-1)
    wrong = [f"{name}={count:,}" for name, count in layer_counts(config) if count > max(most, FEW_LAYERS)]
    if wrong:
        raise CheckpointError(
            f"{folder}: config.json has {', '.join(wrong)} (num_hidden_layers, num_layers or depth there), "
            f"and the stored tensors have at most {most:,} layers",
            "the number of stored layers",
            "check that weights and config.json belong together",
        )


def layer_counts(config: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Yields the names and values of all fields with a part's number of layers."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from layer_counts(value, f"{path}{field.name}.")
        elif field.name.endswith("num_layers") or field.name == "num_decoder_layers":
            yield f"{path}{field.name}", value
