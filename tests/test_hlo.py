from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from common_jax.flops import count_flops
from common_jax.hlo import read_program
from common_jax.hlo_text import parse_instruction, parse_shapes, read_group

# ruff: noqa: E501
LOOP = """
HloModule jit_step, num_partitions=8

%fused_slice (p0: f32[4,16,32], p1: s32[]) -> bf16[16,32] {
  %p0 = f32[4,16,32]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %cut = f32[1,16,32]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,16,32}
  %flat = f32[16,32]{1,0:T(8,128)} bitcast(%cut)
  ROOT %half = bf16[16,32]{1,0:T(8,128)(2,1)} convert(%flat)
}

%body (arg: (s32[], f32[4,16,32])) -> (s32[], f32[4,16,32]) {
  %arg = (s32[]{:T(128)}, f32[4,16,32]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %w = f32[4,16,32]{2,1,0:T(8,128)} get-tuple-element(%arg), index=1
  %layer = bf16[16,32]{1,0:T(8,128)(2,1)} fusion(%w, %i), kind=kLoop, calls=%fused_slice
  %whole = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%layer), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %small = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} copy(%whole)
  %y = f32[64,64]{1,0:T(8,128)} convolution(%small, %whole), dim_labels=bf_oi->bf
  ROOT %out = (s32[]{:T(128)}, f32[4,16,32]{2,1,0:T(8,128)}) tuple(%i, %w)
}

%condition (arg.1: (s32[], f32[4,16,32])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[4,16,32]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %most = s32[]{:T(128)} constant(4)
  ROOT %less = pred[]{:T(512)} compare(%j, %most), direction=LT
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %ab = f32[] add(%a, %b)
}

ENTRY %main (w0: f32[4,16,32]) -> f32[4,16,32] {
  %w0 = f32[4,16,32]{2,1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(0)
  %both = (s32[]{:T(128)}, f32[4,16,32]{2,1,0:T(8,128)}) tuple(%start, %w0)
  %loop = (s32[]{:T(128)}, f32[4,16,32]{2,1,0:T(8,128)}) while(%both), condition=%condition, body=%body
  %end = f32[4,16,32]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %total = f32[4,16,32]{2,1,0:T(8,128)} all-reduce(%end), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, use_global_device_ids=true, to_apply=%sum
}
"""


def test_shapes_have_bytes_and_know_the_memory_they_lie_in():
    fast, slow, flag = parse_shapes("(bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, f32[3]{0}, pred[])")
    assert (fast.dims, fast.bytes, fast.fast) == ((8, 4), 64, True)
    assert (slow.bytes, slow.fast, flag.bytes) == (12, False, 1)
    assert parse_shapes("s4[6]")[0].bytes == 3 and parse_shapes("f8e4m3fn[6]")[0].bytes == 6


def test_an_instruction_is_read_with_layouts_tuples_and_nested_parentheses():
    line = (
        "ROOT %a.1 = (f32[2]{0:T(8)(2,1)}, s32[]) fusion(%b, f32[2]{0} %c.2), kind=kLoop, calls=%f"
    )
    made = parse_instruction(line)
    assert (made.name, made.opcode, made.operands) == ("a.1", "fusion", ["b", "c.2"])
    assert made.is_root and "calls=%f" in made.rest and len(made.shapes) == 2
    assert parse_instruction("%x = s32[] constant(-7)").rest == "-7"
    assert parse_instruction("// a remark") is None


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups={{1,3},{0,2}}, x=1", (1, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2,'a'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x=1", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([8]) {'b'}", (0, 1)),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
        ("replica_groups={}", ()),
    ],
)
def test_the_first_group_of_devices_is_read_in_every_notation(text, group):
    assert read_group(text) == group


def test_devices_in_an_unknown_notation_are_not_passed_over():
    with pytest.raises(ValueError, match="unknown notation of devices"):
        read_group("replica_groups=<all of them>, x=1")


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    cost = read_program(LOOP)
    assert cost.open_loops == 0
    assert cost.flops == 4 * (2 * 64 * 64 * 32)
    gather, total = sorted(cost.collectives, key=lambda made: made.kind)
    # Four devices: each sends its quarter three times. Two devices: half, there and back.
    assert (gather.kind, gather.group, gather.count) == ("all-gather", (0, 1, 2, 3), 4)
    assert gather.bytes == 4 * 3 * (16 * 32 * 2)
    assert (total.kind, total.group, total.bytes) == ("all-reduce", (0, 4), 4 * 16 * 32 * 4)


