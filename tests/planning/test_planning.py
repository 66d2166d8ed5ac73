"""Plans: FLOP against closed forms, shapes of batches, bytes by hand, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compilers
import jax
import jax.numpy as jnp
import networks
import pytest
import tiny

from sdjax.__main__ import main
from sdjax.cli.options import Choice, method_factory, method_names
from sdjax.collect.contexts import question, with_solution
from sdjax.devices.sharding import MeshError
from sdjax.engine import sketch
from sdjax.methods.gkd import gkd
from sdjax.methods.grpo import grpo
from sdjax.methods.opd import opd
from sdjax.methods.rethinking_opd import rethinking_opd
from sdjax.methods.sdpo import sdpo
from sdjax.methods.trace import trace
from sdjax.methods.vpd import vpd
from sdjax.models.attention import Keys, by_kernel
from sdjax.models.configs import from_hf
from sdjax.models.presets import PRESETS
from sdjax.models.recompute import recomputed
from sdjax.planning import chips, flops, gpus, plan, traffic, verdict

GOLDEN = Path(__file__).parents[1] / "golden" / "llama"
SMALL = {"model": str(GOLDEN), "prompts": 2, "context": 16, "completion": 8, "bf16": False}


def lesson(rollout, rollouts):
    return with_solution(question(rollout.example), rollout.example.solution)


# ---- FLOP -------------------------------------------------------------------------------------------------------------


def counted(function, *shapes, trips=1):
    return flops.product_flops(jax.jit(function).trace(*(jnp.ones(s) for s in shapes)).jaxpr, trips)


def test_a_product_costs_two_per_multiply_add():
    assert counted(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert counted(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (2, 3, 5), (2, 7, 5)) == 2 * 2 * 3 * 5 * 7


def test_loops_count_and_of_branches_the_dearest():
    product = 2 * 4**3
    loop = lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=6)[0]
    assert counted(loop, (4, 4)) == 6 * product
    endless = lambda a: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ a, a)
    assert counted(endless, (4, 4), trips=5) == 5 * product
    either = lambda a: jax.lax.cond(a[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, a)
    assert counted(either, (4, 4)) == 2 * product


def test_a_gradient_costs_two_more_products_and_recomputation_a_third():
    layer = lambda x, w: jnp.tanh(x @ w) @ w
    loss = lambda f: lambda x, w: f(x, w).sum()
    forward = counted(loss(layer), (8, 4), (4, 4))
    assert counted(jax.grad(loss(layer), (0, 1)), (8, 4), (4, 4)) == 3 * forward
    # The last product's value is not needed again.
    assert counted(jax.grad(loss(recomputed(layer)), (0, 1)), (8, 4), (4, 4)) == pytest.approx(4 * forward, rel=0.13)


def test_a_kernel_costs_its_tiles():
    """Attention by tiles: the products of scores and of what is read, at every tile of the grid."""
    rows, length, kv_heads, per_kv, width = 2, 1024, 2, 2, 128
    run = Keys(*2 * (jnp.ones((rows, length, kv_heads, width)),), *2 * (jnp.ones((rows, length), bool),))
    read = lambda query: by_kernel(query, run.positions, (run,))
    scores = rows * kv_heads * per_kv * length * length
    assert counted(read, (rows, length, kv_heads, per_kv, width)) == 2 * 2 * scores * width


# ---- memory read and written, exchanges -------------------------------------------------------------------------------

STEP = """
HloModule step

%slice.1 (x: f32[10,64], i: s32[]) -> f32[64] {
  %x = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,64]{1,0} dynamic-slice(%x, %i, %zero), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%row)
}

%put.1 (y: f32[10,64], row: f32[1,64], i: s32[]) -> f32[10,64] {
  %y = f32[10,64]{1,0} parameter(0)
  %row = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[10,64]{1,0} dynamic-update-slice(%y, %row, %i, %zero)
}

