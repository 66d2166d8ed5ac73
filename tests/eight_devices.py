"""What `test_sharding.py` runs in a process of its own: methods and the sampler on meshes of eight virtual devices.

The tiny model is made wider here: heads and vocabulary divide by 8, and no other size is a vocabulary's or a part of it.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from quick import slow_but

VOCABULARY = 88


@functools.cache
def config():
    """Eight heads, 88 vocabulary entries, of which the tokenizer has the first: the others are padding."""
    return tiny.from_hf(
        {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
        }
    )


tiny.config = config

from first_batches import material, recorded, told
from methods import test_pairs as pairs

from sdjax.cli import measure, models
from sdjax.cli.judged import judged
from sdjax.cli.options import method_names
from sdjax.devices import programs, sharding
from sdjax.engine import master_weights, optimizers, train
from sdjax.engine.generate import GREEDY, Sampling, first, generate, mixture
from sdjax.engine.policies import reading, row_keys
from sdjax.engine.protocol import Protocol
from sdjax.engine.tokens import Shapes
from sdjax.engine.train import Experiment, mesh_of
from sdjax.kernels.top_k import top_k
from sdjax.methods.sdpo import sdpo
from sdjax.models import adapters, attention, pretrained, transformer
from sdjax.models.adapters import Lora
from sdjax.models.configs import to_hf
from sdjax.models.files import peft_files
from sdjax.planning import scaling
from sdjax.run.fit import fit
from sdjax.run.programs import Programs
from sdjax.run.reading import Rows
from sdjax.types import ByField, Scored, Scores, Task

LAYOUTS = ("8x1", "4x2", "2x4", "1x8")
QUICK = {("sdpo", "4x2"), ("grpo", "8x1")}
"""What the quick set looks at; the slow one looks at everything."""


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """Tiny parameters are split over the data axis too."""
    monkeypatch.setattr(sharding, "LEAST", 1)


def on(layout):
    return sharding.on(sharding.make_mesh(sharding.mesh_shape(layout)))


def vocabulary_gathers(text):
    """Exchanges of arrays with a vocabulary axis, or a part of one, that are not the embedding's or the head's."""
    parts = {VOCABULARY // m for m in (1, 2, 4, 8)}
    width = {32 // d for d in (1, 2, 4, 8)}
    weights = lambda shape: len(shape) == 2 and bool({*shape} & width)
    moved = [c for c in programs.collectives(text) if c.kind in ("all-gather", "all-to-all")]
    return [c for c in moved if any({*shape} & parts and not weights(shape) for shape in c.shapes)]


# ---- methods --------------------------------------------------------------------------------------------------------


def updates(name, shapes=tiny.SHAPES):
    """The method's update programs, one per objective, that hand out their gradient."""
    method, _, _, networks = material(name)
    return [train.make_update(o, networks, recorded(), shapes) for o in method.objectives]


def taken(update, batch, others):
    """Loss and gradient of an update on the host, and the parameters' and gradient's shardings."""
    params = jax.tree.map(jnp.array, sharding.place_parameters(tiny.pretrained().params))
    state = jax.jit(lambda p: sharding.constrain_parameters(jax.tree.map(jnp.zeros_like, p)))(params)
    others = {policy: sharding.place_parameters(tree) for policy, tree in others.items()}
    arguments = params, state, others, sharding.place_rows(batch), jnp.asarray(1)
    program = update.lower(*arguments).compile()
    before = jax.tree.map(lambda x: x.sharding, (params, state))
    params, grads, outcome = program(*arguments)
    same = jax.tree.map(lambda x, old: x.sharding.is_equivalent_to(old, x.ndim), (params, grads), before)
    return jax.device_get((outcome.loss, grads, outcome.useful)), same, program.as_text()


@functools.cache
def alone(name):
    """Losses and gradients on one device."""
    _, batch, others, _ = material(name)
    return [taken(update, batch, others)[0] for update in updates(name)]


def assert_equal(found, wanted):
    (loss, grads, useful), (expected, expected_grads, _) = found, wanted
    assert useful
    np.testing.assert_allclose(loss, expected, atol=1e-5, rtol=1e-5)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected_grads))
    assert largest > 0
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(largest, 1.0), rtol=1e-5)


