"""What an update and the sampler need: estimates against counts by hand, on one device and on a mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

from sdjax.devices import sharding
from sdjax.engine import needs
from sdjax.engine.needs import Load, Reading, Sizes
from sdjax.engine.tokens import Shapes
from sdjax.engine.train import Experiment
from sdjax.methods.grpo import grpo
from sdjax.methods.sdpo import sdpo
from sdjax.models.adapters import Lora
from sdjax.types import Context

CONFIG = tiny.config()  # 32 wide, 48 hidden units, 2 layers, 4 heads of 8, 2 of keys and values
WEIGHTS = sum(math.prod(x.shape) for x in jax.tree.leaves(tiny.pretrained().params))
READING = Reading(contexts=2, context=5, rows=3, completion=7)


def on_mesh(data, model):
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((data, model), sharding.AXES))


def test_the_sizes_of_the_model_are_those_that_are_counted_with():
    assert (CONFIG.width, CONFIG.hidden_units, CONFIG.layers) == (32, 48, 2)
    assert (CONFIG.heads, CONFIG.kv_heads, CONFIG.head_dim) == (4, 2, 8)
    assert (needs.WIDTHS, needs.MLP_WIDTHS, needs.SCORE_COPIES, needs.FEW) == (15, 5, 3, 2)


def test_what_a_view_reads():
    assert READING.tokens == 2 * 5 + 3 * 7
    assert READING.scores(4) == (2 * 4 * 5 * 5, 3 * 4 * 7 * (5 + 7)) == (200, 1008)


def test_what_is_kept_of_a_layer(monkeypatch):
    keep = lambda item, remat: needs.kept_per_layer(CONFIG, READING, item, remat=remat)
    assert keep(4, True) == 31 * 4 * (32 + 2 * 2 * 8) and keep(2, True) == keep(4, True) / 2
    own = 31 * 4 * (15 * 32 + 5 * 48)
    assert keep(4, False) == own + 3 * 4 * (200 + 1008) and keep(2, False) == own / 2 + 3 * 4 * (200 + 1008)
    with on_mesh(1, 2):
        assert keep(4, True) == 31 * 4 * (32 + 2 * 2 * 8) / 2
        assert keep(4, False) == 31 * 4 * (15 * 32 + 5 * 48 / 2) + 3 * 4 * (200 + 1008) / 2
    for limit, scores in ((1008, 1208), (1007, 200), (200, 200), (199, 0)):  # larger ones are computed again
        monkeypatch.setattr(needs, "SCORES", limit)
        assert keep(4, False) == own + 3 * 4 * scores


def test_what_lies_about_while_a_layer_is_read(monkeypatch):
    own = 31 * 4 * (15 * 32 + 5 * 48)
    assert needs.in_one_layer(CONFIG, READING, 4) == own + 2 * 3 * 4 * 1008
    with on_mesh(1, 2):
        assert needs.in_one_layer(CONFIG, READING, 4) == 31 * 4 * (15 * 32 + 5 * 48 / 2) + 2 * 3 * 4 * 1008 / 2
    monkeypatch.setattr(needs, "SCORES", 300)
    assert needs.in_one_layer(CONFIG, READING, 4) == own + 2 * 3 * 4 * 300


def test_rows_of_one_device_and_of_all():
    assert needs.per_device(None) is None and needs.per_device(3) == 3
    with on_mesh(4, 2):
        assert needs.per_device(3) == 12 and needs.per_device(None) is None


# ---- whole programs -------------------------------------------------------------------------------------------------


def load(method=None, **changes):
    """Eight rows of 16 tokens after a question of 10 that two share, and a lesson of 12 of their own."""
    method = grpo() if method is None else method
    values = {"shapes": Shapes(context=10, completion=16), "optimizer": optax.adam(1e-3), **changes}
    e = Experiment(method, tiny.TASK, tiny.pretrained(), **values)
    batch = tiny.batch(jnp.zeros((8, 16)))
    valid = jnp.ones(8, bool)
    of = lambda rows, width: Context(jnp.zeros((rows, width), jnp.int32), jnp.ones((rows, width), bool), valid)
    return Load(e, batch.replace(contexts={"student": of(4, 10), "teacher": of(8, 12)}), 20)


def update(own, rows=None, tokens=None, remat=False):
    return needs.estimated_update(own, own.experiment.method.objectives[0], Sizes(8, rows, tokens, remat))


def layer(item, remat, *reading):
    """What two layers keep, and what lies about in one."""
    own = Reading(*reading)
    return 2 * needs.kept_per_layer(CONFIG, own, item, remat=remat), needs.in_one_layer(CONFIG, own, item)


@pytest.mark.parametrize("remat", [False, True])
def test_an_update_of_one_view(remat):
    size, states = CONFIG.vocab_size, 8 * 16 * 32 * 4
    whole = states + sum(layer(4, remat, 4, 10, 8, 16)) + 4 * 8 * 16 * size * 4 + 4 * WEIGHTS
    assert update(load(), remat=remat) == whole
    # Two rows at a time: four chunks of one group each; gradients are added up, so there are two of them.
    parts = states + sum(layer(4, remat, 1, 10, 2, 16)) + 4 * 2 * 16 * size * 4 + 2 * 4 * WEIGHTS
    assert update(load(), rows=2, remat=remat) == parts
    # One row at a time: each has a copy of its question.  Five positions at a time: their logits alone.
    copied = states + sum(layer(4, remat, 1, 10, 1, 16)) + 4 * 5 * size * 4 + 2 * 4 * WEIGHTS
    assert update(load(), rows=1, tokens=5, remat=remat) == copied
    # In 16 bits: weights in that type beside those that are kept.
    half = states / 2 + sum(layer(2, remat, 4, 10, 8, 16)) + 4 * 8 * 16 * size * 4 + 4 * WEIGHTS + 2 * WEIGHTS
    assert update(load(dtype=jnp.bfloat16), remat=remat) == half


def test_an_update_of_two_views():
    """Of the teacher's, nothing is kept; what lies about is the larger; logits are those of both."""
    own = load(sdpo(top_k=None))
    student, teacher = layer(4, False, 4, 10, 8, 16), layer(4, False, 8, 12, 8, 16)
    states, logits = 2 * 8 * 16 * 32 * 4, 4 * 8 * 16 * CONFIG.vocab_size * 6
    assert teacher[1] > student[1]
    assert update(own) == states + student[0] + teacher[1] + logits + 4 * WEIGHTS


