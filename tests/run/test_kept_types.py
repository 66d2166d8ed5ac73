"""Whole runs whose parameters are kept in bfloat16, and whose optimizer keeps little: saved, resumed, exported, begun with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from quick import slow_but
from run.test_fit import SHAPES, method

from sdjax.engine import optimizers
from sdjax.engine.master_weights import Mastered
from sdjax.engine.policies import ema, frozen
from sdjax.engine.train import Experiment
from sdjax.models import pretrained
from sdjax.models.adapters import Lora
from sdjax.run.fit import fit
from sdjax.run.folder import RunError

pytestmark = pytest.mark.usefixtures("cached")
SNAPSHOTS = {"average": ema(0.01), "start": frozen()}


def experiment(steps=4, optimizer="adamw", first_moment="float32", params_dtype=jnp.bfloat16, **changes):
    """A run of the recall task; every second step is saved."""
    own = optimizers.chosen(optimizer, 1e-4, first_moment=first_moment)
    values = {"evaluation": 0, "export": False, "save_every": 2, "prompts": 2, "shapes": SHAPES, **changes}
    task = tiny.TASK._replace(verify=tiny.parity)
    own = {"method": method(snapshots=SNAPSHOTS), "task": task, "optimizer": own, "steps": steps}
    return Experiment(student=tiny.pretrained(), params_dtype=params_dtype, **own, **values)


def same(a, b):
    keyless = lambda state: jax.device_get(state.replace(key=jax.random.key_data(state.key)))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), keyless(a), keyless(b))


KINDS = {
    "bfloat16": {},
    "bfloat16 with a short moment": {"first_moment": "bfloat16"},
    "adafactor": {"optimizer": "adafactor", "params_dtype": jnp.float32},
    "bfloat16 and adafactor": {"optimizer": "adafactor"},
    "adapters on bfloat16": {"lora": Lora(rank=2)},
}


some_kinds = pytest.mark.parametrize("kind", slow_but(("bfloat16 and adafactor",), KINDS))


@some_kinds
def test_a_resumed_run_is_the_same_run_bit_for_bit(tmp_path, kind):
    whole = fit(experiment(**KINDS[kind]), tmp_path / "whole").state
    fit(experiment(2, **KINDS[kind]), tmp_path / "halves")
    same(fit(experiment(**KINDS[kind]), tmp_path / "halves", resume=True).state, whole)
    if "bfloat16 and" in kind:
        assert isinstance(whole.opt_state, Mastered) and any(map(np.any, jax.tree.leaves(whole.opt_state.remainder)))


def test_what_is_exported_is_what_was_trained(tmp_path):
    """In the type that it is kept in, and in any wider one; adapters are added to the weights that they were trained on."""
    state = fit(experiment(2, export=True, export_dtype="bfloat16"), tmp_path / "run").state
    found = pretrained.load(tmp_path / "run" / "model").params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float32)), found, state.params)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.snapshots["average"])} == {jnp.dtype("float32")}


def test_another_run_begins_with_these_parameters(tmp_path):
    """And one that keeps another type says which."""
    first = fit(experiment(2), tmp_path / "first").state
    source = f"{tmp_path / 'first'}@2"
    begun = fit(experiment(2, optimizer="adafactor"), tmp_path / "second", start=source).state
    same(
        begun.replace(params=begun.snapshots["start"], opt_state=0, snapshots={}),
        first.replace(opt_state=0, snapshots={}),
    )
    with pytest.raises(RunError, match="it holds other parameters than this run trains: params/.* is bfloat16.* there"):
        fit(experiment(2, params_dtype=jnp.float32), tmp_path / "third", start=source)
