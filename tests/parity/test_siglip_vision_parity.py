"""SigLIP's vision encoder against SiglipVisionModel."""

from __future__ import annotations

import pytest
import transformers
from vision_checks import check_transformers, family_of

from mllm_jax.encoders import siglip_vision
from mllm_jax.errors import ConfigError

FAMILY = family_of(siglip_vision, "SiglipVisionModel")
SIZES = dict(
    hidden_size=36, num_hidden_layers=2, num_attention_heads=4, intermediate_size=50, image_size=20, patch_size=4
)
CASES = {
    "so400m": dict(image_size=23),  # like 384 pixels, which are 27 patches of 14 and 6 pixels more
    "exact gelu": dict(hidden_act="gelu", layer_norm_eps=0.1, num_attention_heads=3),
    "no head": dict(vision_use_head=False, num_channels=4),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_folders(case, randomise, assert_close, tmp_path):
    config = transformers.SiglipVisionConfig(**SIZES | CASES[case], attn_implementation="eager")
    reference = randomise(transformers.SiglipVisionModel(config))
    sizes = [(20, 20), (16, 30), (8, 12)]
    check_transformers(reference, FAMILY, tmp_path, assert_close, sizes, interpolate_pos_encoding=True)


def test_a_head_dimension_of_72_as_so400m_has_it(randomise, assert_close, tmp_path):
    config = transformers.SiglipVisionConfig(
        **SIZES | dict(hidden_size=144, num_attention_heads=2, num_hidden_layers=1)
    )
    reference = randomise(transformers.SiglipVisionModel(config))
    check_transformers(reference, FAMILY, tmp_path, assert_close, [(20, 20)], interpolate_pos_encoding=True)


def test_options_that_cannot_be_honoured_are_refused_by_name():
    with pytest.raises(ConfigError, match="num_patches=256"):
        FAMILY.from_hf(dict(architectures=["SiglipVisionModel"], num_patches=256))