def test_a_mesh_shares_rows_and_the_vocabulary(monkeypatch):
    """The gradients are what the mesh leaves of the parameters on one device."""
    monkeypatch.setattr(needs, "state_of", lambda experiment: needs.State("parameters", None, {}, {}))
    monkeypatch.setattr(needs, "gradient_bytes", {"parameters": 1000.0}.get)
    states, logits = 4 * 16 * 32 * 4, 4 * 4 * 16 * CONFIG.vocab_size / 2 * 4
    with on_mesh(2, 2):
        assert update(load()) == states + sum(layer(4, False, 2, 10, 4, 16)) + logits + 1000
        half = update(load(dtype=jnp.bfloat16))
        norms = 5 * 32  # which stay whole
        weights = 2 * ((WEIGHTS - norms) / 2 + norms)
        assert half == states / 2 + sum(layer(2, False, 2, 10, 4, 16)) + logits + 1000 + weights


def test_the_sampler():
    """Keys and values of the context and twice the completion, a layer, four copies of logits, weights in 16 bits."""
    cache = lambda rows, item: rows * (20 + 2 * 16) * 2 * 2 * 2 * 8 * item
    layer = lambda rows, item: needs.in_one_layer(CONFIG, Reading(rows, 20, 0, 0), item)
    logits = 4 * CONFIG.vocab_size * 4
    assert needs.estimated_sampler(load(), 3) == cache(3, 4) + layer(3, 4) + 3 * logits
    half = needs.estimated_sampler(load(dtype=jnp.bfloat16), 3)
    assert half == cache(3, 2) + layer(3, 2) + 3 * logits + 2 * WEIGHTS
    assert needs.estimated_sampler(load(lora=Lora(rank=2)), 3) == cache(3, 4) + layer(3, 4) + 3 * logits + 4 * WEIGHTS
    with on_mesh(2, 2):
        shared = cache(2, 4) / 2 + layer(2, 4) + 2 * logits
        assert needs.estimated_sampler(load(), 4) == shared
        one = cache(1, 4) / 2 + layer(1, 4) + logits
        assert needs.estimated_sampler(load(), 1) == one


