"""Which file knows a model, and the public names that follow: load it, its config, save it, list what is supported."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from mllm_jax.checkpoints.hf import Report, float_dtype, read_config, read_weights, write_weights
from mllm_jax.checkpoints.layer_bound import require_layers
from mllm_jax.checkpoints.leaves import PyTree
from mllm_jax.checkpoints.native import is_native, read_native, read_native_config
from mllm_jax.checkpoints.options import named_as
from mllm_jax.checkpoints.safetensors_files import has_weights, read_folder
from mllm_jax.checkpoints.table import Family
from mllm_jax.errors import ConfigError
from mllm_jax.sharding.cpu import prepare_cpu

# The architecture that config.json names -> the module whose FAMILIES has it. A new family is a file and its lines.
_HOMES = {
    "LlamaForCausalLM": "mllm_jax.llms.llama",
    "MistralForCausalLM": "mllm_jax.llms.llama",
    "Qwen2ForCausalLM": "mllm_jax.llms.qwen",
    "Qwen3ForCausalLM": "mllm_jax.llms.qwen",
    "QWenLMHeadModel": "mllm_jax.llms.qwen_v1",
    "GlmForCausalLM": "mllm_jax.llms.glm",
    "OPTForCausalLM": "mllm_jax.llms.opt",
    "T5ForConditionalGeneration": "mllm_jax.llms.t5",
    "T5WithLMHeadModel": "mllm_jax.llms.t5",
    "ChatGLMModel": "mllm_jax.llms.chatglm",
    "ChatGLMForConditionalGeneration": "mllm_jax.llms.chatglm",
    "ViTModel": "mllm_jax.encoders.vit_hf",
    "CLIPVisionModel": "mllm_jax.encoders.clip_vision",
    "CLIPTextModel": "mllm_jax.encoders.clip_text",
    "CLIPTextModelWithProjection": "mllm_jax.encoders.clip_text",
    "CLIPModel": "mllm_jax.models.clip",
    "SiglipVisionModel": "mllm_jax.encoders.siglip_vision",
    "SamVisionModel": "mllm_jax.encoders.sam",
    "SiglipTextModel": "mllm_jax.encoders.siglip_text",
    "SiglipModel": "mllm_jax.models.clip",
    "LlavaForConditionalGeneration": "mllm_jax.models.llava",
    "LlavaNextForConditionalGeneration": "mllm_jax.models.llava",
    "LlavaOnevisionForConditionalGeneration": "mllm_jax.models.llava",
    "Dinov2Model": "mllm_jax.encoders.dinov2",
    "Blip2VisionModel": "mllm_jax.encoders.eva",
    "InternVLVisionModel": "mllm_jax.encoders.internvit",
    "InternVisionModel": "mllm_jax.encoders.internvit",
    "Qwen2VisionTransformerPretrainedModel": "mllm_jax.encoders.qwen_vit",
    "Qwen2_5_VisionTransformerPretrainedModel": "mllm_jax.encoders.qwen_vit",
    "Qwen3VLVisionModel": "mllm_jax.encoders.qwen_vit",
    "QWenVisionTransformer": "mllm_jax.models.qwen_vl_v1",
    "QWenVL": "mllm_jax.models.qwen_vl_v1",
    "InternVLForConditionalGeneration": "mllm_jax.models.internvl",
    "InternVLChatModel": "mllm_jax.models.internvl",
    "DeepseekVLForConditionalGeneration": "mllm_jax.models.deepseek_vl",
    "DeepseekVLHybridForConditionalGeneration": "mllm_jax.models.deepseek_vl",
    "Blip2ForConditionalGeneration": "mllm_jax.models.blip2",
    "Blip2ForImageTextRetrieval": "mllm_jax.models.blip2_retrieval",
    "InstructBlipForConditionalGeneration": "mllm_jax.models.instructblip",
    "Qwen2VLForConditionalGeneration": "mllm_jax.models.qwen_vl",
    "Qwen2_5_VLForConditionalGeneration": "mllm_jax.models.qwen_vl",
    "Qwen3VLForConditionalGeneration": "mllm_jax.models.qwen_vl",
    # timm's names
    "eva_giant_patch14_clip_224": "mllm_jax.encoders.eva",
    "eva02_base_patch16_clip_224": "mllm_jax.encoders.eva",
    "eva02_large_patch14_clip_224": "mllm_jax.encoders.eva",
    "eva02_large_patch14_clip_336": "mllm_jax.encoders.eva",
    "eva02_enormous_patch14_clip_224": "mllm_jax.encoders.eva",
    **{f"{origin}nfnet_f{size}": "mllm_jax.encoders.nfnet_timm" for origin in ("dm_", "") for size in range(7)},
}


@dataclasses.dataclass(frozen=True)
class SupportedModel:
    """One row of `supported_models`.

    Attributes:
        architectures: as config.json names them.
        reading, writing: whether folders of it can be read and written.
        oracle: the reference that its parity tests compare with.
    """

    name: str
    architectures: tuple[str, ...]
    reading: bool
    writing: bool
    oracle: str


def supported_models() -> list[SupportedModel]:
    """Every model that `from_pretrained` reads, a row a family. `mllm models` prints it as a table."""
    families = [family for home in dict.fromkeys(_HOMES.values()) for family in importlib.import_module(home).FAMILIES]
    return [SupportedModel(f.name, f.architectures, bool(f.from_hf), bool(f.to_hf), f.oracle) for f in families]


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family that reads a config.json. Raises ConfigError: it names no architecture, or none that is supported."""
    architectures = named_as(hf_config)[0]
    if not architectures and isinstance(named := hf_config.get("architecture"), str):
        architectures = (named,)  # as timm writes it
    if not architectures:
        raise ConfigError(
            f"config.json with architectures={hf_config.get('architectures')!r}",
            "the name of the model's class, such as LlamaForCausalLM",
            "add the entry `architectures` as the model's own repository has it",
        )
    known = [name for name in architectures if name in _HOMES]
    name = known[0] if known else architectures[0]
    if name == "QWenLMHeadModel" and hf_config.get("visual"):
        name = "QWenVL"  # whose folders name the class that its language model has
    # ChatGLM 2 and 3 call themselves what the first one does, and only they have this option.
    return _family(name, "mllm_jax.llms.glm" if name == "ChatGLMModel" and "padded_vocab_size" in hf_config else None)