marked = [
    pytest.param(name, layout, marks=() if (name, layout) in QUICK else pytest.mark.slow, id=f"{name}-{layout}")
    for name in method_names()
    for layout in LAYOUTS
]
marked.append(pytest.param("sdpo", "2x2x2", marks=pytest.mark.slow))  # to a model without experts a second data axis


@pytest.mark.parametrize("name, layout", marked)
def test_an_update_is_that_of_one_device(name, layout):
    _, batch, others, _ = material(name)
    for update, wanted in zip(updates(name), alone(name), strict=True):
        with on(layout):
            found, same, text = taken(update, batch, others)
        assert_equal(found, wanted)
        assert all(jax.tree.leaves(same)), "the state came back in another layout"
        assert not vocabulary_gathers(text)


def with_scores(batch):
    """Every token's own log-probability and that of four others, as a server would say them."""
    draw = np.random.default_rng(0)
    others = 30 + draw.permuted(np.broadcast_to(np.arange(40), (*batch.completion.shape, 40)), axis=-1)[..., :4]
    entries = np.concatenate([batch.completion[..., None], others], axis=-1).astype(np.int32)
    return Scores(entries, np.log(draw.dirichlet(np.ones(6), entries.shape[:-1])[..., :5]).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["4x2", "2x4"])
@pytest.mark.parametrize("policy", [ByField("domain", ("teacher", "other")), Scored("far")], ids=["field", "server"])
def test_views_without_one_network_of_their_own_are_those_of_one_device(policy, layout):
    method, batch, others, networks = material("gkd")
    others, networks = {**others, "other": tiny.pretrained(2).params}, {**networks, "other": networks["teacher"]}
    (objective,) = reading(method, "teacher", policy).objectives
    told = batch.contexts["teacher"]
    member, scores = (batch.group % 2, None) if isinstance(policy, ByField) else (None, with_scores(batch))
    batch = batch.replace(contexts={**batch.contexts, "teacher": told.replace(member=member, scores=scores)})
    update = train.make_update(objective, networks, recorded(), tiny.SHAPES)
    wanted, _, _ = taken(update, batch, others)
    with on(layout):
        found, _, _ = taken(update, batch, others)
    assert_equal(found, wanted)


def test_chunks_stay_split():
    """Rows and tokens in chunks, on two axes."""
    _, batch, others, _ = material("sdpo")
    shapes = tiny.SHAPES.__class__(128, 8, 8, rows_per_chunk=4, tokens_per_chunk=8)  # of each device along data
    with on("4x2"):
        found, _, text = taken(updates("sdpo", shapes)[0], batch, others)
    assert_equal(found, alone("sdpo")[0])
    assert not vocabulary_gathers(text)


def test_gathers_are_seen():
    """The negative control: the library's own top-k gathers its argument."""
    text = lambda function, z: jax.jit(lambda z: function(z, 3)).lower(z).compile().as_text()
    with on("4x2"):
        z = sharding.place(np.ones((8, 4, VOCABULARY), np.float32), sharding.P("data", None, "model"))
        assert vocabulary_gathers(text(jax.lax.top_k, z)) and not vocabulary_gathers(text(top_k, z))


@pytest.mark.parametrize("shape", [(4, 2), (2, 2, 2), (2, 4), (2, 1), (1, 2)])
def test_the_largest_entries_and_their_places_are_those_of_one_device(shape):
    """Of one axis and of several, of rows and a vocabulary that do not divide, more than a part has; ties, and -inf."""
    draw, mesh = np.random.default_rng(0), sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])
    for size, k in (((30,), 3), ((8, 32), 5), ((3, 30), 1), ((8, 2, 30), 20), ((3, 8, 9), 9)):
        z = draw.integers(-3, 3, size).astype(np.float32)  # many ties
        z[..., 1:4] = -np.inf
        places = np.argsort(-z, axis=-1, kind="stable")[..., :k]
        wanted = np.take_along_axis(z, places, axis=-1), places
        alone = top_k(jnp.asarray(z), k)
        with sharding.on(mesh):
            found = jax.jit(top_k, static_argnums=1)(sharding.place_whole(z), k)
        for one, other, third in zip(found, alone, wanted, strict=True):
            np.testing.assert_array_equal(one, third)
            np.testing.assert_array_equal(other, third)
            # Rows that the data axis divides stay on their devices.
            spread = math.prod(shape) // shape[1]
            leading = (size[0] // (spread if size[0] == 8 else 1), *size[1:-1]) if size[1:] else ()
            assert one.addressable_shards[0].data.shape == (*leading, k)


# ---- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", slow_but({"4x2"}, ["4x2", "1x8"]))
def test_layers_in_a_loop_are_those_of_one_device(layout):
    params, tokens = tiny.pretrained().params, np.random.default_rng(0).integers(6, 28, (8, 16)).astype(np.int32)
    mask = np.arange(16) >= np.arange(8)[:, None]

    def loss(params, model):
        states, _ = transformer.hidden(model, params, tokens, transformer.positions_of(mask), mask)
        return jnp.sum(jnp.where(mask[..., None], states, 0) ** 2)

    of = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    wanted = jax.device_get(of(params, tiny.model()))
    with on(layout):
        looped = transformer.Transformer(config(), remat=True, scan=True)
        found = jax.device_get(of(sharding.place_parameters(params), looped))
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(wanted[1]))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * largest, rtol=1e-5)


