"""Generators that begin with diffusers' folders: whole pipelines, and text encoder, UNet or autoencoder alone."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_diffusion as tiny
from flax.traverse_util import flatten_dict
from tiny_drawing import MAPPER
from toy_data import IMAGES, MODEL, quick_compilation

import mllm_jax
from mllm_jax import AdamW, Experiment, NextToken, Output, Pretrained, Stage, TokenizerConfig
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.models.params import placed_params
from mllm_jax.models.part_sources import read_source, reshaped_paths
from mllm_jax.models.run_weights import initial_meta, load_run
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.loop import train
from mllm_jax.training.partition import join

PARTS = ("generator_image/text_encoder", "generator_image/unet", "generator_image/vae")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns two folders of pipelines that differ in their weights."""
    base = tmp_path_factory.mktemp("pipelines")
    for number, name in enumerate(("one", "two")):
        tiny.write(base / name, **tiny.SMALL, seed=10 * number)
    return base / "one", base / "two"


def experiment(folder, *sources: Pretrained, **changes) -> Experiment:
    generator = replace(mllm_jax.pretrained_config(folder), **changes)
    projector = replace(MAPPER, output_tokens=generator.longest, output_size=generator.condition_size)
    output = Output(projector, generator, tokenizer=str(folder / "tokenizer"))
    return Experiment(
        name="drawing",
        model=replace(MODEL, outputs={"image": output}),
        tokenizer=TokenizerConfig(vocab_size=320),
        pretrained=sources,
        stages=(Stage("align", NextToken(), ("projector_image/*",), IMAGES, 1, AdamW()),),
    )


def begun(made: Experiment) -> dict[str, np.ndarray]:
    """Returns what the sources give of the generator."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    placed = placed_params(made.model_of().make(), mesh)
    read = [read_source(source, made, mesh, placed) for source in made.pretrained]
    return flat(join(*read)["generator_image"])


def flat(params) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}


def of_folder(folder) -> dict[str, np.ndarray]:
    return flat(mllm_jax.from_pretrained(folder)[1])


def same(found: dict, expected: dict, part: str = "") -> bool:
    paths = [path for path in expected if path.startswith(part)]
    assert paths and set(paths) == {path for path in found if path.startswith(part)}
    return all(np.array_equal(found[path], expected[path]) for path in paths)


def test_a_whole_pipeline(folders):
    """Checks that the sampler and the size of images, on which no weights depend, may differ from the folder's."""
    one = folders[0]
    sampler = replace(mllm_jax.pretrained_config(one).scheduler, num_train_timesteps=50)
    made = experiment(one, Pretrained("generator_image", str(one)), scheduler=sampler, image_size=32)
    assert same(begun(made), of_folder(one))
    assert not reshaped_paths(made.pretrained[0], made)


def test_parts_of_several_folders(folders):
    """Reads the text encoder from a pipeline's folder, and the UNet from a folder of its own."""
    one, two = folders
    sources = Pretrained(PARTS[0], str(one)), Pretrained(PARTS[1], str(two / "unet"))
    found = begun(experiment(one, *sources))
    assert same(found, of_folder(one), "text_encoder/") and same(found, of_folder(two), "unet/")
    assert not same(found, of_folder(one), "unet/") and not any(path.startswith("vae/") for path in found)


def test_a_part_is_read_without_the_others(folders, tmp_path):
    """Checks that the weights of the UNet may be absent where the text encoder alone is read."""
    tiny.write(tmp_path / "pipeline", **tiny.SMALL)
    (tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    made = experiment(folders[0], Pretrained(PARTS[0], str(tmp_path / "pipeline")))
    assert same(begun(made), of_folder(folders[0]), "text_encoder/")


@pytest.mark.parametrize("names", [("generator_image/unett",), ("generator_image", PARTS[1]), (PARTS[1], PARTS[1])])
def test_names_that_cannot_be_are_refused_with_those_that_can(folders, names):
    with pytest.raises(ConfigError) as refusal:
        experiment(folders[0], *(Pretrained(name, str(folders[0])) for name in names))
    assert str(list(names)) in refusal.value.given and all(f"'{part}'" in refusal.value.expected for part in PARTS)


def test_weights_of_another_part_are_refused(folders):
    one = folders[0]
    with pytest.raises(ConfigError, match="model.generator_image/unet, which is another model"):
        begun(experiment(one, Pretrained(PARTS[1], str(one / "vae"))))
    other = mllm_jax.pretrained_config(one)
    made = experiment(one, Pretrained("generator_image", str(one)), vae=replace(other.vae, layers_per_block=3))
    with pytest.raises(ConfigError, match=r"another model:\n  vae\.layers_per_block"):
        begun(made)
    with pytest.raises(ConfigError, match="without a part 'vae'") as refusal:
        index = one.parent / "cut"
        tiny.write(index, **tiny.SMALL)
        text = (index / "model_index.json").read_text()
        (index / "model_index.json").write_text(text.replace('"vae"', '"_vae"'))
        (index / "vae").rename(index / "_vae")
        begun(experiment(one, Pretrained(PARTS[2], str(index))))
    assert "unet" in refusal.value.expected


def test_a_run_refers_to_parts_and_hands_them_on(folders, tmp_path):
    """Checks what a run stores, that it opens with the folder's weights, and that a later run takes a part of it."""
    one, one_device = folders[0], jax.devices()[:1]
    tiny.write(tmp_path / "pipeline", **tiny.SMALL)
    sources = [Pretrained(part, str(tmp_path / "pipeline")) for part in PARTS[:2]]
    made = experiment(one, *sources)
    parts = ("projector_image/*", "generator_image/unet/*")
    trained = replace(made.stages[0], trainable=parts, optimizer=AdamW(warmup_steps=0))
    run = train(replace(made, stages=(trained,)), tmp_path / "run", devices=one_device)
    stored, every = (set(initial_meta(run)[name]) for name in ("stored", "fingerprint"))
    assert every - stored == {path for path in every if path.startswith(PARTS[:2])}
    found = flat(load_run(run, one_device)[2]["generator_image"])
    assert same(found, of_folder(one), "text_encoder/") and not same(found, of_folder(one), "unet/")
    assert same(begun(experiment(one, Pretrained(PARTS[1], str(run.path), stage="align"))), found, "unet/")
    (tmp_path / "pipeline").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="pipeline"):
        load_run(RunFolder(run.path), one_device)
