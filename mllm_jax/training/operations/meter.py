"""Speed: tokens and FLOPs a second of the last steps, and the published peaks of chips."""

from __future__ import annotations

import re
import time


class Meter:
    """Speed over the last steps; the first step, which compiles, is left out."""

    def __init__(self, flops: int, window: int = 50):
        self.flops, self.window = flops, window
        self.marks: list[tuple[float, int]] = []
        self.tokens_rate: float | None = None
        self.flops_rate: float | None = None

    def tick(self, tokens: int) -> None:
        self.marks = [*self.marks[-self.window :], (time.monotonic(), tokens)]
        if len(self.marks) > 1:
            seconds = self.marks[-1][0] - self.marks[0][0]
            self.tokens_rate = sum(tokens for _, tokens in self.marks[1:]) / seconds
            self.flops_rate = self.flops * (len(self.marks) - 1) / seconds

    def timing(self) -> dict[str, float]:
        if self.tokens_rate is None:
            return {}
        return {"tokens_per_second": self.tokens_rate, "flops_per_second": self.flops_rate}


# Dense bf16 TFLOP/s a JAX device, from the makers' data sheets (NVIDIA's headline figures count 2:4 sparsity: halved).
_TPU_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 2307.0 / 2,  # the sheet counts the chip, which JAX shows as two devices
}
# The first row whose words all stand in the device's name counts; a form factor therefore stands before the plain name.
_NVIDIA_TFLOPS = (
    (("A100",), 312.0),
    (("A30",), 165.0),
    (("A40",), 149.7),
    (("A10",), 125.0),
    (("L4",), 121.0),
    (("L40",), 181.05),
    (("L40S",), 362.05),
    (("H100", "PCIE"), 756.5),
    (("H100", "NVL"), 835.5),
    (("H100", "HBM3"), 989.4),
    (("H200", "NVL"), 835.5),
    (("H200",), 989.4),
    (("GH200",), 989.4),
    (("B200",), 2250.0),
    (("GB200",), 2500.0),
)


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Published dense peak of one JAX device, in FLOP/s; None where no single figure holds.

    That is: CPUs, unknown devices, slices of a GPU (MIG), and dtypes other than bfloat16 and float16 (the rate of a
    float32 product hangs on the matmul precision that XLA is allowed).

    Args:
        device_kind: `jax.devices()[0].device_kind`.
        dtype: the dtype that the matrix products are computed in.
    """
    if str(dtype) not in ("bfloat16", "float16"):
        return None
    if device_kind in _TPU_TFLOPS:
        return _TPU_TFLOPS[device_kind] * 1e12
    words = set(re.split(r"[^A-Z0-9]+", device_kind.upper()))
    if "NVIDIA" not in words or "MIG" in words:
        return None
    return next((tflops * 1e12 for names, tflops in _NVIDIA_TFLOPS if words.issuperset(names)), None)