@pytest.mark.parametrize("layout", slow_but({"4x2", "2x2x2"}, ["4x2", "2x4", "2x2x2", "2x1x4"]))
def test_experts_that_are_split_are_those_of_one_device(layout):
    """Values, and gradients of everything: experts over the model and the expert axis, each with its part of the tokens."""
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    moe = tiny.from_hf({**to_hf(config()), "model_type": "qwen3_moe", "architectures": None, **sizes})
    model = transformer.Transformer(moe)
    params = jax.jit(transformer.initialise, static_argnums=0)(model, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    tokens = np.random.default_rng(0).integers(6, 28, (8, 16)).astype(np.int32)
    mask = np.arange(16) >= np.arange(8)[:, None]

    def loss(params):
        states, _ = transformer.hidden(model, params, tokens, transformer.positions_of(mask), mask)
        return jnp.sum(jnp.where(mask[..., None], jnp.sin(states), 0))

    of = jax.jit(jax.value_and_grad(loss))
    wanted = jax.device_get(of(params))
    with on(layout):
        placed = sharding.place_parameters(params)
        over = "model" if layout.count("x") == 1 else ("model", "expert")
        assert placed["layers_0"]["mlp"]["down"].sharding.spec[0] == over
        found = jax.device_get(jax.jit(jax.value_and_grad(loss))(placed))
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(wanted[1]))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * largest, rtol=1e-4)


KERNELS = {
    "splash": functools.partial(attention.by_kernel, interpret=True),
    "cudnn": functools.partial(attention.by_cudnn, implementation="xla"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", slow_but({"4x2"}, ["4x2", "1x8"]))
def test_the_attention_kernels_are_that_of_one_device(kernel, layout, monkeypatch):
    monkeypatch.setattr(attention, "TILE", 128)
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    positions = np.broadcast_to(np.arange(24), (4, 24))
    run = attention.Keys(draw(0, 4, 24, 8, 4), draw(1, 4, 24, 8, 4), positions, np.ones((4, 24), bool))
    query = draw(2, 4, 24, 8, 2, 4)
    of = lambda how: jax.jit(jax.value_and_grad(lambda q, run: jnp.sum(jnp.sin(how(q, positions, (run,))))))
    wanted = jax.device_get(of(attention.at_once)(query, run))
    with on(layout):
        found = jax.device_get(of(KERNELS[kernel])(query, run))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-4)


# ---- the sampler ----------------------------------------------------------------------------------------------------

SAMPLINGS = {"plain": Sampling(), "greedy": GREEDY, "filtered": Sampling(0.8, top_p=0.9, top_k=20, min_p=0.01)}


def sampled(sampling, choose=first):
    """16 completions of 8 prompts, two of each, by one model or by two."""
    rng = np.random.default_rng(0)
    count = 1 if choose is first else 2
    contexts = tuple(
        (rng.integers(6, 28, (8, 16 + 8 * k)).astype(np.int32), np.ones((8, 16 + 8 * k), bool)) for k in range(count)
    )
    params = tuple(sharding.place_parameters(spread(tiny.pretrained(k).params)) for k in range(count))
    keys = row_keys(jax.random.key(1), jnp.arange(8), 2)
    stop = jnp.asarray([1], jnp.int32)
    arguments = ((tiny.policy().model,) * count, params, sharding.place_rows(contexts), keys, sampling, stop, 12)
    program = generate.lower(*arguments, length=12, choose=choose).compile()
    return jax.device_get(generate(*arguments, length=12, choose=choose)), program.as_text()


def spread(params):
    """Parameters whose distributions are neither flat nor certain."""
    return jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)