def family_of_config(config: Any) -> Family:
    """The family as which a module's config is written: `config.family` is the architecture's name."""
    if not isinstance(name := getattr(config, "family", None), str):
        raise ConfigError(
            f"a {type(config).__name__} without a family",
            "a config that came from a Hugging Face folder, or names the architecture to be written as",
            "set its field `family`, or save a training checkpoint instead",
        )
    return _family(name)


def _family(architecture: str, home: str | None = None) -> Family:
    if architecture not in _HOMES:
        near = difflib.get_close_matches(architecture, _HOMES, n=1)
        raise ConfigError(
            f"architecture {architecture!r}",
            f"one of {', '.join(_HOMES)}",
            f"did you mean {near[0]!r}?"
            if near
            else "convert another checkpoint; `mllm models` lists what is supported",
        )
    families = importlib.import_module(home or _HOMES[architecture]).FAMILIES
    return next(family for family in families if architecture in family.architectures)


def has_layout(config: Any) -> bool:
    """Whether a config is that of a named model with a processor of its own, which lays out pictures and text."""
    return getattr(config, "family", None) is not None and family_of_config(config).layout is not None


def abstract_params(config: Any, family: Family) -> PyTree:
    """Shapes, dtypes and logical names of the parameters of `config.make()`; nothing is computed."""
    return abstract_init(config.make(), *jax.eval_shape(lambda: family.sample(config)))


