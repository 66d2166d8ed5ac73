"""Programs for GPUs, compiled without one: graphs, copies, exchanges and kernels, read from their text."""

import math
import re
from pathlib import Path

import compilers
import jax
import jax.numpy as jnp
import pytest

from sdjax.cli.options import Choice
from sdjax.devices import platforms, programs, sharding
from sdjax.devices.layout import laid_parameters, laid_rows, laid_whole
from sdjax.engine.generate import Sampling, generate
from sdjax.engine.needs import parameters_of
from sdjax.methods.sdpo import sdpo
from sdjax.models import attention
from sdjax.models import cudnn as cudnn_attention
from sdjax.models.attention import Keys
from sdjax.models.configs import from_hf
from sdjax.models.transformer import Transformer
from sdjax.planning import chips, flops, gpus, plan, verdict

GOLDEN = Path(__file__).parents[1] / "golden" / "llama"
TOPOLOGY, DEVICES = "h100:8", 8

pytestmark = pytest.mark.skipif(not compilers.nvidia(), reason="needs the compiler for GPUs: sdjax[cuda-compiler]")
cudnn = pytest.mark.skipif(not compilers.cudnn(), reason="needs cuDNN: sdjax[cuda-compiler]")

ROWS, LENGTH, CONTEXT = 16, 300, 12


@pytest.fixture(scope="module")
def sampler():
    """The text of the tiny sampler in bfloat16 on eight GPUs along the data axis, and its model."""
    model = Transformer(from_hf(GOLDEN), jnp.bfloat16)
    with sharding.on(chips.mesh_of(TOPOLOGY, "8x1")):
        params = laid_parameters(parameters_of(model.config))
        tokens = jax.ShapeDtypeStruct((DEVICES, CONTEXT), jnp.int32)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
        contexts = laid_rows((tokens, jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)))
        arguments = ((model,), (params,), (contexts,), laid_rows(keys), Sampling(), laid_whole(1), laid_whole())
        return generate.lower(*arguments, length=LENGTH).compile().as_text(), model


def instructions(text):
    """Every instruction of a program, with how often it runs."""
    parts, entry = programs.computations(text)
    often = programs.times(parts, entry, trips=LENGTH)
    return [(x, often[name]) for name in parts for x in parts[name] if often[name]]


def test_a_step_of_decoding_is_one_graph(sampler):
    """No condition is left, within which or for which the host would be asked: the body of the loop is all kernels."""
    loops = [x for x, _ in instructions(sampler[0]) if x.kind == "while"]
    assert len(loops) == 1
    assert not [x for x, _ in instructions(sampler[0]) if x.kind == "conditional"]


def test_a_step_of_decoding_copies_no_cache(sampler):
    text, model = sampler
    config = model.config
    cache = ROWS // DEVICES * LENGTH * config.kv_heads * config.head_dim
    for x, often in instructions(text):
        if x.kind in ("copy", "transpose", "slice") and often >= LENGTH:
            assert all(math.prod(shape) < cache for _, shape in programs.shapes_of(x.type)), x
    assert LENGTH > 2 * attention.LEAST  # where a CPU reads one of several prefixes


def test_logits_are_not_gathered(sampler):
    text, model = sampler
    for exchange in programs.collectives(text, trips=LENGTH):
        in_loop = exchange.times >= LENGTH
        assert not any(model.config.vocab_size in shape for shape in exchange.shapes) or not in_loop
        assert exchange.bytes < 64 or not in_loop  # whether all rows have ended


@pytest.fixture(scope="module")
def planned():
    small = {"model": str(GOLDEN), "prompts": DEVICES, "context": 16, "completion": 8}
    return plan.plan(method=Choice(sdpo, {"group_size": 2}), topology="h100:2x8", mesh="8x2", **small)


@pytest.mark.slow
def test_a_plan_of_gpus(planned):
    assert (planned.device, planned.devices, planned.memory) == ("h100", 16, 0.75 * gpus.GPUS["h100"].memory)
    (update,) = planned.updates
    assert update.flops > 0 and update.accessed > 0 and update.memory["temporary"] > 0
    assert 0 < update.network < sum(update.exchanged.values())  # the data axis crosses hosts, the model axis does not
    assert "fits: 0.0 of 64 GB" in verdict.report(planned)


@pytest.mark.parametrize("chip", sorted(gpus.GPUS))
def test_every_kind_is_known_to_the_compiler(chip):
    (device,) = chips.devices_of(f"{chip}:1")
    assert chips.chip_of(device)[0] == chip
    with sharding.on(chips.mesh_of(f"{chip}:1", "")):
        assert platforms.on_nvidia() and sharding.current() is None
        shape = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
        assert jax.jit(lambda x: x @ x).lower(shape).compile().memory_analysis().output_size_in_bytes == 2 * 256**2


@cudnn
@pytest.mark.parametrize("window", [None, 100])
def test_long_runs_are_read_by_cudnn(window, monkeypatch):
    """Forward and backward, on one device of two each its own rows: scores are never in memory."""
    monkeypatch.setattr(attention, "LONG", 2**10)
    rows, length, heads, per_key, width = 4, 511, 2, 2, 64
    shape = lambda *more, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((rows, length, *more), dtype)
    read = lambda query, run: attention.attend(query, run.positions, (run,), window).astype(jnp.float32).sum()
    run = Keys(shape(heads, width), shape(heads, width), shape(dtype=jnp.int32), shape(dtype=jnp.bool_))
    with sharding.on(chips.mesh_of("h100:2", "2x1")):
        traced = jax.jit(jax.value_and_grad(read)).trace(*laid_rows((shape(heads, per_key, width), run)))
        compiled = traced.lower().compile()
    kernels = re.findall(r'custom_call_target="(__cudnn[^"]+)"', compiled.as_text())
    assert kernels == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    # Two products forward and five backward, of all columns, made even.
    assert flops.product_flops(traced.jaxpr) == 7 * 2 * rows * heads * per_key * (length + 1) ** 2 * width
    scores = rows // 2 * heads * per_key * length**2 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores
    assert [exchange.bytes for exchange in programs.collectives(compiled.as_text())] == [4.0]  # the loss


def test_only_16_bits_are_read_by_cudnn():
    query = lambda dtype, width: jax.ShapeDtypeStruct((1, 8, 2, 2, width), dtype)
    assert cudnn_attention.reads(query(jnp.bfloat16, 128)) and cudnn_attention.reads(query(jnp.float16, 64))
    assert not cudnn_attention.reads(query(jnp.float32, 128))
    assert not cudnn_attention.reads(query(jnp.bfloat16, 256)) and not cudnn_attention.reads(query(jnp.bfloat16, 20))