CHOICES = {"first": first, "mixture": mixture(0.5)}


@functools.cache
def sampled_alone(name, choice):
    return sampled(SAMPLINGS[name], CHOICES[choice])[0]


some_layouts = pytest.mark.parametrize("layout", slow_but(("4x2", "1x8"), LAYOUTS))


@some_layouts
def test_sampled_tokens_are_those_of_one_device(layout, monkeypatch):
    """Which reads its short cache whole; here it is read in 4, 8 and 12 columns."""
    for name, choice in [*((name, "first") for name in SAMPLINGS), ("plain", "mixture")]:
        wanted = sampled_alone(name, choice)
        with on(layout), monkeypatch.context() as patch:
            patch.setattr(attention, "LEAST", 4)
            found, text = sampled(SAMPLINGS[name], CHOICES[choice])
        assert found.tokens.max() < len(tiny.tokenizer())  # the other entries are padding
        assert text.count(" conditional(") >= 2  # of what each layer reads of its cache
        np.testing.assert_array_equal(found.tokens, wanted.tokens, err_msg=name)
        np.testing.assert_array_equal(found.present, wanted.present)
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=2e-5, rtol=1e-5)
        assert not vocabulary_gathers(text)


@pytest.mark.parametrize("layout", slow_but({"4x2"}, ["4x2", "1x8"]))
def test_collected_rows_are_those_of_one_device(layout):
    """The host half: padding to whole devices, sampling, scoring."""
    wanted = pairs.written(pairs.rlrt)[0][0]
    with on(layout):
        env = pairs.environment_of(pairs.made(pairs.rlrt))
        split = lambda policy: dataclasses.replace(policy, params=sharding.place_parameters(policy.params))
        env = env._replace(policies={name: split(policy) for name, policy in env.policies.items()})
        found, _ = pairs.made(pairs.rlrt).collect(env, tiny.TASK.train[:2], jax.random.key(0), None)
    assert [r.tokens for r in found] == [r.tokens for r in wanted]
    assert max(t for r in found for t in r.tokens) < len(tiny.tokenizer())
    for one, other in zip(found, wanted, strict=True):
        assert one.extras.keys() == other.extras.keys()
        for name, value in one.extras.items():
            np.testing.assert_allclose(value, other.extras[name], atol=1e-4, rtol=1e-4)


