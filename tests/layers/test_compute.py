"""The way parts are computed: values that are filled, refused, and changed at once."""

from __future__ import annotations

import dataclasses

import pytest

from mllm_jax import Compute, ConfigError
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.layers.compute import with_compute, within
from mllm_jax.llms.decoder import DecoderConfig

LLM = DecoderConfig(vocab_size=8)


def test_what_nobody_says_is_float32_without_remat_and_unrolling():
    assert (LLM.compute, LLM.dtype, LLM.remat, LLM.scan_unroll) == (Compute(), "float32", "none", 1)


def test_a_part_takes_what_it_leaves_open_from_outside():
    outer = Compute(dtype="bfloat16", remat="full")
    own = dataclasses.replace(LLM, compute=Compute(remat="dots", scan_unroll=2))
    assert within(own, outer).compute == Compute("bfloat16", "dots", 2)
    assert within(LLM, outer).compute == outer and within("image", outer) == "image"


@pytest.mark.parametrize(
    "wrong,given",
    [
        (dict(dtype="int4"), "dtype 'int4'"),
        (dict(remat="sometimes"), "remat 'sometimes'"),
        (dict(scan_unroll=0), "scan_unroll 0"),
    ],
)
def test_unknown_values_are_refused(wrong, given):
    with pytest.raises(ConfigError, match=given):
        Compute(**wrong)


def test_a_change_holds_in_every_part_and_keeps_the_rest():
    @dataclasses.dataclass(frozen=True)
    class Pair:
        named: dict
        llm: DecoderConfig

    eye = ViTConfig(compute=Compute(dtype="float16", scan_unroll=3))
    changed = with_compute(Pair({"eye": eye, "shared": "eye"}, LLM), dtype="bfloat16")
    assert changed.named == {"eye": dataclasses.replace(eye, compute=Compute("bfloat16", None, 3)), "shared": "eye"}
    assert changed.llm.dtype == "bfloat16" and LLM.dtype == "float32"