def abstract_init(module: nn.Module, *arguments: Any, **options: Any) -> PyTree:
    """The same of any module; arguments, perhaps abstract, and options are those of its `init` after the key."""
    return jax.eval_shape(partial(module.init, **options), jax.random.key(0), *arguments)["params"]


def pretrained_config(folder: str | Path) -> Any:
    """The config of the module that `from_pretrained(folder)` gives, such as a DecoderConfig, without the weights.

    Raises:
        CheckpointError: no model there.
        ConfigError: an unsupported architecture, or an option of it that is not supported.
    """
    return read_pretrained(folder)[0]


def read_pretrained(folder: str | Path) -> tuple[Any, Family]:
    """The same, and the family of the folder; of a native one that as which it would be written.

    Where weights lie beside config.json, their headers say what it leaves open, and bound its numbers of layers.
    """
    folder = Path(folder)
    if is_native(folder):
        config = read_native_config(folder)
        return config, family_of_config(config)
    hf_config = read_config(folder)
    family = family_of(hf_config)
    config = family.from_hf(hf_config)
    if has_weights(folder):
        stored = read_folder(folder)
        require_layers(folder, config, stored)
        config = family.settle(config, stored)
    return config, family


def from_pretrained(
    folder: str | Path,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    report: Callable[[Report], None] | None = None,
) -> tuple[nn.Module, PyTree]:
    """The module and the parameters in a folder: a Hugging Face one of any supported model, or a native one.

    Args:
        folder: config.json with (sharded) safetensors, or what `mllm convert` wrote.
        dtype: of the parameters and of the computation; None is what is stored, for the computation what most is.
        mesh: shards the parameters over it; None puts them on the default device.
        report: is called with what reading Hugging Face files took; by default that is logged.

    Returns:
        (module, params) for `module.apply({"params": params}, ...)`.

    Raises:
        ConfigError: an unsupported architecture, or an option of it that is not supported.
        CheckpointError: files absent or damaged, tensors that do not fit, or a model larger than the devices.
    """
    prepare_cpu()
    folder = Path(folder)
    if dtype is not None:
        dtype = float_dtype(dtype)
    config, family = read_pretrained(folder)
    abstract = abstract_params(config, family)
    if is_native(folder):
        params = read_native(folder, abstract, mesh=mesh)
        if dtype is not None:
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    else:
        params = read_weights(folder, family.table(config), abstract, mesh=mesh, dtype=dtype, report=report)
    return _computing_in(config, _dtype_of(params)).make(), params


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
    """Writes a Hugging Face folder that transformers opens; it appears whole or not at all.

    Args:
        module: as `from_pretrained` gives it; its config says as which architecture to write.
        companions: a folder whose tokenizer, chat template and generation settings come along.
        max_shard_bytes: a larger model is split over several files with an index.
        dtype: what to store; None is that of each parameter.
        overwrite: replace a model that is there.

    Raises:
        ConfigError: a module without a family.
        CheckpointError: parameters that are not this module's, a folder that is taken, a full disk.
    """
    config = module.config
    family = family_of_config(config)
    stored = _dtype_of(params) if dtype is None else str(float_dtype(dtype))
    write_weights(
        Path(folder),
        family.table(config),
        params,
        config=family.to_hf(config) | {"torch_dtype": stored},
        companions=None if companions is None else Path(companions),
        max_shard_bytes=max_shard_bytes,
        dtype=dtype,
        overwrite=overwrite,
    )


def _computing_in(config: Any, dtype: str) -> Any:
    """The config with that dtype; a composed model has one in each part."""
    return config.with_dtype(dtype) if hasattr(config, "with_dtype") else dataclasses.replace(config, dtype=dtype)


def _dtype_of(params: PyTree) -> str:
    """The dtype that most numbers have: norms may be wider than the matrices and do not decide."""
    sizes: Counter[str] = Counter()
    for leaf in jax.tree.leaves(params):
        sizes[str(leaf.dtype)] += leaf.size
    return sizes.most_common(1)[0][0]
