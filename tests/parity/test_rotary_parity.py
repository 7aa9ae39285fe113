"""Rotary frequencies and the attention factor against transformers' own, far from the defaults."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mllm_jax.layers.rotary import RopeScaling, rotary_angles, rotary_frequencies

YARN = dict(factor=8.0, original_max_position_embeddings=64)
CASES = {
    "linear": dict(factor=2.5),
    "dynamic": dict(factor=3.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "llama3 narrow": dict(factor=32.0, low_freq_factor=2.0, high_freq_factor=2.5, original_max_position_embeddings=99),
    "yarn": YARN,
    "yarn betas": YARN | dict(beta_fast=6.0, beta_slow=0.25),
    "yarn not truncated": YARN | dict(truncate=False, beta_fast=8.0),
    "yarn attention": YARN | dict(attention_factor=0.7, mscale=2.0, mscale_all_dim=3.0),
    "yarn mscale": YARN | dict(mscale=0.707, mscale_all_dim=1.3),
    "yarn one mscale": YARN | dict(mscale=0.707),
    "yarn step": dict(factor=2.0, original_max_position_embeddings=4),  # the ramp has no width
    "yarn shrinking": dict(factor=0.5, original_max_position_embeddings=64),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head_dim", (32, 12))
def test_frequencies(case, head_dim):
    kind = case.split()[0]
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters=dict(rope_type=kind, rope_theta=5000.0, **CASES[case]),
    )
    options = CASES[case] | ({"original_max_position_embeddings": 128} if kind == "dynamic" else {})
    scaling = RopeScaling(kind, **options)
    default = np.asarray(rotary_frequencies(head_dim, 5000.0))
    for length in (100, 300):
        theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=torch.tensor(length))
        ours = np.asarray(rotary_frequencies(head_dim, 5000.0, scaling, np.array(length)))
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6)
        assert scaling.amplitude == pytest.approx(float(factor), rel=1e-7)
        assert (np.abs(ours / default - 1).max() > 1e-2) == (kind != "dynamic" or length > 128)


def test_the_factor_multiplies_cosines_and_sines():
    positions = np.array([[0, 3, 50]])
    plain = rotary_angles(positions, 8, 100.0, RopeScaling("yarn", 4.0, 16, attention_factor=1.0))
    scaled = rotary_angles(positions, 8, 100.0, RopeScaling("yarn", 4.0, 16, attention_factor=0.6))
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(0.6 * one, other, rtol=1e-6)
