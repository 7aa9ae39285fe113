"""The published peaks by JAX's name of a device."""

from __future__ import annotations

import pytest

from mllm_jax.sharding.chips import peak_flops


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA Unheard-of", None),
        ("TPU v99", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, tflops):
    assert peak_flops(kind) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_float32_has_no_single_peak():
    assert peak_flops("TPU v4", "float32") is None
    assert peak_flops("TPU v4", "float16") == 275e12