EXCHANGES = """
HloModule jit_step, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %ab = f32[] add(%a, %b)
}

%small (c: f32[8,32]) -> f32[8,32] {
  %c = f32[8,32] parameter(0)
  %once = f32[8,8] dot(%c, %c), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %negative = f32[8,32] negate(%c)
}

%large (d: f32[8,32]) -> f32[8,32] {
  %d = f32[8,32] parameter(0)
  %square = f32[8,8] dot(%d, %d), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %product = f32[8,32] dot(%square, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,32], p: pred[]) -> f32[8,32] {
  %x = f32[8,32] parameter(0)
  %p = pred[] parameter(1)
  %token = token[] after-all()
  %scattered = f32[2,32] reduce-scatter(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%sum
  %moved = f32[8,32] collective-permute(%x), channel_id=2, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %turned = f32[8,32] all-to-all(%x), channel_id=3, replica_groups={{0,2},{1,3}}, dimensions={0}
  %everyone = f32[8,32] all-reduce(%x), channel_id=4, replica_groups={}, to_apply=%sum
  %begun = (f32[8,32], f32[16,32]) all-gather-start(%x), channel_id=5, replica_groups={{0,1},{2,3}}, dimensions={0}
  %whole = f32[16,32] all-gather-done(%begun)
  %sent = (f32[8,32], u32[], token[]) send(%x, %token), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent-done = token[] send-done(%sent), channel_id=6, is_host_transfer=true
  %host = (f32[8,32], u32[], token[]) send(%x, %token), channel_id=7, is_host_transfer=true
  ROOT %chosen = f32[8,32] conditional(%p, %x, %x), true_computation=%small, false_computation=%large
}
"""


def test_every_kind_of_exchange_has_its_bytes():
    size = 8 * 32 * 4
    found = {made.kind: made for made in read_program(EXCHANGES, slices=2).collectives}
    assert {kind: (made.group, made.bytes) for kind, made in found.items()} == {
        "reduce-scatter": ((0, 1, 2, 3), size * 3 / 4),
        "collective-permute": ((0, 1), size),
        "all-to-all": ((0, 2), size / 2),
        "all-reduce": ((0, 1, 2, 3), size * 2 * 3 / 4),  # no group named: all
        "all-gather": ((0, 1), size),  # the -done is no second one
        "between slices": ((0, 4), size),  # of two slices, half there and half back
    }
    assert {made.count for made in found.values()} == {1}
    three = {made.kind: made for made in read_program(EXCHANGES, slices=3).collectives}
    assert three["between slices"].group == (0, 4, 8)
    assert three["between slices"].bytes == size * 4 / 3


def test_the_start_of_an_exchange_moves_its_bytes_and_the_end_none():
    lone = """
HloModule jit_step, num_partitions=2

ENTRY %main (x: f32[8,32]) -> f32[16,32] {
  %x = f32[8,32] parameter(0)
  %begun = (f32[8,32], f32[16,32]) all-gather-start(%x), channel_id=5, replica_groups={{0,1}}, dimensions={0}
  ROOT %whole = f32[16,32] all-gather-done(%begun)
}
"""
    assert read_program(lone).hbm_bytes == (8 + 16) * 32 * 4


def test_of_the_branches_of_a_compiled_condition_the_dearest_counts():
    assert read_program(EXCHANGES).flops == 2 * (2 * 8 * 8 * 32)


def test_calls_of_a_library_of_products_are_told():
    line = "  %moved = f32[8,32] collective-permute"
    call = '  %gemm = f32[8,8] custom-call(%x, %x), custom_call_target="__cublas$gemm"\n'
    assert read_program(EXCHANGES).library_calls == 0
    assert read_program(EXCHANGES.replace(line, call + line)).library_calls == 1


def test_bytes_are_those_of_slices_and_of_the_large_memory():
    layer, whole, out = 16 * 32 * 4, 64 * 32 * 2, 64 * 64 * 4
    fusion = layer + layer // 2  # of the stack, one layer is read
    gather = layer // 2 + whole
    copy = whole  # its target lies beside the core
    product = whole + out
    total = 2 * 4 * layer
    numbers = 4 + (4 + 4 + 1)  # the place in the stack; the condition
    body = fusion + gather + copy + product + numbers
    assert read_program(LOOP).hbm_bytes == 4 * body + total


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    cost = read_program(
        LOOP.replace("%most = s32[]{:T(128)} constant(4)", "%most = s32[] negate(%j)")
    )
    assert cost.open_loops == 1 and cost.flops == 2 * 64 * 64 * 32
    known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert read_program(known).flops == 9 * (2 * 64 * 64 * 32)


