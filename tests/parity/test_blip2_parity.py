"""BLIP-2 with OPT and Flan-T5 against Blip2ForConditionalGeneration: images, logits, answers, folders both ways."""

from __future__ import annotations

import pytest
import transformers
from blip_reference import OPT, T5, Checks, build

from mllm_jax.errors import ConfigError
from mllm_jax.models.blip2 import pixel_reader

CASES = {
    "opt": dict(text=OPT, qformer={}, queries=5, eos=7, seed=0),
    "opt, cross-attention everywhere": dict(
        text=OPT | dict(num_hidden_layers=3),
        qformer=dict(cross_attention_frequency=1, num_hidden_layers=3, hidden_act="gelu_new"),
        queries=3,
        eos=45,
        seed=1,
    ),
    # BLIP-2's conversion runs Flan-T5 with the exact gelu, as its text_config says.
    "flan-t5": dict(text=T5 | dict(dense_act_fn="gelu"), qformer={}, queries=4, eos=7, seed=2),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, randomise):
    return build("Blip2", **CASES[request.param], randomise=randomise, folder=tmp_path_factory.mktemp("blip2"))


class TestBlip2(Checks):
    """Runs the tests shared with InstructBLIP."""


def test_a_stored_processor_of_another_size_is_refused(case, tmp_path):
    pixels = transformers.BlipImageProcessorPil(size=dict(height=8, width=8))
    pixels.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"of \(8, 8\) pixels"):
        pixel_reader(case.model.config.image.encoder, tmp_path)
