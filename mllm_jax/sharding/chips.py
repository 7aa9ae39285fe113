"""The one table of chips: each figure with its public source."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The figures of one chip. Bandwidths are bytes/s.

    Attributes:
        flops: FLOP/s in bf16, dense.
        hbm: bytes of HBM, as the vendor states them.
        usable_hbm: bytes that a program may use, from the errors of libtpu 0.0.42; None: all.
        link_bandwidth: bandwidth of one link of a chip to a neighbour, in one direction.
        links: number of links of a chip; two along each axis of the torus. 0: a switch joins the chips of a node.
        dcn_bandwidth: a chip's share of its host's network, in one direction.
        efficiency: share of the roofline that published runs reach, one factor per generation, fitted by
            benchmarks/plan_calibration.py; 1: no published run was fitted.
        devices: number of JAX devices of a chip; each has an equal share of everything.
        node: number of GPUs that a switch joins; other GPUs are reached over the network.
    """

    name: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    links: int
    dcn_bandwidth: float
    usable_hbm: float | None = None
    efficiency: float = 1.0
    devices: int = 1
    node: int | None = None

    @property
    def device_hbm(self) -> float:
        """Returns the bytes that a program may use on one device."""
        return (self.usable_hbm or self.hbm) / self.devices

    @property
    def axes(self) -> int:
        return self.links // 2


# TPUs. FLOP/s, HBM and its bandwidth: the tables of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. The same tables
# give the interconnect of a whole chip: v4 2400 Gbit/s, v5e 1600 Gbit/s, v5p 4800 Gbit/s, v6e 3200 Gbit/s in one
# direction, tpu7x 1200 GB/s in both. Over 6, 4, 6, 4 and 6 links that is 50, 50, 100, 100 and 100 GB/s a link. The
# scaling book (jax-ml.github.io/scaling-book/tpus) measures 45 for v4, and has 25 GB/s of network for a host. Hosts of
# v4, v5p and tpu7x have 4 chips, those of v5e and v6e in large slices 4 (ct5lp-hightpu-4t, ct6e-standard-4t).
_HOST_NETWORK = 25e9
TPUS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1.2e12, 45e9, 6, _HOST_NETWORK / 4, 30.75 * GIB),
    "v5e": Chip("TPU v5e", 197e12, 16 * GIB, 0.81e12, 50e9, 4, _HOST_NETWORK / 4, 15.75 * GIB, 0.796),
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 2.765e12, 100e9, 6, _HOST_NETWORK / 4, 95.74 * GIB, 0.777),
    "v6e": Chip("TPU v6e", 918e12, 32 * GIB, 1.64e12, 100e9, 4, _HOST_NETWORK / 4, 31.25 * GIB, 0.568),
    # A chip is two dies, each with half of everything, and has two JAX devices (docs, "programming model").
    "v7x": Chip("TPU7x", 2307e12, 192 * GIB, 7.38e12, 100e9, 6, _HOST_NETWORK / 4, 2 * 94.75 * GIB, devices=2),
}

# GPUs: NVIDIA's data sheets of A100 SXM 80GB, H100 SXM, H200 SXM and HGX B200, bf16 without sparsity; NVLink 3, 4, 4,
# 5 in one direction (half of the 600, 900, 900 and 1800 GB/s that the sheets give for both); one network adapter a GPU
# as in DGX: ConnectX-6 200 Gbit/s for A100, ConnectX-7 400 Gbit/s for the others.
GPUS = {
    "a100": Chip("A100 80GB", 312e12, 80e9, 2.039e12, 300e9, 0, 25e9, node=8),
    "h100": Chip("H100", 989.4e12, 80e9, 3.35e12, 450e9, 0, 50e9, node=8),
    "h200": Chip("H200", 989.4e12, 141e9, 4.8e12, 450e9, 0, 50e9, node=8),
    "b200": Chip("B200", 2250e12, 180e9, 7.7e12, 900e9, 0, 50e9, node=8),
}

# `jax.devices()[0].device_kind` of each.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}
# FLOP/s in bf16 without sparsity by the words of a device's name, from NVIDIA's data sheets (their headline figures
# include 2:4 sparsity, so they are halved). The first row whose words are all in the name applies; a form factor
# therefore comes before the plain name.
_NVIDIA_FLOPS = (
    (("A100",), GPUS["a100"].flops),
    (("A30",), 165e12),
    (("A40",), 149.7e12),
    (("A10",), 125e12),
    (("L4",), 121e12),
    (("L40",), 181.05e12),
    (("L40S",), 362.05e12),
    (("H100", "PCIE"), 756.5e12),
    (("H100", "NVL"), 835.5e12),
    (("H100", "HBM3"), GPUS["h100"].flops),
    (("H200", "NVL"), 835.5e12),
    (("H200",), GPUS["h200"].flops),
    (("GH200",), 989.4e12),
    (("B200",), GPUS["b200"].flops),
    (("GB200",), 2500e12),
)


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Returns the published dense peak of one JAX device, in FLOP/s; None where no single figure holds.

    That is the case for CPUs, unknown devices, slices of a GPU (MIG), and dtypes other than bfloat16 and float16 (the
    rate of a float32 product depends on the matmul precision that XLA may use).

    Args:
        device_kind: `jax.devices()[0].device_kind`.
        dtype: dtype of the matrix products.
    """
    if str(dtype) not in ("bfloat16", "float16"):
        return None
    if device_kind in _TPU_KINDS:
        chip = TPUS[_TPU_KINDS[device_kind]]
        return chip.flops / chip.devices
    words = set(re.split(r"[^A-Z0-9]+", device_kind.upper()))
    if "NVIDIA" not in words or "MIG" in words:
        return None
    return next((flops for names, flops in _NVIDIA_FLOPS if words.issuperset(names)), None)
