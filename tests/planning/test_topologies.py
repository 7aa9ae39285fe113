"""Names of slices and their meaning."""

import pytest

from mllm_jax.errors import PlanError
from mllm_jax.planning.topologies import topology
from mllm_jax.sharding.chips import GPUS, TPUS


@pytest.mark.parametrize(
    "name, libtpu, chips, devices",
    [
        ("v5e-256", "v5e:16x16", 256, 256),
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("v6e-256", "v6e:16x16", 256, 256),
        ("v5p-128", "v5p:4x4x4", 64, 64),  # the number counts TensorCores
        ("v4-8", "v4:2x2x1", 4, 4),
        ("v7x-128", "tpu7x:4x4x4", 64, 128),  # a chip has two JAX devices
        ("tpu7x-128", "tpu7x:4x4x4", 64, 128),
        ("v5p-4x4x8", "v5p:4x4x8", 128, 128),
        ("2xv5e-256", "v5e:16x16", 512, 512),
    ],
)
def test_names_of_slices(name, libtpu, chips, devices):
    found = topology(name)
    assert (found.libtpu_name, found.chips, found.devices) == (libtpu, chips, devices)


def test_one_spelling_of_a_name():
    assert topology("v5p-4x4x4").name == topology("V5P-128").name == "v5p-128"
    assert topology("2xtpu7x-128").name == "2xv7x-128"
    assert topology("v5p-4x4x20").name == "v5p-4x4x20"


def test_several_slices():
    two = topology("2xv5p-128")
    assert two.slices == 2 and two.chips_a_slice == 64 and two.libtpu_options["num_slices"] == 2


def test_gpus_come_in_nodes():
    assert topology("64xh100").slices == 8 and topology("64xh100").chips == 64
    assert topology("h200").chips == 1 and not topology("h200").is_tpu
    with pytest.raises(PlanError, match="whole nodes of 8"):
        topology("12xh100")


@pytest.mark.parametrize(
    "name", ["v5e-250", "v5p-130", "v5p-65", "v9-8", "", "v5e", "v5e-4x4x4", "0xv5e-256", "h100-8"]
)
def test_unknown_names_are_refused_with_those_that_are_known(name):
    with pytest.raises(PlanError, match="topology"):
        topology(name)


def test_what_wraps():
    assert topology("v5e-256").wraps(0) and not topology("v5e-64").wraps(0)
    assert topology("v5p-128").wraps(2) and not topology("v5p-16").wraps(0)


def test_every_chip_has_all_its_figures():
    for chip in (*TPUS.values(), *GPUS.values()):
        numbers = (chip.flops, chip.hbm, chip.hbm_bandwidth, chip.link_bandwidth, chip.dcn_bandwidth)
        assert all(number > 0 for number in numbers)
        assert chip.flops / chip.hbm_bandwidth > 100  # FLOPs per byte; else a digit is wrong