def test_a_compiled_program_has_the_operations_of_the_traced_one():
    def run(x, w):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.grad(lambda w: jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2))(w)

    x, w = jnp.ones((24, 16)), jnp.ones((6, 16, 16))
    cost = read_program(jax.jit(run).lower(x, w).compile().as_text())
    assert cost.flops == count_flops(run, x, w)
    assert cost.open_loops == 0 and not cost.collectives


def test_bytes_without_loops_are_those_that_the_compiler_counts():
    def run(x, w):
        return jnp.tanh(x @ w) @ w.T + x

    compiled = jax.jit(run).lower(jnp.ones((64, 32)), jnp.ones((32, 48))).compile()
    counted = compiled.cost_analysis()["bytes accessed"]
    assert read_program(compiled.as_text()).hbm_bytes == pytest.approx(counted, rel=0.05)


SPREAD = """
HloModule jit_step, num_partitions=4

%begin (a0: bf16[16,32]) -> (bf16[16,32], bf16[64,32]) {
  %a0 = bf16[16,32]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = bf16[64,32]{1,0:T(8,128)} all-gather(%a0), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %custom-call.1 = (bf16[16,32]{1,0:T(8,128)}, bf16[64,32]{1,0:T(8,128)}) custom-call(%a0, %all-gather.1)
}

%meanwhile (b0: bf16[16,32], b1: bf16[64,32], b2: f32[8,16]) -> (f32[8,8], bf16[16,32], bf16[64,32]) {
  %b0 = bf16[16,32]{1,0:T(8,128)} parameter(0)
  %b1 = bf16[64,32]{1,0:T(8,128)} parameter(1)
  %b2 = f32[8,16]{1,0:T(8,128)} parameter(2)
  %all-gather.2 = bf16[64,32]{1,0:T(8,128)} all-gather(%b0), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  %product = f32[8,8]{1,0:T(8,128)} dot(%b2, %b2), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %custom-call.2 = (f32[8,8]{1,0:T(8,128)}, bf16[16,32]{1,0:T(8,128)}, bf16[64,32]{1,0:T(8,128)}) custom-call(%product, %b0, %b1, %all-gather.2)
}

%end (c0: bf16[16,32], c1: bf16[64,32]) -> bf16[64,32] {
  %c0 = bf16[16,32]{1,0:T(8,128)} parameter(0)
  %c1 = bf16[64,32]{1,0:T(8,128)} parameter(1)
  %all-gather.3 = bf16[64,32]{1,0:T(8,128)} all-gather(%c0), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %custom-call.3 = bf16[64,32]{1,0:T(8,128)} custom-call(%c0, %c1, %all-gather.3)
}

ENTRY %main (w: bf16[16,32], x: f32[8,16]) -> bf16[64,32] {
  %w = bf16[16,32]{1,0:T(8,128)} parameter(0)
  %x = f32[8,16]{1,0:T(8,128)} parameter(1)
  %start = (bf16[16,32]{1,0:T(8,128)}, bf16[64,32]{1,0:T(8,128)}) fusion(%w), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %s0 = bf16[16,32]{1,0:T(8,128)} get-tuple-element(%start), index=0
  %s1 = bf16[64,32]{1,0:T(8,128)} get-tuple-element(%start), index=1
  %work = (f32[8,8]{1,0:T(8,128)}, bf16[16,32]{1,0:T(8,128)}, bf16[64,32]{1,0:T(8,128)}) fusion(%s0, %s1, %x), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%meanwhile
  %w0 = bf16[16,32]{1,0:T(8,128)} get-tuple-element(%work), index=1
  %w1 = bf16[64,32]{1,0:T(8,128)} get-tuple-element(%work), index=2
  ROOT %done = bf16[64,32]{1,0:T(8,128)} fusion(%w0, %w1), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
}
"""


def test_an_exchange_spread_over_fusions_counts_once():
    cost = read_program(SPREAD)
    (gather,) = cost.collectives
    shard, whole = 16 * 32 * 2, 64 * 32 * 2
    assert (gather.count, gather.bytes) == (1, 3 * shard)
    assert cost.flops == 2 * 8 * 8 * 16
    # What arrives is written once, and the product in between reads and writes its own.
    assert cost.hbm_bytes == whole + (8 * 16 + 8 * 8) * 4 + shard


def test_exchanges_of_one_channel_that_stand_apart_all_count():
    twice = LOOP.replace("channel_id=2", "channel_id=1")
    assert read_program(twice).collectives == read_program(LOOP).collectives
    alone = SPREAD.replace(", output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}", "")
    alone = alone.replace(", output_to_operand_aliasing={{}: (1, {})}", "")
    assert read_program(alone).collectives[0].count == 3
