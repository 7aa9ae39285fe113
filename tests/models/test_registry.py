"""The public functions: reading and writing of any supported folder, and refusals that name the fault."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

import mllm_jax
from mllm_jax import DecoderConfig, MeshConfig, from_pretrained, save_pretrained, supported_models
from mllm_jax.checkpoints import architectures
from mllm_jax.checkpoints.architectures import ARCHITECTURES
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.checkpoints.hf import read_config
from mllm_jax.checkpoints.native import write_native
from mllm_jax.checkpoints.table import batch_sample, image_sample, token_sample
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.layers.compute import Compute
from mllm_jax.models.registry import abstract_params, family_of, family_of_config
from mllm_jax.sharding.mesh import make_mesh, param_shardings

CONFIG = DecoderConfig(
    vocab_size=32, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=24, tie_word_embeddings=False
)
MODULES = list(dict.fromkeys(entry.module for entry in ARCHITECTURES))
NAMES = list(dict.fromkeys(entry.name for entry in ARCHITECTURES))
TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


def families_of(module):
    return importlib.import_module(module).FAMILIES


def random_params(config, dtype=jnp.float32):
    abstract = nn.meta.unbox(abstract_params(config, family_of_config(config)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), dtype), abstract)


def logits(module, params):
    return np.asarray(module.apply({"params": params}, TOKENS), np.float32)


def identical(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), one, other))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_pretrained(CONFIG.make(), params, folder)
    return folder


# ---- which family


def test_every_architecture_has_the_home_that_reads_it():
    told = {(module, name) for module in MODULES for f in families_of(module) for name in f.architectures}
    assert told == {(entry.module, entry.name) for entry in ARCHITECTURES}
    for name in NAMES:
        family = family_of({"architectures": [name]})
        assert name in family.architectures and family.name


def test_a_part_of_diffusers_is_named_by_its_class():
    values = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0"}
    assert family_of(values).architectures == ("AutoencoderKL",)
    assert architectures.kind_of("AutoencoderKL").keys() == values.keys()
    with pytest.raises(ConfigError, match="(?s)'AutoencoderKl'.*did you mean 'AutoencoderKL'"):
        family_of({"_class_name": "AutoencoderKl"})
    with pytest.raises(ConfigError, match=r"_class_name=\[1\]"):
        family_of({"_class_name": [1]})


def test_chatglm_2_is_not_taken_for_the_first_one():
    first = family_of({"architectures": ["ChatGLMModel"], "position_encoding_2d": True})
    second = family_of({"architectures": ["ChatGLMModel"], "padded_vocab_size": 64})
    assert first != second and "2" in second.name


def test_supported_models_lists_every_family_once():
    rows = supported_models()
    names = [name for row in rows for name in row.architectures]
    assert set(names) == set(NAMES) and len({row.name for row in rows}) == len(rows)
    assert all(row.reading and row.writing and row.oracle for row in rows)


def test_only_what_takes_other_arguments_has_a_sample_of_its_own():
    families = [f for module in MODULES for f in families_of(module)]
    own = {f.name for f in families if f.sample not in (batch_sample, token_sample, image_sample)}
    vits = {"Qwen2-VL ViT", "Qwen2.5-VL ViT", "Qwen3-VL ViT", "Qwen-VL (first) ViT and resampler", "Qwen2.5-Omni ViT"}
    heard = {"BEATs", "C-Former", "HuBERT", "HuBERT with a CTC head"}
    heard |= {"Whisper", "Whisper without a head", "Whisper encoder", "Qwen2-Audio encoder"}
    heard |= {"Qwen2.5-Omni audio encoder"}
    made = {"Autoencoder of latent diffusion", "HiFi-GAN vocoder", "Stable Diffusion"}
    made |= {"Stable Diffusion's UNet", "AudioLDM-2's UNet", "AudioLDM-2's projection model", "AudioLDM-2"}
    made |= {"Zeroscope", "Zeroscope's UNet", "Stable Diffusion 3's transformer"}
    assert own == {"T5, Flan-T5", "CLIP", "SigLIP", "NFNet"} | vits | heard | made


@pytest.mark.parametrize(
    "config,message",
    [
        ({}, "architectures=None"),
        ({"architectures": []}, r"architectures=\[\]"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM'"),
        ({"architectures": ["LlamaForCausalLm"]}, "(?s)'LlamaForCausalLm'.*did you mean 'LlamaForCausalLM'"),
        ({"architectures": ["Wav2Vec2ForCTC"]}, "(?s)'Wav2Vec2ForCTC'.*convert another"),
        ({"architectures": [3]}, r"architectures=\[3\]"),
    ],
)
def test_unknown_architectures_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        family_of(config)


@pytest.mark.parametrize("config", [object(), change_fields(CONFIG, family="GPT5"), None])
def test_a_config_of_no_family_is_not_written(config):
    with pytest.raises(ConfigError, match="without a family|GPT5"):
        family_of_config(config)


def test_a_new_family_is_one_line(monkeypatch):
    line = architectures.Architecture("MyForCausalLM", "my_models", "my")
    monkeypatch.setattr(architectures, "ARCHITECTURES", (*ARCHITECTURES, line))
    with pytest.raises(ModuleNotFoundError, match="my_models"):
        family_of({"architectures": ["MyForCausalLM"]})


# ---- in and out


def test_what_is_saved_comes_back(folder, params, caplog):
    with caplog.at_level(logging.INFO, "mllm_jax"):
        module, found = from_pretrained(str(folder))
    assert module.config == CONFIG and identical(found, params)
    assert np.array_equal(logits(module, found), logits(CONFIG.make(), params))
    assert "21 tensors" in caplog.text and "bytes in buffers" in caplog.text


def test_transformers_opens_a_saved_folder(tmp_path, params):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    save_pretrained(CONFIG.make(), params, tmp_path / "out", max_shard_bytes=4000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = model(torch.tensor(np.array(TOKENS, np.int64))).logits.numpy()
    ours = logits(CONFIG.make(), params)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max() > 0


@pytest.mark.parametrize("kind", ["huggingface", "native"])
@pytest.mark.parametrize("stored,asked", [("bfloat16", None), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_dtype_is_that_of_parameters_and_computation(tmp_path, kind, stored, asked):
    params = random_params(CONFIG, stored)
    if kind == "native":
        write_native(tmp_path / "m", CONFIG, params)
    else:
        save_pretrained(CONFIG.make(), params, tmp_path / "m")
        assert read_config(tmp_path / "m")["torch_dtype"] == stored
    module, found = from_pretrained(tmp_path / "m", dtype=asked)
    assert module.config.dtype == (asked or stored) and dataclasses.replace(module.config, compute=Compute()) == CONFIG
    assert identical(found, jax.tree.map(lambda leaf: leaf.astype(asked or stored), params))


def test_a_few_wide_parameters_do_not_decide_the_computation(tmp_path):
    params = random_params(CONFIG, "bfloat16")
    params["final_norm"]["scale"] = params["final_norm"]["scale"].astype("float32")
    save_pretrained(CONFIG.make(), params, tmp_path / "m")
    module, found = from_pretrained(tmp_path / "m")
    assert module.config.dtype == read_config(tmp_path / "m")["torch_dtype"] == "bfloat16" and identical(found, params)


@pytest.mark.parametrize("kind", ["huggingface", "native"])
def test_a_mesh_shards_by_the_logical_names(tmp_path, folder, params, kind, devices):
    if kind == "native":
        folder = tmp_path / "m"
        write_native(folder, CONFIG, params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    module, found = from_pretrained(folder, mesh=mesh)
    assert identical(found, params)
    shardings = param_shardings(abstract_params(CONFIG, family_of_config(CONFIG)), mesh)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, found, shardings))
    assert found["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 8, 12)
    expected = logits(CONFIG.make(), params)
    assert np.abs(logits(module, found) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_what_is_stored_can_be_narrowed_and_split(tmp_path, params):
    save_pretrained(CONFIG.make(), params, tmp_path / "m", dtype="float16", max_shard_bytes=3000)
    assert read_config(tmp_path / "m")["torch_dtype"] == "float16"
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 1 and {t.dtype for f in files for t in load_file(f).values()} == {np.dtype("float16")}


def test_what_is_beside_the_weights_can_come_along(tmp_path, params):
    (tmp_path / "from").mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "pytorch_model.bin", "modeling.py"):
        (tmp_path / "from" / name).write_text(name)
    save_pretrained(CONFIG.make(), params, tmp_path / "m", companions=tmp_path / "from")
    names = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert {p.name for p in (tmp_path / "m").iterdir()} == names


# ---- refusals


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(CheckpointError, match="no .*config.json"):
        from_pretrained(tmp_path / "gone")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no weights in it"):
        from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pytorch_model.bin and no safetensors"):
        from_pretrained(tmp_path)


def test_an_unsupported_option_is_refused_by_name_before_the_weights_are_looked_at(tmp_path, folder):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantization_config"):
        from_pretrained(tmp_path)


def test_a_config_and_weights_that_do_not_belong_together(tmp_path, folder):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3, "vocab_size": 33}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        from_pretrained(tmp_path)
    given = refusal.value.given
    assert "model.layers.2.mlp.up_proj.weight: missing" in given
    assert "model.embed_tokens.weight: shape [32, 16], expected [33, 16]" in given


def test_an_unknown_dtype_is_refused_first(folder):
    with pytest.raises(ConfigError, match="'int4'"):
        from_pretrained(folder, dtype="int4")


def test_parameters_of_another_module_are_not_saved(tmp_path, params):
    other = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="lm_head/kernel: in the model, not in the table"):
        save_pretrained(other.make(), params, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_names_are_public():
    assert {"from_pretrained", "save_pretrained", "supported_models"} <= set(mllm_jax.__all__)
