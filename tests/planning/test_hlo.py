"""The parsing of TPU programs, each difficulty in a few lines of one, and the arithmetic of the counts."""

import pytest

from mllm_jax.errors import PlanError
from mllm_jax.planning.hlo import FUSED_SCATTER, account, ring_bytes
from mllm_jax.planning.hlo_module import Module, replica_groups

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=16\n\n"

LOOP = """
%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %w = bf16[16,16]{1,0} constant({...})
  %y = bf16[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %t = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%next, %y)
}

%condition (q: (s32[], bf16[8,16])) -> pred[] {
  %q = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %bound = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

ENTRY %main (a: bf16[8,16], n: s32[]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %n = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(START)
  %copied = s32[]{:T(128)S(6)} copy(%zero)
  %init = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%copied, %a)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""
ONE_PRODUCT = 2 * 8 * 16 * 16


@pytest.mark.parametrize("start, step, trips", [(0, 1, 12), (0, 2, 6), (2, 1, 10), (0, 5, 3)])
def test_a_loop_counts_as_often_as_its_counter_says(start, step, trips):
    text = HEADER + LOOP.replace("STEP", str(step)).replace("START", str(start))
    assert account(text).dot_flops == trips * ONE_PRODUCT


def test_a_loop_without_constant_bounds_counts_once_and_is_named():
    text = LOOP.replace("STEP", "1").replace("tuple(%copied, %a)", "tuple(%n, %a)")
    counted = account(HEADER + text)
    assert counted.dot_flops == ONE_PRODUCT
    assert counted.unknown == ["loop loop without a constant trip count"]


def entry(*lines: str, before: str = "") -> str:
    return (
        f"{HEADER}{before}\nENTRY %main (a: bf16[2,4]) -> bf16[2,4] {{\n" + "\n".join(f"  {x}" for x in lines) + "\n}\n"
    )


def test_batched_products_are_not_counted_for_pairs_of_batch_entries():
    text = entry(
        "%q = bf16[2,4,512,128]{3,2,1,0} parameter(0)",
        "%k = bf16[2,4,512,128]{3,2,1,0} parameter(1)",
        "ROOT %s = f32[2,4,512,512]{2,3,1,0:T(8,128)} convolution(%q, %k), "
        "window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=01bf_01oi->01bf",
    )
    assert account(text).dot_flops == 2 * 2 * 4 * 512 * 512 * 128


def test_convolutions_of_patches_and_their_gradients():
    """Checks an image of 16 x 16 patches: 2 x 256 positions x 14 x 14 x 3 x 64, forward and for the pixels."""
    places = 2 * 8 * 256 * 14 * 14 * 3 * 64
    forward = entry(
        "%x = bf16[8,224,224,3]{3,2,1,0} parameter(0)",
        "%w = bf16[14,14,3,64]{3,2,1,0} parameter(1)",
        "ROOT %y = bf16[8,16,16,64]{3,2,1,0} convolution(%x, %w), window={size=14x14 stride=14x14}, "
        "dim_labels=b01f_01io->b01f",
    )
    backward = entry(
        "%g = bf16[8,16,16,64]{3,2,1,0} parameter(0)",
        "%w = bf16[14,14,3,64]{3,2,1,0} parameter(1)",
        "ROOT %x = bf16[8,224,224,3]{0,3,2,1:T(4,128)(2,1)S(1)} convolution(%g, %w), "
        "window={size=14x14 pad=13_13x13_13 lhs_dilate=14x14 rhs_reversal=1x1}, dim_labels=b01f_01oi->b01f",
    )
    assert account(forward).dot_flops == account(backward).dot_flops == places


ASYNC = """
%start (p0: bf16[128,512]) -> (bf16[128,512], bf16[512,512], u32[]) {
  %p0 = bf16[128,512]{1,0} parameter(0)
  %g0 = bf16[512,512]{1,0} all-gather(%p0), channel_id=11, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c0 = (bf16[128,512]{1,0}, bf16[512,512]{1,0}, u32[]{:S(2)}) custom-call(%g0), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p1: bf16[128,512]) -> bf16[512,512] {
  %p1 = bf16[128,512]{1,0} parameter(0)
  ROOT %g1 = bf16[512,512]{1,0} all-gather(%p1), channel_id=11, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}, frontend_attributes={chain_id="0"}
}

%done (p2: bf16[128,512]) -> bf16[512,512] {
  %p2 = bf16[128,512]{1,0} parameter(0)
  %g2 = bf16[512,512]{1,0} all-gather(%p2), channel_id=11, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c2 = bf16[512,512]{1,0} custom-call(%g2), custom_call_target="AsyncCollectiveDone"
}
"""  # noqa: E501


def test_an_asynchronous_collective_in_three_fusions_counts_once():
    text = entry(
        "%a = bf16[128,512]{1,0} parameter(0)",
        "%s = (bf16[128,512]{1,0}, bf16[512,512]{1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start",
        "%m = bf16[512,512]{1,0} fusion(%a), kind=kCustom, calls=%async_collective_fusion.1",
        "ROOT %d = bf16[512,512]{1,0} fusion(%a), kind=kCustom, calls=%done",
        before=ASYNC,
    )
    [gather] = account(text).collectives
    assert (gather.kind, gather.times, gather.group) == ("all-gather", 1, 4)
    assert gather.wire_bytes == 3 * 128 * 512 * 2


SPARSECORE = """
%sum (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)S(7)} parameter(0)
  %y = bf16[]{:T(256)S(7)} parameter(1)
  ROOT %add = bf16[]{:T(256)S(7)} add(%x, %y)
}, execution_thread="sparsecore"

