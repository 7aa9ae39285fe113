"""Parts that begin with those inside a whole model's folder."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import linen as nn
from toy_data import IMAGES, MODEL

import mllm_jax
from mllm_jax import AdamW, Branch, Experiment, NextToken, Stage, TokenizerConfig
from mllm_jax.encoders.whisper import WhisperEncoderConfig
from mllm_jax.errors import ConfigError
from mllm_jax.llms.whisper_decoder import WhisperDecoderConfig
from mllm_jax.models.part_sources import reshaped_paths
from mllm_jax.models.whisper import WhisperConfig
from mllm_jax.projectors.stacked import StackedProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config import Pretrained
from mllm_jax.training.pretrained import initial_params

WHISPER = WhisperConfig(
    WhisperEncoderConfig(8, 16, num_layers=1, num_heads=2, mlp_size=32, max_source_positions=100),
    WhisperDecoderConfig(
        64, 16, 1, 2, 32, max_position_embeddings=8, bos_token_id=1, eos_token_id=(1,), pad_token_id=1
    ),
)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """Returns the folder of a whole Whisper, and its parameters."""
    folder, model = tmp_path_factory.mktemp("whisper") / "folder", WHISPER.make()
    params = jax.jit(model.init)(jax.random.key(3), np.zeros((1, 8, 200), np.float32), np.zeros((1, 2), np.int32))
    mllm_jax.save_pretrained(model, params["params"], folder)
    return folder, nn.meta.unbox(params["params"])


def experiment(folder, encoder) -> Experiment:
    sound = Branch(encoder, StackedProjectorConfig(hidden_size=16), seconds=1)
    return Experiment(
        name="hearing",
        model=replace(MODEL, inputs={**MODEL.inputs, "audio": sound}),
        tokenizer=TokenizerConfig(vocab_size=320),
        pretrained=(Pretrained("encoder_audio", str(folder)),),
        stages=(Stage("align", NextToken(), ("projector_*",), IMAGES, 1, AdamW()),),
    )


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_the_encoder_inside_a_whole_model(whisper):
    folder, params = whisper
    hearing = experiment(folder, mllm_jax.pretrained_config(folder).parts["encoder_audio"])
    assert not reshaped_paths(hearing.pretrained[0], hearing)
    found = initial_params(hearing, one_device())[0]
    jax.tree.map(np.testing.assert_array_equal, found["encoder_audio"], params["encoder_audio"])
    assert set(found) == {"encoder_image", "projector_image", "encoder_audio", "projector_audio", "llm"}


def test_another_encoder_than_the_one_inside_is_refused(whisper):
    folder, _ = whisper
    with pytest.raises(ConfigError, match="model.encoder_audio, which is another model:\n  mlp_size"):
        initial_params(
            experiment(folder, replace(WHISPER.audio, mlp_size=48)), make_mesh(MeshConfig(), jax.devices()[:1])
        )
