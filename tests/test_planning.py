"""Plans: FLOP against closed forms, shapes of batches, bytes by hand, and what is refused."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny

from sdjax.__main__ import main
from sdjax.contexts import question, with_solution
from sdjax.methods.grpo import grpo
from sdjax.methods.opd import opd
from sdjax.methods.sdpo import sdpo
from sdjax.models.configs import from_hf
from sdjax.models.presets import PRESETS
from sdjax.models.recompute import recomputed
from sdjax.options import Choice
from sdjax.planning import chips, flops, plan, sketch

GOLDEN = Path(__file__).parent / "golden" / "llama"
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


# ---- batches ----------------------------------------------------------------------------------------------------------


def test_batches_of_a_method_are_sized_by_what_it_collects():
    batch = sketch.sketched(sdpo(group_size=4, lesson=lesson))
    rows = sketch.rows_per_prompt(batch)
    found = sketch.sized(batch, 3, rows, 100, {"student": 10, "teacher": 20})
    assert rows == 4
    assert found.completion.shape == found.mask.shape == found.behavior_logprobs.shape == (12, 100)
    assert found.contexts["student"].tokens.shape == (3, 10)  # a group shares its question
    assert found.contexts["teacher"].tokens.shape == (3, 20)  # and here the lesson
    own = sketch.sized(batch, 3, rows, 100, {"student": 10, "teacher": 20}, own={"teacher"})
    assert own.contexts["teacher"].tokens.shape == (12, 20)  # which may be one of each attempt's own
    assert found.reward.shape == (12,)
    assert found.completion.dtype == jnp.int32 and found.mask.dtype == jnp.bool_


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
    assert small.cache == pytest.approx(8 * 8 * 4 * columns, rel=0.05)  # rows, tokens, bytes; positions beside them
    assert small.decoding == pytest.approx(4 * count + small.cache)
    assert small.sampler.exchanged == small.updates[0].exchanged == {}  # one device
    needed = plan.totals(small)
    assert needed["update"] >= sum(small.state.values()) + small.gradients
    text = plan.report(small)
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
    found = plan.seconds(fast)
    assert found["update"] == pytest.approx(2 + 2)  # products, then exchanges over two links
    assert found["sampler"] == pytest.approx(50 * 1e9 / 1e11 + 2)
    assert "fits: " in plan.report(fast)
    large = fast._replace(state={"parameters": 9e9})
    assert "does not fit: " in plan.report(large) and "use more devices" in plan.report(large)


def test_the_command(capsys):
    arguments = ["--model", str(GOLDEN), "--prompts", "2", "--context", "16", "--completion", "8"]
    assert main(["plan", "--method", "grpo", "--method.group-size", "2", *arguments]) == 0
    assert "1 x cpu, on each:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v9:2x2"], "topology=v9:2x2: there is none of this name; v4: 2x2x1"),
        (["--topology", "v5e"], "there is none of this name"),
        (["--model", "qwen3-8"], "did you mean qwen3-8b"),
        (["--mesh", "3x1"], "mesh=3x1 is a mesh of 3 devices and there are 1"),
        (["--prompts", "0"], "prompts=0: expected at least 1"),
        (["--method", "sdpp"], "there is no method 'sdpp'; did you mean sdpo"),
    ],
)
def test_refused(arguments, said, capsys):
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_other_models_are_not_planned():
    with pytest.raises(chips.PlanError, match="reads teacher, another model"):
        plan.refuse_other_teachers(opd(teacher="teacher"))


def test_public_shapes_have_their_names():
    assert {*PRESETS} == {name.lower() for name in PRESETS} and "qwen3-8b" in PRESETS


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed")
def test_without_the_tpu_compiler_the_extra_is_named():
    with pytest.raises(chips.PlanError, match=r"pip install 'sdjax\[tpu\]'"):
        chips.devices_of("v5e:2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: sdjax[tpu]")
def test_a_plan_of_tpus():
    found = plan.plan(method=Choice(grpo, {"group_size": 4}), topology="v5e:2x2", mesh="2x2", **SMALL)
    assert (found.device, found.devices) == ("v5e", 4)
    assert found.updates[0].exchanged and found.sampler.exchanged
    assert "fits: 0.0 of 16 GB" in plan.report(found)