%body.1 (carry: (s32[], f32[10,64])) -> (s32[], f32[10,64]) {
  %carry = (s32[], f32[10,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[10,64]{1,0} get-tuple-element(%carry), index=1
  %row = f32[64]{0} fusion(%x, %i), kind=kLoop, calls=%slice.1
  %wide = f32[1,64]{1,0:S(1)} copy(%row)
  %new = f32[10,64]{1,0} fusion(%x, %wide, %i), kind=kLoop, calls=%put.1
  ROOT %out = (s32[], f32[10,64]{1,0}) tuple(%i, %new)
}

%condition.1 (carry: (s32[], f32[10,64])) -> pred[] {
  %carry = (s32[], f32[10,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %last = s32[] constant(10)
  ROOT %go = pred[] compare(%i, %last), direction=LT
}

ENTRY %main.1 (p: f32[10,64]) -> (s32[], f32[10,64]) {
  %p = f32[10,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %tuple = (s32[], f32[10,64]{1,0}) tuple(%zero, %p)
  ROOT %loop = (s32[], f32[10,64]{1,0}) while(%tuple), condition=%condition.1, body=%body.1
}
"""


def test_memory_is_counted_by_what_is_sliced_and_as_often_as_loops_run():
    row, index = 64 * 4, 4
    sliced = row + row + index  # read, written, and where
    copied = row  # to memory on the chip
    put = row + index  # from there: only the row is written
    compared = 1 + 2 * index
    assert traffic.accessed_bytes(STEP) == 10 * (sliced + copied + put + compared)


BRANCHES = """
%less.1 (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  ROOT %y = f32[64]{0} copy(%x)
}

%more.1 (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %y = f32[64]{0} copy(%x)
  ROOT %z = f32[64]{0} add(%y, %x)
}

ENTRY %main.1 (i: s32[], p: f32[64]) -> f32[64] {
  %i = s32[] parameter(0)
  %p = f32[64]{0} parameter(1)
  ROOT %chosen = f32[64]{0} conditional(%i, %p, %p), branch_computations={%less.1, %more.1}
}
"""


GPU_STEP = """
%slice.1 (x: f32[10,64], i: s32[]) -> f32[1,64] {
  %x = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %turned = f32[10,64]{1,0} transpose(%x), dimensions={0,1}
  ROOT %row = f32[1,64]{1,0} dynamic-slice(%turned, %i, %zero), dynamic_slice_sizes={1,64}
}

%behind.1 (x: f32[10,64], i: s32[]) -> f32[1,64] {
  %x = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %row = f32[1,64]{1,0} fusion(%x, %i), kind=kLoop, calls=%slice.1
}

ENTRY %main.1 (p: (s32[], (f32[10,64], f32[2,64]))) -> f32[2,64] {
  %p = (s32[], (f32[10,64]{1,0}, f32[2,64]{1,0})) parameter(0)
  %start = ((f32[10,64]{1,0}, s32[]), f32[1,64]{1,0}, u32[]) async-start(%p#1#0, %p#0), calls=%behind.1
  %done = f32[1,64]{1,0} async-done(%start)
  ROOT %twice = f32[2,64]{1,0} add(%p#1#1, %p#1#1)
}
"""
"""As jax 0.12 writes programs for GPUs: slices in the background, and parts of tuples by number."""


def test_what_runs_in_the_background_and_lies_in_tuples_is_counted_by_its_part():
    row, index = 64 * 4, 4
    assert traffic.accessed_bytes(GPU_STEP) == (row + row + index) + 3 * 2 * row


def test_of_branches_the_dearest_is_read_and_written():
    assert traffic.accessed_bytes(BRANCHES) == (2 + 3) * 64 * 4


def test_decoding_reads_part_of_a_long_cache():
    """Of 512 columns 128, then 256, then all; near two thirds of long ones."""
    assert plan.share_read(100) == plan.share_read(170) == 1.0
    assert plan.share_read(512) == (128 * 128 + 128 * 256 + 256 * 512) / 512**2
    assert plan.share_read(2**15) == pytest.approx(2 / 3, abs=1e-3)


EIGHT = """
import jax, jax.numpy as jnp, json
from jax.sharding import PartitionSpec as P
from sdjax.devices import programs
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
step = lambda _, c: jax.lax.psum(jnp.sin(c), "x")
loop = jax.shard_map(lambda c: jax.lax.fori_loop(0, 5, step, c), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
text = jax.jit(loop).lower(jnp.ones((4, 8))).compile().as_text()
print(json.dumps(programs.collective_bytes(text)))
"""


def on_eight_devices(*command) -> str:
    """The output of a Python program whose processor counts as eight devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    unoptimised = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(
        command, env=os.environ | flags | unoptimised, capture_output=True, text=True, check=True
    ).stdout


def test_exchanges_of_a_compiled_loop():
    """A sum of 128 bytes over eight devices, five times: a ring receives 2 * 7/8 of it each time."""
    assert json.loads(on_eight_devices("-c", EIGHT)) == {"all-reduce": 5 * 2 * 7 / 8 * 128}


@pytest.mark.slow
def test_the_scaling_command():
    """Exchanges only where there are several devices; operations halve along data and model; weak: they stay."""
    common = (
        "--method",
        "grpo",
        "--model",
        GOLDEN,
        "--layers",
        "1",
        "--prompts",
        "2",
        "--context",
        "8",
        "--completion",
        "8",
    )
    rows = {}
    for how in ((), ("--weak",)):
        text = on_eight_devices("-m", "sdjax", "scaling", *common, *how, "--meshes", "1x1", "2x1", "1x2")
        heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
        rows[how] = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    strong, weak = rows[()], rows["--weak",]
    assert strong["1x1"]["all-reduce MB"] == "0.0" and float(strong["2x1"]["all-reduce MB"]) > 0
    assert [strong[mesh]["prompts"] for mesh in strong] == ["2", "2", "2"]
    assert [weak[mesh]["prompts"] for mesh in weak] == ["2", "4", "2"]
    assert weak["2x1"]["GFLOP per device"] == weak["1x1"]["GFLOP per device"]


# ---- plans ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return plan.plan(method=Choice(grpo, {"group_size": 4}), **SMALL)


def test_a_plan_of_this_machine(small):
    config = from_hf(GOLDEN)
    count = sum(x.size for x in jax.tree.leaves(tiny.initialise(tiny.Transformer(config), jax.random.key(0))))
    assert small.state["parameters"] == small.gradients == 4 * count
    assert small.state["optimizer"] == pytest.approx(8 * count, rel=1e-3)  # two moments
    assert small.state["snapshots"] == 0
    columns = 2 * config.layers * config.kv_heads * config.head_dim  # keys and values
    tokens = 8 * 8 + 2 * 16  # of all completions, and of the prompts that they share
    assert small.cache == pytest.approx(tokens * 4 * columns, rel=0.05)  # positions beside them
    assert small.decoding == pytest.approx(4 * count + small.cache)
    assert small.sampler.exchanged == small.updates[0].exchanged == {}  # one device
    needed = verdict.totals(small)
    assert needed["update"] >= sum(small.state.values()) + small.gradients
    text = verdict.report(small)
    assert "parameters" in text and "sampler, in all" in text


def test_the_update_costs_a_forward_and_a_backward_pass(small):
    """Per token and block parameter 2 FLOP forward, 2 again (recomputed), 4 backward; the head is never recomputed."""
    config = from_hf(GOLDEN)
    block = config.layers * (
        config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads) + 3 * config.width * config.mlp_width
    )
    tokens = 2 * 16 + 8 * 7  # two prompts, eight completions without the last token
    least = 8 * block * tokens + 6 * config.vocab_size * config.width * 8 * 8
    assert least < small.updates[0].flops < 1.5 * least  # attention scores are not in the closed form


def test_a_step_takes_as_long_as_its_slowest_part(small):
    chip = chips.Chip(memory=1e9, flops=1e12, bandwidth=1e11, link=1e9, links=4)
    one = small.updates[0]._replace(flops=2e12, accessed=1e11, exchanged={"all-reduce": 4e9})
    fast = small._replace(chip=chip, updates=(one,), sampler=one._replace(flops=0.0), decoding=1e9, steps=50)
    found = verdict.seconds(fast)
    assert found["update"] == pytest.approx(2 + 2)  # products, then exchanges over two links
    assert found["sampler"] == pytest.approx(50 * 1e9 / 1e11 + 2)
    assert "fits: " in verdict.report(fast)
    large = fast._replace(state={"parameters": 9e9}, memory=None)
    assert "does not fit: " in verdict.report(large) and "use more devices" in verdict.report(large)


def test_the_command(capsys):
    arguments = ["--model", str(GOLDEN), "--prompts", "2", "--context", "16", "--completion", "8"]
    assert main(["plan", "--method", "grpo", "--method.group-size", "2", *arguments]) == 0
    assert "1 x cpu, on each:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v9:2x2"], "topology=v9:2x2: there is none of this name; v4: 2x2x1"),
        (["--topology", "v5e"], "there is none of this name"),
        (["--topology", "h100"], "there is none of this name"),
        (["--topology", "h100:0x8"], "there is none of this name"),
        (["--topology", "h100:16"], "a host has at most 8 GPUs; for 16 of them say h100:2x8"),
        (["--model", "qwen3-8"], "did you mean qwen3-8b"),
        (["--mesh", "3x1"], "mesh=3x1 is a mesh of 3 devices and there are 1"),
        (["--prompts", "0"], "prompts=0: expected at least 1"),
        (["--method", "sdpp"], "there is no method 'sdpp'; did you mean sdpo"),
    ],
)
def test_refused(arguments, said, capsys):
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


# ---- every method, and other teachers ---------------------------------------------------------------------------------


unoptimised = pytest.fixture(networks.unoptimised)


@pytest.mark.parametrize("name", method_names())
@pytest.mark.slow
def test_every_method_can_be_sketched(name, unoptimised):
    built, batch, _ = plan.self_taught(Choice(method_factory(name)))
    assert {view for o in built.objectives for view in o.views} <= {*batch.contexts}
    assert sketch.rows_per_prompt(batch) >= 1 and batch.mask.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", method_names())
def test_every_method_can_be_planned(name, unoptimised):
    found = plan.plan(method=Choice(method_factory(name)), **SMALL)
    assert len(found.updates) >= 1 and all(cost.flops > 0 for cost in found.updates)
    assert verdict.totals(found)["update"] > sum(found.state.values())


def test_the_batch_that_reads_most_is_planned():
    """Not a cold start, which no teacher reads, and not what is left when a schedule has ended."""
    places = lambda method: [method.objectives.index(o) for o in plan.costliest(method)]
    assert [places(m) for m in (rethinking_opd(cold_start=5), trace(), vpd(), sdpo())] == [[1], [0], [0, 1], [0]]


def test_another_model_teaches(unoptimised):
    """A teacher of the student's shape: its parameters once more, and its forward pass in the place of the snapshot's."""
    own = plan.plan(method=Choice(gkd), **SMALL)
    taught = plan.plan(method=Choice(gkd), teacher=str(GOLDEN), **SMALL)
    assert own.state["snapshots"] == taught.state["teacher"] == taught.state["parameters"]
    assert taught.state["snapshots"] == 0
    assert taught.updates[0].flops == own.updates[0].flops
    assert "teacher  " in verdict.report(taught)


def test_teachers_that_cannot_be_planned():
    with pytest.raises(chips.PlanError, match="reads teacher, another model: name its shape with --teacher"):
        plan.refuse_other_teachers(opd(teacher="teacher"))
    with pytest.raises(chips.PlanError, match="grpo reads no other model: leave out --teacher"):
        plan.plan(method=Choice(grpo), teacher="qwen3-8b", **SMALL)
    with pytest.raises(chips.PlanError, match="has 151936 vocabulary entries and the student"):
        plan.plan(method=Choice(opd), teacher="qwen3-8b", **SMALL)
    with pytest.raises(chips.PlanError, match="leave it out beside --teacher"):
        plan.plan(method=Choice(opd, {"teacher": "big"}), teacher=str(GOLDEN), **SMALL)


def test_public_shapes_have_their_names():
    assert {*PRESETS} == {name.lower() for name in PRESETS} and "qwen3-8b" in PRESETS


@pytest.mark.skipif(compilers.tpus(), reason="the TPU compiler is installed")
def test_without_the_tpu_compiler_the_extra_is_named():
    with pytest.raises(chips.PlanError, match=r"pip install 'sdjax\[tpu\]'"):
        chips.devices_of("v5e:2x2")


@pytest.mark.skipif(compilers.nvidia(), reason="the compiler for GPUs is installed")
def test_without_the_compiler_for_gpus_the_extra_is_named():
    with pytest.raises(chips.PlanError, match=r"pip install 'sdjax\[cuda-compiler\]', which needs no GPU"):
        chips.devices_of("h100:8")


def test_exchanges_between_hosts_go_through_their_network(small):
    """Through links at full speed, or slower where what comes from other hosts waits for the adapter."""
    cost = small.updates[0]._replace(exchanged={"all-gather": 9e11})
    assert verdict.exchanging(cost, chips.CHIPS["h100"]) == pytest.approx(9e11 / 4.5e11)
    assert verdict.exchanging(cost._replace(network=5e11), chips.CHIPS["h100"]) == pytest.approx(5e11 / 5e10)
    assert verdict.exchanging(cost, chips.CHIPS["v5e"]) == pytest.approx(9e11 / 9e10)


def test_of_a_gpu_a_share_is_there(small, monkeypatch):
    monkeypatch.delenv(gpus.SHARE, raising=False)
    gpu, bytes_there = gpus.GPUS["h100"], gpus.memory_of(gpus.GPUS["h100"])
    assert bytes_there == 0.75 * gpu.memory
    plan_of = lambda size: small._replace(device="h100", memory=bytes_there, state={"parameters": size})
    assert "fits: 50.0 of 64 GB (0.75 of the GPU's" in verdict.report(plan_of(50e9))
    assert f"fits only with {gpus.SHARE}=0.92: 70.0 of 64 GB" in verdict.report(plan_of(70e9))
    assert "does not fit: 80.0 of 64 GB" in verdict.report(plan_of(80e9))
    monkeypatch.setenv(gpus.SHARE, "0.9")
    assert gpus.memory_of(gpu) == 0.9 * gpu.memory


@pytest.mark.skipif(not compilers.tpus(), reason="needs the TPU compiler: sdjax[tpu]")
def test_a_mesh_that_a_torus_has_not():
    with pytest.raises(MeshError, match="mesh=64x2 cannot be laid over the 4x4x8 devices"):
        chips.mesh_of("v5p:4x4x8", "64x2")


@pytest.mark.skipif(not compilers.tpus(), reason="needs the TPU compiler: sdjax[tpu]")
def test_a_plan_of_tpus():
    found = plan.plan(method=Choice(grpo, {"group_size": 4}), topology="v5e:2x2", mesh="2x2", **SMALL)
    assert (found.device, found.devices) == ("v5e", 4)
    assert found.updates[0].exchanged and found.sampler.exchanged
    assert "fits: 0.0 of 16 GB" in verdict.report(found)
