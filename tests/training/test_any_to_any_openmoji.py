"""configs/any_to_any_openmoji.py: two variants of one generator, whose text encoder reads the shared tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mllm_jax.errors import ConfigError
from mllm_jax.models.output import names_of_signals
from mllm_jax.training import pretrained
from mllm_jax.training.config_file import load_config
from mllm_jax.training.objectives.diffusion import Diffusion
from mllm_jax.training.objectives.output_alignment import OutputAlignment
from mllm_jax.training.partition import trains

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def variants():
    names = ("any_to_any_openmoji", "any_to_any_openmoji_connector")
    return [load_config(CONFIGS / f"{name}.py") for name in names]


def test_the_variants_share_all_but_the_output_projector(variants):
    mapper, connector = variants
    assert mapper.pretrained == connector.pretrained and mapper.evaluation == connector.evaluation
    assert mapper.tokenizer == connector.tokenizer
    differ = {name for name in mapper.parts if mapper.parts[name] != connector.parts[name]}
    assert differ == {"output_projector_image"}
    (base,) = {source.made_by for source in mapper.pretrained}
    known = {name for names in names_of_signals(base.model_of()).values() for name in names}
    for experiment in variants:
        assert known >= {name for names in names_of_signals(experiment.model_of()).values() for name in names}
        last = experiment.stages[-1]
        frozen = ("generator_image", "encoder_image")
        assert not any(trains(stage.trainable, part) for stage in experiment.stages for part in frozen)
        assert isinstance(last.objective, OutputAlignment if experiment is mapper else Diffusion)
    assert trains(base.stages[0].trainable, "generator_image") and base.stages[0].ema


def test_a_generator_with_another_tokenizer_is_refused(variants, monkeypatch):
    (experiment,) = variants[:1]
    vocabulary = {"a": 0, "<image_0>": 1}

    def tokenizer(words):
        return SimpleNamespace(backend=SimpleNamespace(get_vocab=lambda: words))

    monkeypatch.setattr(pretrained, "tokenizer_in", lambda folder: tokenizer(vocabulary))
    only = [source for source in experiment.pretrained if source.part == "generator_image"]
    experiment = replace(experiment, pretrained=tuple(only))
    pretrained.require_words(experiment, tokenizer(vocabulary))
    with pytest.raises(ConfigError, match="generator_image of .* with another tokenizer"):
        pretrained.require_words(experiment, tokenizer({"a": 1, "<image_0>": 0}))
    model = experiment.model
    own = replace(model.outputs["image"], tokenizer="folder")  # the text encoder's own reads other ids anyway
    other = SimpleNamespace(model=replace(model, outputs={"image": own}), pretrained=experiment.pretrained)
    pretrained.require_words(other, tokenizer({"a": 1}))