# ---- the state, and programs of few layers --------------------------------------------------------------------------


def test_the_state_by_its_parts():
    other = tiny.pretrained(1)
    e = load(sdpo(), teachers={"other": other}).experiment
    bits = {"parameters": 4 * WEIGHTS, "optimizer": 8 * WEIGHTS + 4, "snapshots": 4 * WEIGHTS}
    assert needs.state_of(e).parts() == {**bits, "frozen weights and teachers": 4 * WEIGHTS}
    assert needs.state_of(dataclasses.replace(e, teacher_dtype=jnp.bfloat16)).parts() == {
        **bits,
        "frozen weights and teachers": 2 * WEIGHTS,
    }
    assert needs.state_of(load().experiment).parts() == {k: v for k, v in bits.items() if k != "snapshots"}
    adapted = needs.state_of(load(lora=Lora(rank=2)).experiment).parts()
    assert adapted["frozen weights and teachers"] == 4 * WEIGHTS > adapted["parameters"]
    assert adapted["optimizer"] == 2 * adapted["parameters"] + 4
    one = sum(math.prod(x.shape) for x in jax.tree.leaves(needs.parameters_of(CONFIG.first(1))))
    assert one < WEIGHTS
    assert [*needs.state_of(e, 1).parts().values()] == [4 * one, 8 * one + 4, 4 * one, 4 * one]


def deep(layers):
    config = dataclasses.replace(
        CONFIG, layers=layers, windows=CONFIG.windows[:1] * layers, ropes=CONFIG.ropes[:1] * layers
    )
    own = load()
    return own._replace(
        experiment=dataclasses.replace(own.experiment, student=tiny.pretrained()._replace(config=config))
    )


def test_few_layers_tell_of_many():
    """Programs of two and of four layers where there are eight or more; else the whole one."""
    asked = []
    line = lambda layers: asked.append(layers) or (1000.0 if layers is None else 100.0 + 7.0 * layers)
    assert needs.by_depth(deep(7), line) == 1000.0 and asked == [None]
    asked.clear()
    assert needs.by_depth(deep(8), line) == 100.0 + 7.0 * 8 and asked == [2, 4]
    assert needs.by_depth(deep(30), line) == 100.0 + 7.0 * 30
    assert needs.by_depth(deep(30), lambda layers: 100.0 - 7.0 * layers) == 100.0 - 7.0 * 4  # never less than of four
    other = dataclasses.replace(deep(30).experiment, teachers={"other": tiny.pretrained(1)})
    asked.clear()
    assert needs.by_depth(deep(30)._replace(experiment=other), line) == 1000.0 and asked == [None]


def test_programs_are_compiled_and_asked():
    """More than the logits of a step of all rows; an update more than all logits of one view."""
    own = load()
    size = 4 * CONFIG.vocab_size
    assert 3 * size < needs.compiled_sampler(own, 3) < 100 * needs.estimated_sampler(own, 3)
    found = needs.compiled_update(own, own.experiment.method.objectives[0], Sizes(8, None, None, False))
    assert 8 * 16 * size < found < 10 * update(own)


def test_what_a_program_takes_beside_its_arguments():
    assert needs.beside_state({"temporary": 5.0, "outputs": 7.0, "donated": 4.0}) == 8.0
    assert needs.beside_state({"temporary": 5.0, "outputs": 3.0, "donated": 4.0}) == 5.0
