"""A stack of equal layers: scanned, and rematerialised by a named policy."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mllm_jax.sharding.fsdp import GATHERED, fully_sharded

LAYER_INPUT = "layer_input"
# The values stored for the backward pass; the rest is recomputed. "none" stores everything but gathered matrices,
# "full" the input of each layer, "offload" the same in the host's memory.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


def scan_layers(block: type[nn.Module], *, num_layers: int, remat: str = "none", unroll: int = 1, num_broadcast: int):
    """Returns the block class, repeated: parameters gain a leading `layers` axis.

    The block is called `block(x, layer_input, *broadcast) -> (x, layer_output)`; `layer_input` and `layer_output` are
    stacked over layers (pass None where there is none).

    Args:
        remat: a key of REMAT_POLICIES.
        unroll: layers per turn of the loop; more is faster on a CPU and slower to compile.
        num_broadcast: number of further arguments, the same for every layer.

    Raises:
        KeyError: an unknown policy.
    """
    policy = REMAT_POLICIES[remat]
    if remat == "offload":
        block = _named_input(block)
    if remat != "none" or fully_sharded():
        block = nn.remat(block, policy=policy, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0,) + (nn.broadcast,) * num_broadcast,
        length=num_layers,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def layers_of(config: Any, block: type[nn.Module], num_broadcast: int):
    """Applies `scan_layers` to a block with a config's number of layers, `remat` and `scan_unroll`."""
    how = dict(num_layers=config.num_layers, remat=config.remat, unroll=config.scan_unroll)
    return scan_layers(block, **how, num_broadcast=num_broadcast)


def _named_input(block: type[nn.Module]) -> type[nn.Module]:
    """Returns the block with its input named, so that policies can refer to it."""

    class Block(block):
        def __call__(self, x, *others):
            return super().__call__(checkpoint_name(x, LAYER_INPUT), *others)

    return Block
