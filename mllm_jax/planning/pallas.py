"""FLOPs and traffic of the Pallas kernels in a compiled module, by formula: the compiler does not count them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from mllm_jax.planning.hlo_module import Computation, Instruction, Module

# Matrix products of a block of scores: (with the width of queries and keys, with that of values).
# Forward: q k^T; p v. Backward for keys and values: q k^T, ds^T q; do v^T, p^T do. For queries: q k^T, ds k; do v^T.
# The fused backward pass also computes ds k.
_PRODUCTS = {"fwd": (1, 1), "dkv": (2, 2), "dq": (2, 1), "dkv_fused": (3, 2)}
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)")


@dataclass(frozen=True)
class Kernel:
    """One run of splash attention.

    Attributes:
        flops: FLOPs of the blocks that its mask does not skip.
        dense_flops: FLOPs of all blocks.
        note: what could not be read, so that `flops` is an upper bound; "" if everything could.
    """

    flops: float
    dense_flops: float
    hbm_bytes: float
    note: str = ""


def is_kernel(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.attributes


def kernel(module: Module, computation: Computation, instruction: Instruction) -> Kernel | None:
    """Returns a kernel's cost; None unless its formula is known (splash attention, forward and backward)."""
    found = _SPLASH.search(instruction.name) or _SPLASH.search(instruction.attributes)
    if found is None:
        return None
    operands = [computation.instructions[name] for name in instruction.operands]
    floats = [o.shape for o in operands if o.shape.dtype in ("bf16", "f32", "f16")]
    q, k, v = floats[:3]
    part = found[1]
    suffix = {"fwd": "", "dkv": "_dkv", "dq": "_dq"}[part]
    blocks = {name: int(size) for name, size in re.findall(r'\\?"(block_\w+)\\?": (\d+)', instruction.attributes)}
    block_q, block_kv = blocks.get(f"block_q{suffix}"), blocks.get(f"block_kv{suffix}")
    rows, columns, heads = q.dims[-2], k.dims[-2], prod(q.dims[:-2])

    computed, note = 1.0, ""
    # The mask's tables come before the queries: the next block, the kind of each block (0: skipped), and the index
    # among the partly hidden blocks. Without a mask, or with one that hides nothing, there are none.
    before = [o for o in operands[: next(i for i, o in enumerate(operands) if o.shape is q)] if len(o.shape.dims) == 3]
    text = module.constant(computation, before[1].name) if len(before) > 1 else None
    if text is not None and "..." not in text and block_q and block_kv:
        computed = sum(int(state) > 0 for state in re.findall(r"-?\d+", text)) * block_q * block_kv
        computed /= before[1].shape.dims[0] * rows * columns
    elif before:
        note = f"mask of kernel {instruction.name} not in the text: counted without skipped blocks"

    if part == "dkv" and '"use_fused_bwd_kernel\\": true' in instruction.attributes:
        part = "dkv_fused"
    with_qk, with_v = _PRODUCTS[part]
    dense = 2 * heads * rows * columns * (with_qk * q.dims[-1] + with_v * v.dims[-1])
    own = [s for s in (*(o.shape for o in operands), *instruction.shapes) if s.in_hbm]
    # The inner loop of the grid reads its operands again for every block of the outer loop.
    steps = columns // block_kv if part.startswith("dkv") and block_kv else rows // block_q if block_q else 1
    again = (q.bytes + q.bytes * v.dims[-1] // q.dims[-1]) if part.startswith("dkv") else (k.bytes + v.bytes)
    return Kernel(dense * computed, dense, sum(s.bytes for s in own) + again * max(0.0, steps * computed - 1), note)
