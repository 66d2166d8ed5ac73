"""What compiled programs cost: against products counted by hand, and a program's text as XLA writes it."""

import jax
import jax.numpy as jnp
import pytest

from sdjax.devices import programs

TEXT = """
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body.1 (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %carry = (s32[], f32[4,8]{1,0}) parameter(0)
  %value = f32[4,8]{1,0} get-tuple-element(%carry), index=1
  %all-reduce.5 = f32[4,8]{1,0} all-reduce(%value), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%value, %all-reduce.5)
}

%condition.1 (carry: (s32[], f32[4,8])) -> pred[] {
  ROOT %go = pred[] constant(true)
}

ENTRY %main.9 (p: f32[4,8], q: bf16[16]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = bf16[16]{0} parameter(1)
  %gathered = bf16[128]{0} all-gather(%q), replica_groups=[1,8]<=[8], dimensions={0}
  %start = (bf16[16]{0}, bf16[32]{0}) all-gather-start(%q), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %done = bf16[32]{0} all-gather-done(%start)
  %sent = f32[4,8]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
  %many = (f32[4,8]{1,0}, s32[]) all-reduce(%p, %p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %parts = f32[1,8]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %tuple = (s32[], f32[4,8]{1,0}) tuple(%p, %p)
  %loop = (s32[], f32[4,8]{1,0}) while(%tuple), condition=%condition.1, body=%body.1LOOP
  ROOT %end = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""
KNOWN = TEXT.replace("LOOP", ', backend_config={"known_trip_count":{"n":"5"}}')


def test_exchanges_are_counted_as_often_as_loops_run():
    moved = programs.collective_bytes(KNOWN)
    ring = 2 * 3 / 4
    assert moved["all-reduce"] == 5 * ring * 128 + ring * (128 + 4)
    assert moved["all-gather"] == 7 / 8 * 256 + 1 / 2 * 64
    assert moved["reduce-scatter"] == 3 * 32
    assert moved["collective-permute"] == 128
    assert "all-to-all" not in moved


def test_a_loop_of_unknown_length_counts_as_told():
    unknown = TEXT.replace("LOOP", "")
    once, seven = (programs.collective_bytes(unknown, trips)["all-reduce"] for trips in (1, 7))
    assert seven - once == 6 * 2 * 3 / 4 * 128
    gathers = [c.shapes for c in programs.collectives(unknown) if c.kind == "all-gather"]
    assert gathers == [((128,),), ((32,),)]


def test_a_loop_to_a_constant_counts_as_often():
    """As programs for TPUs are written: XLA's count is missing, and the condition compares with a constant."""
    counter = "%i = s32[] get-tuple-element(%carry), index=0\n  %last = s32[] constant(6)\n  "
    compared = f"{counter}ROOT %go = pred[] compare(%i, %last), direction=LT"
    bounded = TEXT.replace("LOOP", "").replace("ROOT %go = pred[] constant(true)", compared)
    once = programs.collective_bytes(TEXT.replace("LOOP", ""))["all-reduce"]
    assert programs.collective_bytes(bounded)["all-reduce"] - once == 5 * 2 * 3 / 4 * 128
    either = bounded.replace(", direction=LT", ", direction=NE")
    assert programs.collective_bytes(either)["all-reduce"] == once


GROUPS = {
    "replica_groups=[2,4]<=[8]": (0, 1, 2, 3),
    "replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}": (0, 4),
    "replica_groups={{0,1,2},{3,4,5}}, dimensions={0}": (0, 1, 2),
    "replica_groups={}, to_apply=%add": (0, 1, 2, 3, 4, 5, 6, 7),
    "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}": (0, 2, 4, 6),
    "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}": (0, 1),
    "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}": (0, 1, 2, 3, 4, 5, 6, 7),
    "replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}": (0, 1, 2, 3),
    "replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}": (0, 2, 4, 6),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}": (0, 1),
    "source_target_pairs={{0,1},{1,2}}": (0, 1),
    "source_target_pairs={{0,1},{1,0},{2,7}}": (2, 7),
}


@pytest.mark.parametrize("written", GROUPS)
def test_groups_of_devices_are_read_in_every_form(written):
    assert programs.group_of(f"%x), channel_id=1, {written}, metadata={{}}", 8) == GROUPS[written]


def test_another_form_is_not_guessed():
    with pytest.raises(ValueError, match="cannot be read"):
        programs.group_of("%x), replica_groups=circle, metadata={}", 8)


def test_what_comes_from_other_hosts_is_shared_by_the_adapters_of_a_group():
    """Groups of eight and of four over hosts of two: eight take four hosts' pairs of adapters; pairs of one host none."""
    sums = 5 * 2 * 3 / 4 * 128 + 2 * 3 / 4 * (128 + 4) + 3 * 32  # in groups of four on two hosts
    assert programs.network_bytes(KNOWN, per_host=2) == sums / 2 + 7 / 8 * 256 / 2
    assert programs.network_bytes(KNOWN, per_host=8) == 0


@pytest.mark.parametrize("times", [1, 5])
def test_products_are_counted_by_hand(times):
    def f(x, w):
        step = lambda carry, _: (jnp.tanh(carry @ w), None)
        return jnp.einsum("bd,vd->bv", jax.lax.scan(step, x, None, length=times)[0], x).sum()

    compiled = jax.jit(f).lower(jnp.ones((8, 16)), jnp.ones((16, 16))).compile()
    assert programs.product_flops(compiled.as_text()) == times * 2 * 8 * 16 * 16 + 2 * 8 * 8 * 16


def test_memory_and_sizes():
    compiled = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.ones((8, 16))).compile()
    found = programs.memory(compiled)
    assert found["arguments"] == found["outputs"] == found["donated"] == 512
    tree = {"a": jnp.ones((4, 2)), "b": jnp.ones(3, jnp.bfloat16), "c": jax.ShapeDtypeStruct((2,), jnp.int8)}
    assert programs.bytes_on_device(tree) == 32 + 6 + 2