%called (whole: bf16[2,4], flag: token[]) -> bf16[2,4] {
  %flag = token[] parameter(1)
  %whole = bf16[2,4]{1,0} parameter(0)
  ROOT %reduced = bf16[2,4]{1,0} all-reduce(%whole), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
}, execution_thread="sparsecore"

%fused (piece: bf16[2,4]) -> bf16[2,4] {
  %piece = bf16[2,4]{1,0} parameter(0)
  ROOT %twice = bf16[2,4]{1,0} add(%piece, %piece)
}
"""


def test_what_a_sparsecore_runs_counts_and_ends_before_the_next_computation():
    start = "((bf16[2,4]{1,0}, token[]), bf16[2,4]{1,0}, u32[]{:S(8)}) call-start(%f, %ready)"
    counted = account(
        entry(
            "%a = bf16[2,4]{1,0} parameter(0)",
            "%f = bf16[2,4]{1,0} fusion(%a), kind=kLoop, calls=%fused",
            "%ready = token[] after-all()",
            f'%started = {start}, async_execution_thread="sparsecore", to_apply=%called',
            "ROOT %done = bf16[2,4]{1,0} call-done(%started)",
            before=SPARSECORE,
        )
    )
    [collective] = counted.collectives
    assert (collective.kind, collective.group, collective.bytes) == ("all-reduce", 4, 16)
    assert counted.hbm_bytes == 2 * 16 + 2 * 16, "the fusion and the all-reduce, each once"


def test_permutes_that_share_a_channel_all_count():
    line = "bf16[64,64]{1,0} collective-permute(%a), channel_id=1, source_target_pairs={{0,1},{1,2},{2,0}}"
    text = entry("%a = bf16[64,64]{1,0} parameter(0)", f"%b = {line}", f"ROOT %c = {line}")
    assert account(text).wire_bytes("collective-permute") == 2 * 64 * 64 * 2


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter():
    scatter = """
