"""A folder of one model and a folder of several: both read by one engine, and indices that are refused."""

from __future__ import annotations

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from mllm_jax import from_pretrained, save_pretrained
from mllm_jax.checkpoints.components import DIFFUSERS_STEM, MODEL_INDEX, STEM, Component, component_of, components_of
from mllm_jax.checkpoints.hf import read_config, write_weights
from mllm_jax.checkpoints.safetensors_files import has_weights, read_folder
from mllm_jax.encoders import clip_text, vit_hf
from mllm_jax.errors import CheckpointError, ConfigError, MllmError
from mllm_jax.models.registry import abstract_params, family_of_config

WIDTHS = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
TEXT = clip_text.from_hf_config(dict(vocab_size=20, max_position_embeddings=6, **WIDTHS))
VISION = vit_hf.FAMILY.from_hf(dict(image_size=8, patch_size=4, **WIDTHS))
INDEX = {
    "_class_name": "SomePipeline",
    "_diffusers_version": "0.35.0",
    "requires_safety_checker": False,
    "vision": ["diffusers", "ViTModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "safety_checker": [None, None],
}


def random_params(config, seed):
    abstract = nn.meta.unbox(abstract_params(config, family_of_config(config)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), abstract)


def identical(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), one, other))


PARAMS = {"text_encoder": random_params(TEXT, 0), "vision": random_params(VISION, 1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns a folder in diffusers' form, made by hand from the folders of its models."""
    root = tmp_path_factory.mktemp("models") / "pipeline"
    save_pretrained(TEXT.make(), PARAMS["text_encoder"], root / "text_encoder")
    save_pretrained(VISION.make(), PARAMS["vision"], root / "vision")
    (root / "vision" / "model.safetensors").rename(root / "vision" / "diffusion_pytorch_model.safetensors")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    (root / MODEL_INDEX).write_text(json.dumps(INDEX))
    return root


@pytest.fixture
def pipeline(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "pipeline")


def index(folder, **entries):
    (folder / MODEL_INDEX).write_text(json.dumps({name: v for name, v in (INDEX | entries).items() if v is not ...}))


def refused(call, *arguments, kind=CheckpointError) -> str:
    with pytest.raises(MllmError) as refusal:
        call(*arguments)
    assert type(refusal.value) is kind and refusal.value.expected and refusal.value.todo
    return str(refusal.value)


# ---- several


def test_all_components_are_listed(whole):
    found = components_of(whole)
    assert [(c.name, c.class_name, c.stem) for c in found] == [
        ("vision", "ViTModel", DIFFUSERS_STEM),
        ("scheduler", "DDIMScheduler", STEM),
        ("text_encoder", "CLIPTextModel", STEM),
    ]
    assert [c.folder for c in found] == [whole / c.name for c in found]
    assert [c.has_config for c in found] == [has_weights(c) for c in found] == [True, False, True]


def test_each_is_read_by_the_one_engine(whole):
    read = {c.name: from_pretrained(c) for c in components_of(whole) if c.has_config}
    assert read.keys() == PARAMS.keys()
    for name, config in (("text_encoder", TEXT), ("vision", VISION)):
        module, params = read[name]
        assert module.config == config and identical(params, PARAMS[name])


@pytest.mark.parametrize("name,config", [("text_encoder", TEXT), ("vision", VISION)])
def test_a_subfolder_is_a_folder_of_one_model(whole, name, config):
    module, params = from_pretrained(str(whole / name))
    assert module.config == config and identical(params, PARAMS[name])


@pytest.mark.parametrize("stem", [STEM, DIFFUSERS_STEM])
def test_shards_of_either_stem_are_written_and_read(tmp_path, stem):
    component, family = Component(tmp_path / "m", stem), family_of_config(VISION)
    config = family.to_hf(VISION)
    write_weights(component, family.table(VISION), PARAMS["vision"], config=config, max_shard_bytes=1000)
    files = sorted(path.name for path in component.folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"{stem}-00001-of-{len(files):05}.safetensors"
    weight_map = json.loads((component.folder / f"{stem}.safetensors.index.json").read_text())["weight_map"]
    assert weight_map == {tensor: name for name in files for tensor in load_file(component.folder / name)}
    assert component_of(component.folder) == component
    assert identical(from_pretrained(component.folder)[1], PARAMS["vision"])
    write_weights(component, family.table(VISION), PARAMS["vision"], config=config, overwrite=True)
    assert sorted(path.name for path in component.folder.iterdir()) == ["config.json", f"{stem}.safetensors"]


def test_the_class_of_the_index_decides_where_the_config_names_none(pipeline):
    path = pipeline / "vision" / "config.json"
    values = json.loads(path.read_text())
    del values["architectures"], values["model_type"]
    vision = components_of(pipeline)[0]
    path.write_text(json.dumps(values))
    assert identical(from_pretrained(vision)[1], PARAMS["vision"])
    assert "architectures=None" in refused(from_pretrained, vision.folder, kind=ConfigError)


def test_the_class_of_a_config_of_diffusers_decides_without_an_index(pipeline):
    path = pipeline / "vision" / "config.json"
    values = json.loads(path.read_text())
    del values["architectures"], values["model_type"]
    path.write_text(json.dumps(values | {"_class_name": "ViTModel", "_records": 1}))
    assert identical(from_pretrained(pipeline / "vision")[1], PARAMS["vision"])
    path.write_text(json.dumps(values | {"_class_name": "ViTModel", "records": 1}))
    assert "records=1" in refused(from_pretrained, pipeline / "vision", kind=ConfigError)


# ---- one


def test_a_folder_of_one_is_its_own_component(whole):
    folder = whole / "text_encoder"
    assert components_of(folder) == (Component(folder),) == (component_of(folder),)
    assert read_config(Component(folder)) == read_config(folder) and read_folder(Component(folder)) == read_folder(
        folder
    )


def test_a_config_beside_an_index_makes_it_one(pipeline):
    save_pretrained(TEXT.make(), PARAMS["text_encoder"], pipeline.parent / "other")
    shutil.copytree(pipeline.parent / "other", pipeline, dirs_exist_ok=True)
    assert [c.name for c in components_of(pipeline)] == [""]
    assert identical(from_pretrained(pipeline)[1], PARAMS["text_encoder"])


def test_weights_of_both_stems_are_those_of_transformers(tmp_path):
    for stem in (DIFFUSERS_STEM, STEM):
        save_file({stem: np.zeros(1, np.float32)}, tmp_path / f"{stem}.safetensors")
    assert component_of(tmp_path).stem == STEM and list(read_folder(tmp_path)) == [STEM]


# ---- refusals


def test_several_are_not_read_as_one(whole):
    for call in (from_pretrained, read_config, read_folder, has_weights):
        given = refused(call, whole)
        assert "a folder of several models" in given and "vision, text_encoder" in given and "scheduler" not in given


@pytest.mark.parametrize(
    "text,shown", [("[]", "with a list"), ("{", "JSON"), ('{"_class_name": "X"}', "without a component")]
)
def test_an_index_that_is_none_is_refused(pipeline, text, shown):
    (pipeline / MODEL_INDEX).write_text(text)
    given = refused(components_of, pipeline)
    assert shown in given and MODEL_INDEX in given and "fetch the file again" in given


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO here")
def test_an_index_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / MODEL_INDEX)
    assert "not a regular file" in refused(components_of, tmp_path)


@pytest.mark.parametrize("entry", [[], ["diffusers"], ["diffusers", None], ["a", "b", "c"], [1, 2], ["diffusers", ""]])
def test_an_entry_without_a_class_is_refused(pipeline, entry):
    index(pipeline, vision=entry, text_encoder=["transformers"])
    given = refused(components_of, pipeline)
    assert f"vision={entry!r}" in given and "text_encoder=['transformers']" in given and "[library, class]" in given


@pytest.mark.parametrize("name", ["../other", "/etc", "a/b", "..", ".", "", "c:\\x", "a\x00b", "a\nb"])
def test_a_name_that_leaves_the_folder_is_refused(pipeline, name):
    save_pretrained(VISION.make(), PARAMS["vision"], pipeline.parent / "other")
    index(pipeline, **{name: ["diffusers", "ViTModel"]})
    assert f"{name!a}, which is not the name of a subfolder" in refused(components_of, pipeline)


def test_components_that_are_missing_are_all_listed(pipeline):
    shutil.rmtree(pipeline / "scheduler")
    index(pipeline, unet=["diffusers", "UNet2DConditionModel"])
    given = refused(components_of, pipeline)
    assert "without scheduler, unet" in given and "4 components" in given and "fetch the missing subfolders" in given


def test_a_class_that_nobody_reads_is_refused_and_the_others_are_read(pipeline):
    index(pipeline, vision=["diffusers", "Kandinsky3UNet"])
    vision, _, text = components_of(pipeline)
    given = refused(from_pretrained, vision, kind=ConfigError)
    assert "vision: a component of class 'Kandinsky3UNet'" in given and "read the other components" in given
    assert identical(from_pretrained(text)[1], PARAMS["text_encoder"])


def test_a_component_without_a_config_or_weights_is_refused(pipeline):
    vision, scheduler, _ = components_of(pipeline)
    assert "scheduler/config.json" in refused(from_pretrained, scheduler)
    (vision.folder / f"{DIFFUSERS_STEM}.safetensors").unlink()
    given = refused(from_pretrained, vision)
    assert f"{DIFFUSERS_STEM}.safetensors or" in given and "no weights in it" in given


def test_a_folder_with_an_index_may_be_overwritten(pipeline):
    save_pretrained(TEXT.make(), PARAMS["text_encoder"], pipeline, overwrite=True)
    assert sorted(path.name for path in pipeline.iterdir()) == ["config.json", "model.safetensors"]
