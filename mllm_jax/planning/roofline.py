"""The shortest time of a step: computing, HBM traffic and communication, each at the chips' rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mllm_jax.planning.hlo import Account, Collective
from mllm_jax.planning.topologies import Topology


@dataclass(frozen=True)
class Roofline:
    """Seconds a step on one device.

    Attributes:
        compute, hbm, ici, dcn: time of each alone, at the full rate.
        efficiency: share of the bound that published runs reach on such chips.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float
    efficiency: float = 1.0

    @property
    def overlapped(self) -> float:
        """Returns the time if everything overlaps perfectly: the slowest of them."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def serial(self) -> float:
        """Returns the time if nothing overlaps."""
        return self.compute + self.hbm + self.ici + self.dcn

    @property
    def expected(self) -> float:
        """Returns the bound divided by the efficiency of published runs."""
        return self.overlapped / self.efficiency

    @property
    def bound(self) -> str:
        """Returns the name of the slowest, which bounds the step if everything overlaps."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))


def roofline(counted: Account, topology: Topology, coordinates: Sequence[Sequence[int]] | None = None) -> Roofline:
    """Returns the times of a counted step.

    Args:
        coordinates: coordinates of each partition's chip in its slice, in the order of the mesh's devices; None: each
            collective uses all links of a chip.
    """
    chip = topology.chip
    share = 1 / chip.devices
    return Roofline(
        compute=counted.flops / (chip.flops * share),
        hbm=counted.hbm_bytes / (chip.hbm_bandwidth * share),
        ici=sum(c.ici_bytes / (bandwidth(c, topology, coordinates) * share) for c in counted.collectives),
        dcn=counted.dcn_bytes / (chip.dcn_bandwidth * share),
        efficiency=chip.efficiency,
    )


def bandwidth(collective: Collective, topology: Topology, coordinates: Sequence[Sequence[int]] | None) -> float:
    """Returns the bytes/s that one chip can send in a collective, over all links of its group.

    A group that spans an axis of the torus sends both ways if the axis wraps; a line does so at half the rate. Members
    that are not neighbours share the links between them with the groups in the gaps.
    """
    chip = topology.chip
    if coordinates is None or not collective.members:
        return chip.link_bandwidth * chip.links
    points = [coordinates[member] for member in collective.members]
    links = 0.0
    for axis in range(len(topology.shape)):
        values = sorted({point[axis] for point in points})
        if len(values) == 1:
            continue
        stride = min(b - a for a, b in zip(values, values[1:], strict=False))
        round_trip = topology.wraps(axis) and len(values) * stride == topology.shape[axis]
        links += (2 if round_trip else 1) / stride
    # The devices of one chip communicate on the chip, at the rate of all its links together or faster.
    return chip.link_bandwidth * (links or chip.links)