%all-reduce-scatter.1 (input: bf16[512,512]) -> bf16[128,512] {
  %input = bf16[512,512]{1,0} parameter(0)
  %sum = bf16[512,512]{1,0} all-reduce(%input), channel_id=16, replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %mine = bf16[128,512]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={128,512}
}
"""  # noqa: E501
    text = entry(
        "%a = bf16[512,512]{1,0} parameter(0)",
        "ROOT %f = bf16[128,512]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1",
        before=scatter,
    )
    counted = account(text)
    assert counted.wire_bytes(FUSED_SCATTER) == counted.wire_bytes() == 512 * 512 * 2 * 3 / 4
    assert counted.wire_bytes_unfused() == 2 * 512 * 512 * 2 * 3 / 4


def kernel_call(name: str, mask: str, blocks: str) -> str:
    return entry(
        "%next = s8[1,2,2]{2,1,0} constant({ { { 0, 0 }, { 0, 1 } } })",
        f"%blocks = s8[1,2,2]{{2,1,0}} constant({mask})",
        "%moved = s8[1,2,2]{2,1,0:S(1)} copy(%blocks)",
        "%q = bf16[2,4,512,128]{3,2,1,0} parameter(0)",
        "%k = bf16[2,4,512,128]{3,2,1,0} parameter(1)",
        "%v = bf16[2,4,512,64]{3,2,1,0} parameter(2)",
        f"ROOT %{name}.1 = bf16[2,4,512,64]{{3,2,1,0}} custom-call(%next, %moved, %q, %k, %v), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        f'"xprof_metadata":"{{{blocks}}}"\n'
        "}}",
    )


FORWARD = r"\"block_q\": 256, \"block_kv\": 256"


def test_splash_attention_counts_by_formula_without_the_blocks_its_mask_skips():
    text = kernel_call("splash_mha_fwd_segmented", "{ { { 1, 0 }, { 2, 1 } } }", FORWARD)
    counted = account(text)
    assert counted.kernel_flops == 3 / 4 * 2 * 8 * 512 * 512 * (128 + 64)
    assert counted.dense_flops == counted.kernel_flops / (3 / 4)
    assert counted.unknown == []


def test_the_fused_backward_kernel_has_five_products():
    blocks = r"\"block_q_dkv\": 256, \"block_kv_dkv\": 256, \"use_fused_bwd_kernel\": true"
    text = kernel_call("splash_mha_dkv_segmented", "{ { { 1, 2 }, { 0, 1 } } }", blocks)
    assert account(text).kernel_flops == 3 / 4 * 2 * 8 * 512 * 512 * (3 * 128 + 2 * 64)


def test_a_mask_that_is_not_printed_gives_an_upper_bound_that_is_named():
    counted = account(kernel_call("splash_mha_fwd", "{...}", FORWARD))
    assert counted.kernel_flops == 2 * 8 * 512 * 512 * (128 + 64)
    assert "splash_mha_fwd.1" in counted.unknown[0]


def test_a_kernel_without_a_formula_is_named():
    counted = account(kernel_call("someone_elses", "{...}", FORWARD))
    assert counted.kernel_flops == 0 and "someone_elses.1" in counted.unknown[0]


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        (None, [[0, 1, 2, 3]]),
    ],
)
def test_replica_groups_in_every_form(text, groups):
    assert [list(map(int, group)) for group in replica_groups(text, 4)] == groups


def test_unknown_groups_are_refused():
    with pytest.raises(PlanError, match="replica_groups"):
        replica_groups("[2,2] of something new", 4)


def test_what_a_ring_sends():
    assert ring_bytes("all-gather", 10, 4) == (30, 0)
    assert ring_bytes("all-reduce", 40, 4) == (60, 0)
    assert ring_bytes("reduce-scatter", 40, 4) == (30, 0)
    assert ring_bytes("all-to-all", 40, 4) == (30, 0)
    assert ring_bytes("all-reduce", 40, 1) == (0, 0)


def test_over_two_slices_each_chip_sends_its_part_over_dcn():
    # 8 chips in 2 slices: reduce-scatter inside (3/4), the quarters between the slices (1/2 each way), gathered inside.
    assert ring_bytes("all-reduce", 64, 8, 2) == (2 * 64 * 3 / 4, 2 * 16 / 2)
    assert ring_bytes("all-gather", 8, 8, 2) == (8 * 2 * 3, 8)
    text = entry(
        "%a = f32[64]{0} parameter(0)",
        "ROOT %b = f32[64]{0} all-reduce(%a), channel_id=1, replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add",
    )
    [reduce] = account(text, slice_of=[0] * 8 + [1] * 8).collectives
    assert (reduce.slices, reduce.ici_bytes, reduce.dcn_bytes) == (2, 0, 256)


def test_what_hosts_send_between_slices_is_read_from_its_send():
    attributes = (
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = entry(
        "%a = bf16[256,1024]{1,0} parameter(0)",
        "%t = token[] after-all()",
        f"%s = (bf16[256,1024]{{1,0}}, u32[], token[]) send(%a, %t), channel_id=2, is_host_transfer=true, {attributes}",
        f"%r = (bf16[256,1024]{{1,0}}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, {attributes}",
        "ROOT %d = token[] send-done(%s), channel_id=2",
    )
    counted = account(text)
    assert counted.by_kind() == {("all-reduce", "DCN"): (1, 2 * 256 * 1024 * 2 / 2)}
    assert (counted.ici_bytes, counted.dcn_bytes) == (0, 256 * 1024 * 2)


def test_memory_traffic_counts_slices_not_the_stack_and_not_what_stays_on_chip():
    fused = """
%take (s: bf16[12,64,64], i: s32[]) -> bf16[1,64,64] {
  %s = bf16[12,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %one = bf16[1,64,64]{2,1,0} dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={1,64,64}
}
"""
    text = entry(
        "%stack = bf16[12,64,64]{2,1,0} parameter(0)",
        "%n = s32[]{:T(128)S(6)} parameter(1)",
        "ROOT %w = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} fusion(%stack, %n), kind=kLoop, calls=%take",
        before=fused,
    )
    assert account(text).hbm_bytes == 64 * 64 * 2


def test_slices_are_seen_through_nested_fusions_and_updates_in_place():
    fused = """
%inner (s: bf16[12,64,64], i: s32[]) -> bf16[1,64,64] {
  %s = bf16[12,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = bf16[12,64,64]{2,1,0} bitcast(%s)
  ROOT %one = bf16[1,64,64]{2,1,0} dynamic-slice(%b, %i, %i, %i), dynamic_slice_sizes={1,64,64}
}

%outer (t: bf16[12,64,64], u: bf16[12,64,64], j: s32[]) -> bf16[12,64,64] {
  %t = bf16[12,64,64]{2,1,0} parameter(0)
  %u = bf16[12,64,64]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  %taken = bf16[1,64,64]{2,1,0} fusion(%t, %j), kind=kLoop, calls=%inner
  ROOT %put = bf16[12,64,64]{2,1,0} dynamic-update-slice(%u, %taken, %j, %j, %j)
}
"""
    text = entry(
        "%stack = bf16[12,64,64]{2,1,0} parameter(0)",
        "%other = bf16[12,64,64]{2,1,0} parameter(1)",
        "%n = s32[]{:T(128)S(6)} parameter(2)",
        "ROOT %w = bf16[12,64,64]{2,1,0} fusion(%stack, %other, %n), kind=kLoop, calls=%outer",
        before=fused,
    )
    assert account(text).hbm_bytes == 2 * 64 * 64 * 2  # one slice read, one slice written


def test_text_that_is_no_module_is_refused():
    with pytest.raises(PlanError, match="ENTRY"):
        Module("nothing")