# ---- evaluating -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", slow_but({"4x2"}, ["4x2", "8x1", "2x4"]))
@pytest.mark.slow
def test_an_evaluation_is_that_of_one_device(layout, tmp_path):
    """A model and an adapter of it: the same answers, word for word, so the same numbers."""
    pretrained.save(tmp_path / "model", config(), tiny.pretrained().params, tiny.tokenizer())
    lora = Lora(rank=2)
    own = jax.tree.map(lambda x: x + 0.5, adapters.initial(config(), lora, jax.random.key(1)))
    peft_files.save(tmp_path / "adapter", config(), own, lora, str(tmp_path / "model"))
    rows = [{"prompt": f"ask key {k} ->", "answer": str(k)} for k in range(5)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names, data, protocol = (
        [str(tmp_path / n) for n in ("model", "adapter")],
        str(tmp_path / "p.jsonl"),
        Protocol(4, 1.0),
    )
    shapes = Shapes(context=32, completion=6, rows=8)
    problems = judged(data, "file", "maths", Rows(), Programs())
    setting = measure.Setting(problems, protocol, shapes, (), False, 0, "", "", tmp_path / "one")
    for name in names:  # without a mesh: on the first device
        measure.measured(name, lambda name=name: models.named(name), setting)
    how = {"data": data, "protocol": protocol, "completion": 6, "context": 32, "rows": 8}
    measure.measure(tuple(names), **how, mesh=layout, out=str(tmp_path / "mesh"))
    found, wanted = (
        {file.parent.name: file.read_text() for file in (tmp_path / kind).glob("*/answers.jsonl")}
        for kind in ("mesh", "one")
    )
    assert found == wanted and len({*found.values()}) == 2
    assert len(list((tmp_path / "mesh").glob("*-minus-*.json"))) == 1


# ---- figures --------------------------------------------------------------------------------------------------------


def test_figures_shrink_and_grow_with_the_mesh():
    """One device exchanges nothing; eight along data do an eighth each and receive parameters and gradients."""
    method, batch, _, _ = material("sdpo")
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    rows = {}
    for shape in ((1, 1), (8, 1), (1, 8)):
        with sharding.on(sharding.make_mesh(shape, jax.devices()[: shape[0] * shape[1]])):
            rows[shape] = scaling.row_of(method, tiny.model(), batch, tiny.SHAPES, shape, 8)
    one, data, model = rows.values()
    assert not one.exchanged and one.flops > 0
    assert data.flops == pytest.approx(one.flops / 8, rel=0.02)
    assert one.flops / 8 <= model.flops * 1.02 and model.flops < one.flops / 6
    assert data.state < one.state / 7
    size = sum(x.size * 4 for x in jax.tree.leaves(tiny.pretrained().params))
    assert data.exchanged["all-gather"] > size  # every parameter is gathered, and the teacher's too
    # Along the model axis activations are summed, parameters stay where they are.
    assert model.exchanged["all-reduce"] > model.exchanged.get("all-gather", 0.0)
    assert scaling.table(list(rows.values())).count("\n") == 4


# ---- adapters -------------------------------------------------------------------------------------------------------


def run_of_adapters(layout, base, folder):
    """The losses of a run that trains adapters, and its last adapters."""
    experiment = Experiment(
        method=sdpo(group_size=2, top_k=None, lesson=told),
        task=Task("recall", tiny.TASK.train, tiny.TASK.test, tiny.parity),
        student=tiny.pretrained(),
        optimizer=optax.adam(3e-2),
        shapes=Shapes(context=48, completion=8, rows=8, tokens_per_chunk=16),
        steps=2,
        prompts=8,
        evaluation=0,
        export=False,
        remat=True,
        lora=Lora(rank=4, base=base),
        mesh=sharding.mesh_shape(layout),
    )
    state = fit(experiment, folder).state
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return losses, jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float", "nf4"])
def test_a_run_of_adapters_is_the_same_on_every_layout(base, tmp_path):
    (losses, params), *others = (run_of_adapters(layout, base, tmp_path / layout) for layout in ("8x1", "2x4"))
    assert losses[-1] > 0
    for found, own in others:
        np.testing.assert_allclose(found, losses, rtol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4), own, params)


def test_rows_are_not_sorted_on_a_mesh():
    experiment = Experiment(
        method=sdpo(),
        task=Task("recall", tiny.TASK.train, tiny.TASK.test, tiny.parity),
        student=tiny.pretrained(),
        optimizer=optax.adam(1e-3),
        shapes=Shapes(lengths=4),
        steps=1,
        prompts=8,
    )
    with pytest.raises(
        sharding.MeshError, match="lengths=4 sorts the rows of one device, and mesh=8x1 has 8: leave --le"
    ):
        mesh_of(experiment)


# ---- what is kept of parameters -------------------------------------------------------------------------------------


def run_of_little_state(layout, folder):
    """The losses of a run with bfloat16 parameters and Adafactor, its last parameters, and where its state lies."""
    experiment = Experiment(
        method=sdpo(group_size=2, top_k=None, lesson=told),
        task=Task("recall", tiny.TASK.train, tiny.TASK.test, tiny.parity),
        student=tiny.pretrained(),
        optimizer=optimizers.chosen("adafactor", 1e-3),
        shapes=Shapes(context=48, completion=8, rows=8, tokens_per_chunk=16),
        steps=2,
        prompts=8,
        evaluation=0,
        export=False,
        params_dtype=jnp.bfloat16,
        memory="off",
        mesh=sharding.mesh_shape(layout),
    )
    state = fit(experiment, folder).state
    for own, remainder in zip(*map(jax.tree.leaves, (state.params, state.opt_state.remainder)), strict=True):
        assert own.sharding.is_equivalent_to(remainder.sharding, own.ndim)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    masters = jax.tree.map(master_weights.joined, state.params, state.opt_state.remainder)
    return losses, jax.device_get(masters)


@pytest.mark.slow
def test_master_weights_are_the_same_on_every_layout(tmp_path):
    (losses, params), (found, others) = (run_of_little_state(layout, tmp_path / layout) for layout in ("8x1", "2x4"))
    assert losses[-1] > 0
    np.testing.assert_allclose(found, losses, rtol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), others, params)
