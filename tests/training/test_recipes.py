"""A change of one size or of the dtype gives a consistent model: configs have each of them once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import ROOT
from toy_data import DUAL, IMAGES, MODEL, PAIRS

from mllm_jax import Compute, ConfigError, Experiment, PFormerConfig, PromptGuidedConfig, Stage, TokenizerConfig
from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.cli.config_help import parsed
from mllm_jax.cli.train import Train
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.llava import from_hf_config, to_hf_config
from mllm_jax.models.part_names import part_differences
from mllm_jax.models.registry import abstract_init
from mllm_jax.training.config_file import load_config
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.objectives.pformer_losses import PromptGuided

OPEN = replace(DUAL, vision=None, text=replace(DUAL.text, vocab_size=None))
TALK = Stage("talk", NextToken(), ("llm/*",), IMAGES, steps=1)
LEARN = Stage("contrastive", Contrastive(), ("encoder_image/*",), PAIRS, steps=1, model=OPEN)
EXPERIMENT = Experiment("recipe", MODEL, (TALK, LEARN))


@pytest.fixture(scope="module", params=["quickstart", "smoke"])
def shipped(request) -> Train:
    return Train(load_config(ROOT / "configs" / f"{request.param}.py"))


def changed(shipped: Train, *options: str) -> Experiment:
    return parsed("train", shipped, [shipped.experiment.name, *options]).experiment


def test_another_width_of_the_llm_is_one_option(shipped):
    experiment = changed(shipped, "--model.llm.hidden-size", "64")
    assert experiment.model.image.projector.output_size == 64
    for stage in experiment.stages:  # a clash of widths is found when parameters are made
        model = experiment.model_of(stage).make()
        assert abstract_init(model, model.config.batch_spec().empty(), method="touch")


def test_another_vocabulary_is_one_option(shipped):
    experiment = changed(shipped, "--model.llm.vocab-size", "700")
    dual = next(experiment.model_of(stage) for stage in experiment.stages if stage.name == "contrastive")
    assert experiment.vocab_size == dual.parts["encoder_text"].vocab_size == 700


def test_another_image_encoder_is_one_option(shipped):
    experiment = changed(shipped, "--model.inputs.image.encoder.mlp-size", "48")
    assert [model.parts["encoder_image"].mlp_size for model in experiment.compositions] == [48, 48]


def test_the_dtype_is_one_option(shipped):
    experiment = changed(shipped, "--model.compute.dtype", "bfloat16", "--model.llm.compute.remat", "full")
    found = {name: part.compute for model in experiment.compositions for name, part in model.parts.items()}
    assert {compute.dtype for compute in found.values()} == {"bfloat16"} and len(found) == 4
    assert found["llm"].remat == "full" and found["projector_image"].remat is None
    assert rebuild(describe(experiment.model)) == experiment.model


def test_an_unknown_dtype_is_refused(shipped):
    with pytest.raises(ConfigError, match="dtype 'int4'"):
        changed(shipped, "--model.compute.dtype", "int4")


@pytest.mark.parametrize("name,size", [("quickstart", "1024"), ("smoke", "512")])
def test_the_vocabulary_is_written_once(name, size):
    assert (ROOT / "configs" / f"{name}.py").read_text().count(size) == 1


# ---- open fields of a stage's composition


def test_a_stages_composition_takes_what_it_leaves_open_from_the_experiment():
    experiment = replace(EXPERIMENT, model=replace(MODEL, compute=Compute(dtype="bfloat16", scan_unroll=2)))
    model = experiment.model_of(LEARN)
    assert model.vision == experiment.model.parts["encoder_image"] and model.text.vocab_size == MODEL.llm.vocab_size
    assert {part.dtype for part in model.parts.values()} == {"bfloat16"}
    own = replace(LEARN, model=replace(OPEN, compute=Compute(dtype="float32")))
    assert replace(experiment, stages=(own,)).model_of(own).parts["encoder_text"].dtype == "float32"
    assert experiment.stages[1].model == OPEN, "nothing is stored"


def test_a_prompter_stands_beside_the_experiments_model():
    prompter = PFormerConfig(hidden_size=8, num_layers=1, num_heads=2, mlp_size=8, num_queries=4, max_length=24)
    stage = Stage(
        "guided", PromptGuided(), ("projector_image/*",), PAIRS, steps=1, model=PromptGuidedConfig(prompter=prompter)
    )
    experiment = replace(EXPERIMENT, stages=(replace(stage, data=replace(PAIRS, captions=1)),))
    assert experiment.model_of(experiment.stages[0]).model == MODEL and "prompter" in experiment.parts


def test_a_whole_model_is_compared_with_nothing_left_open():
    """Checks that a config with open widths equals a folder's config, which has every width."""
    config = load_config(ROOT / "configs" / "llava15_7b.py")
    theirs = from_hf_config(to_hf_config(config.model))
    assert theirs.image.projector.output_size == 4096 and config.model.inputs["image"].projector.output_size is None
    assert not part_differences(theirs, config.model_of())


def test_the_vocabulary_is_the_least_that_a_part_has():
    held = replace(LEARN, model=replace(OPEN, text=replace(DUAL.text, vocab_size=300)))
    assert replace(EXPERIMENT, stages=(held,)).vocab_size == 300
    assert replace(EXPERIMENT, tokenizer=TokenizerConfig(310)).model_of(LEARN).text.vocab_size == 310
    alone = DualEncoderConfig(MODEL.image.encoder, TextTowerConfig(hidden_size=8, num_layers=0), captions=2)
    assert Experiment("alone", alone, (replace(LEARN, model=None),)).model_of().text.vocab_size == 1024


def test_a_dual_encoder_without_images_is_refused():
    alone = replace(OPEN, pooling="pooler")
    with pytest.raises(ConfigError, match="vision None, of a part by itself"):
        Experiment("alone", alone, (replace(LEARN, model=None),)).model_of().make()


# ---- configs of full size


FULL_SIZE = (
    "llava15_7b",
    "llava_next",
    "qwen25vl_7b",
    "qwen2_audio_7b",
    "xllm_speech",
    "internvl3_8b",
    "internvl25_78b",
    "deepseek_vl_7b",
    "blip2_flant5xl",
    "instructblip_vicuna7b",
)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_config_fits_where_it_says(name):
    """Checks the minimum memory of a device, on the slice of the command at the top of the file."""
    from mllm_jax.planning.arithmetic import least_bytes
    from mllm_jax.planning.topologies import topology
    from mllm_jax.sharding.logical import AXES
    from mllm_jax.sharding.mesh import MeshConfig, mesh_sizes

    path = Path("configs") / f"{name}.py"
    [command] = [line for line in (ROOT / path).read_text().splitlines() if line.startswith(f"mllm plan {path} ")]
    experiment, where = load_config(ROOT / path), topology(command.split()[-1])
    sizes = mesh_sizes(experiment.mesh, where.devices)
    on_it = replace(experiment, mesh=MeshConfig(**dict(zip(AXES, sizes, strict=True))))
    assert {part.dtype for part in experiment.model.parts.values()} == {"bfloat16"}
    for stage in experiment.stages:
        assert stage.data.rows % (stage.accumulate * sizes[0] * sizes[1]) == 0
    last = len(experiment.stages) - 1
    assert 0 < least_bytes(on_it, last) < where.chip.device_hbm
