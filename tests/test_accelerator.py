"""What a new device must show first: the CPU's numbers in every family and method, resumed runs, its own kernels.

`python tests/on_accelerator.py OUT` runs them.  On a CPU they compare it with itself, so that they can be tried there.
"""

import shutil

import first_batches
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import tiny
import whole_runs
from engine.test_generate import scorer
from models import test_attention, test_families

from sdjax.cli.options import method_names
from sdjax.devices import memory
from sdjax.engine import train
from sdjax.engine.generate import Sampling, generate
from sdjax.models import attention, transformer
from sdjax.run.storage import checkpoint

HERE, CPU = jax.devices()[0], jax.devices("cpu")[0]
LOOSER = 1 if HERE.platform == "cpu" else 20
"""How much further than on a CPU logits may be from those of transformers: sums are in another order."""

pytestmark = pytest.mark.accelerator
needs_gpu = pytest.mark.skipif(HERE.platform != "gpu", reason=f"needs an NVIDIA GPU, and there is a {HERE.device_kind}")
needs_allocator = pytest.mark.skipif(HERE.platform == "cpu", reason="needs an accelerator: a CPU has no allocator")


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """On a CPU, where it is the tests that are tried."""
    yield from (networks.unoptimised() if HERE.platform == "cpu" else [None])


@pytest.fixture(autouse=True)
def float32_is_float32():
    """Products of float32 are made from numbers of fewer bits on accelerators unless they are told not to."""
    with jax.default_matmul_precision("highest"):
        yield


@test_families.each_model
def test_logits_are_those_of_transformers(name):
    config, params, arrays = test_families.golden(name)
    model, mask = transformer.Transformer(config, reach=test_families.LENGTH), test_families.masks(arrays)
    tokens, size = np.concatenate([arrays["tokens"]] * 2), LOOSER * test_families.SIZES.get(name, 4e-6)
    found = test_families.in_one_run(model, params, tokens, mask)
    test_families.close(np.where(mask[2:, :, None], found[2:], 0), arrays["padded"], size)
    written = test_families.decoded(model, params, tokens, mask)
    test_families.close(written[2:], arrays["padded"][:, test_families.PREFIX :], size)


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.1)], ids=["float32", "bfloat16"])
def test_the_sampler_says_what_the_scorer_says(dtype, most, record_property):
    """The gap between the log-probabilities of both, of the same tokens."""
    model, params = networks.network("mixed")
    model, length, rows = model.clone(dtype=dtype), 64, 16
    context = networks.context(networks.prompts([5, 8, 3, 7]), 8, rows)
    keys, never = jax.random.split(jax.random.key(0), rows), jnp.asarray([-1])
    written = (context.tokens, context.mask)
    done = generate((model,), (params,), (written,), keys, Sampling(), never, length, length=length)
    gap = np.abs(done.logprobs - scorer(model)(params, context, done.tokens, done.present))
    record_property("mean gap", float(gap.mean()))
    record_property("largest gap", float(gap.max()))
    assert gap.mean() < most


def test_a_run_goes_on_bit_for_bit(tmp_path, programs):
    """A run of 10 steps, and a copy of it without what came after step 8, resumed."""
    whole, other = tmp_path / "whole", tmp_path / "other"
    with whole_runs.compiled_into(programs):
        assert whole_runs.run_here(*whole_runs.arguments(whole)) == 0
        shutil.copytree(whole, other)
        last = max(checkpoint.steps(other / "checkpoints"))
        shutil.rmtree(other / "checkpoints" / str(last))
        (other / "checkpoints" / f"{last}.json").unlink()
        (other / "result.json").unlink()
        assert whole_runs.run_here(*whole_runs.arguments(other), "--resume") == 0
    whole_runs.assert_same_end(other, whole)


def on(device, name):
    """Losses and gradients of a method's updates, computed on a device."""
    method, batch, others, models = first_batches.material(name)
    updates = [train.make_update(o, models, first_batches.recorded(), tiny.SHAPES) for o in method.objectives]
    put = lambda tree: jax.device_put(jax.tree.map(np.asarray, tree), device)
    with jax.default_device(device):
        start = lambda: put(tiny.pretrained().params)
        zeros = lambda: jax.tree.map(jnp.zeros_like, start())
        done = [u(start(), zeros(), put(others), put(batch), put(np.int32(1)))[1:] for u in updates]
    return [(float(outcome.loss), jax.device_get(grads), bool(outcome.useful)) for grads, outcome in done]


@pytest.mark.parametrize("name", method_names())
def test_the_first_update_of_a_method_is_that_of_a_cpu(name):
    here = on(HERE, name)
    there = here if HERE.platform == "cpu" else on(CPU, name)
    for (loss, grads, useful), (wanted, wanted_grads, _) in zip(here, there, strict=True):
        assert useful
        np.testing.assert_allclose(loss, wanted, rtol=1e-4, atol=1e-5)
        largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(wanted_grads))
        for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-4 * max(largest, 1.0))


queries_and_keys = test_attention.data


@needs_gpu
@test_attention.WINDOWS
def test_cudnn_reads_what_is_read_at_once(queries_and_keys, window):
    narrow = lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
    data = jax.tree.map(narrow, queries_and_keys)
    found, wanted = attention.by_cudnn(*data, window), test_attention.reference(*data, window)
    there = np.asarray(test_attention.real(jnp.ones(wanted.shape), data), bool)
    np.testing.assert_allclose(np.asarray(found, np.float64)[there], wanted[there], atol=0.03)


@needs_allocator
def test_memory_is_known():
    assert 0 < memory.peak() <= memory.room().total < float("inf")
