"""Meshes: rules and refusals here; methods and the sampler on eight virtual devices in a process of their own.

A process chooses its number of virtual devices when it starts, so `eight_devices.py` has its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from sdjax.devices import sharding
from sdjax.devices.sharding import MeshError, make_mesh, mesh_shape, parameter_spec

HERE = Path(__file__).parents[1]


# Eight devices share the cores of a machine that has other work too: XLA would end the process after 40 seconds' wait.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=900 --xla_cpu_collective_timeout_seconds=900"


def on_eight_devices(*options) -> subprocess.CompletedProcess:
    """Runs `eight_devices.py` with these options of pytest."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {PATIENCE} --xla_force_host_platform_device_count=8"
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "eight_devices.py"), *options],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_some_methods_and_the_sampler_on_eight_devices():
    done = on_eight_devices()
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
def test_every_method_on_every_layout():
    done = on_eight_devices("-m", "slow")
    assert done.returncode == 0, done.stdout[-5000:]


# ---- rules ----------------------------------------------------------------------------------------------------------

SIZES = {"data": 4, "model": 2}
SPLIT = {
    ("embed", (64, 32)): P("model", "data"),
    ("head", (64, 32)): P("model", "data"),
    ("head", (63, 32)): P(None, "model"),  # such a vocabulary is split by width; 63 does not divide by 4 either
    ("head", (63, 31)): P(None, None),
    ("layers_0/attention/qkv", (32, 2, 4, 8)): P("data", "model", None, None),
    ("layers_0/attention/qkv_bias", (2, 4, 8)): P("model", None, "data"),
    ("layers_0/attention/out", (2, 2, 8, 32)): P("model", None, None, "data"),
    ("layers_11/mlp/gate_up", (32, 2, 48)): P("data", None, "model"),
    ("layers_0/mlp/down", (48, 32)): P("model", "data"),
    ("final_norm/scale", (32,)): P("data"),
    ("final_norm/scale", (30,)): P(None),
    # Optimizers and adapters keep arrays of other shapes by the same path.
    ("0/mu/layers_0/mlp/down", (48, 32)): P("model", "data"),
    ("0/v_row/layers_0/mlp/down", (48,)): P("data"),
    ("0/count", ()): P(),
    ("layers_0/mlp/down_lora_a", (48, 8)): P("data", None),
}


@pytest.mark.parametrize("path, shape", SPLIT, ids=str)
def test_parameters_are_split_by_their_rule_and_by_data(path, shape):
    assert parameter_spec(path, shape, SIZES, least=1) == SPLIT[path, shape]


def test_small_parameters_stay_whole():
    assert parameter_spec("layers_0/mlp/other", (256, 255), SIZES) == P(None, None)
    assert parameter_spec("layers_0/mlp/other", (256, 256), SIZES) == P("data", None)
    assert parameter_spec("embed", (64, 32), SIZES) == P("model", None)


def test_every_parameter_of_a_model_has_a_rule_or_is_small():
    """A new kind of large parameter needs a rule, or is split by data only: on a 1x8 mesh that would be not at all."""
    named = jax.tree_util.tree_flatten_with_path(tiny.pretrained().params)[0]
    for path, x in named:
        spec = parameter_spec(sharding.path_of(path), x.shape, {"data": 1, "model": 2})
        assert "model" in spec or x.ndim == 1, sharding.path_of(path)


def test_without_a_mesh_nothing_happens():
    params = tiny.pretrained().params
    assert sharding.current() is None
    assert jax.tree.all(jax.tree.map(lambda x, old: x is old, sharding.place_parameters(params), params))
    assert sharding.constrain_parameters(params) is params
    assert sharding.axis_size("data") == 1 and sharding.rows_multiple(3) == 3
    text = lambda f: jax.jit(f).lower(jnp.ones((4, 3))).as_text()
    assert "sharding" not in text(lambda x: sharding.constrain(x, "data") * 2)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_kv_heads_that_do_not_divide_are_named():
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.pretrained().params)
    says = r"mesh=2x4: rule '\S+attention/out\$' splits layers_0/attention/out by kv_heads over the model axis, and "
    with pytest.raises(MeshError, match=says + "2 kv_heads do not divide by 4: choose a model axis of 1, 2$"):
        sharding.parameter_specs(params, {"data": 2, "model": 4})


def test_a_mesh_of_another_number_of_devices():
    with pytest.raises(
        MeshError, match="mesh=4x2 is a mesh of 8 devices and there are 6: expected 6x1 or 3x2 or 2x3 or"
    ):
        make_mesh((4, 2), devices=[None] * 6)


@pytest.mark.parametrize("text", ["4", "4x", "x2", "0x8", "4x2x0", "4x2x1x1", "4 x 2", "-1x2"])
def test_a_mesh_that_cannot_be_read(text):
    with pytest.raises(MeshError, match=f"mesh={text}: expected DATAxMODEL"):
        mesh_shape(text)
    assert mesh_shape("4x2") == (4, 2) and mesh_shape("4x2x3") == (4, 2, 3) and mesh_shape("") is None
