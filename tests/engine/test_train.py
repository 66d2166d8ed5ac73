"""The update: skipped when it must be, the same for every chunk size, one program for many batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sdjax.engine import train
from sdjax.engine.policies import ema, frozen, refresh
from sdjax.engine.protocol import Protocol
from sdjax.engine.sensible import ExperimentError
from sdjax.engine.snapshots import refresh_snapshots
from sdjax.engine.tokens import Shapes, collate
from sdjax.engine.train import Experiment
from sdjax.engine.vocabulary import with_rows
from sdjax.kernels.distributions import logprob
from sdjax.kernels.reductions import token_mean
from sdjax.methods.grpo import grpo
from sdjax.methods.sdpo import sdpo
from sdjax.models.transformer import Transformer, initialise
from sdjax.tasks.words import word_tokenizer
from sdjax.types import Method, Objective, Rollout, Task, Term, View

METHOD = sdpo(group_size=2, ema_rate=0.5, top_k=None)
ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))


def rollouts(seed=0, groups=4, taught=True, reward=lambda i: float(i % 2)):
    """Two random completions for each of some prompts."""
    draw, found = np.random.default_rng(seed), []
    for i in range(2 * groups):
        tokens = tuple(int(t) for t in draw.integers(6, len(tiny.tokenizer()), draw.integers(5, 9)))
        example = tiny.TASK.train[i // 2]
        told = ({"role": "user", "content": f"key 3 -> red {example.prompt[0]['content']}"},) if taught else None
        contexts = {"student": example.prompt, "teacher": told}
        found.append(Rollout(example, tokens, (-3.0,) * len(tokens), "", i // 2, reward=reward(i), contexts=contexts))
    return found


def batch(method=METHOD, groups=4, **of):
    return collate(rollouts(groups=groups, **of), train.all_views(method), tiny.tokenizer(), tiny.SHAPES, groups)


TRAP = Method(
    collect=None,
    objectives=(
        Objective(
            {"student": View(trainable=True)},
            lambda dist, token: {"logprobs": logprob(dist["student"], token)},
            # The reward decides what the loss is multiplied by.
            lambda batch, sig, step: {"nll": Term(-sig["logprobs"] * batch.reward[:, None])},
        ),
    ),
)
METHODS = {"sdpo": METHOD, "grpo": grpo(group_size=2), "trap": TRAP}
OPTIMIZERS = {"adamw": ADAMW, "sgd": optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))}


@functools.cache
def model(dtype=jnp.float32):
    """One layer: these tests are about what surrounds the model."""
    own = tiny.config()
    return Transformer(dataclasses.replace(own, layers=1, windows=own.windows[:1], ropes=own.ropes[:1]), dtype)


@functools.cache
def params(seed):
    return jax.jit(initialise, static_argnums=0)(model(), jax.random.key(seed))


@functools.cache
def compiled(method, optimizer, dtype, **shapes):
    """One update for all tests that want the same."""
    models = {name: model(dtype) for name in ("live", "teacher")}
    shapes = Shapes(context=128, completion=8, **{"tokens_per_chunk": None, **shapes})
    return train.make_update(METHODS[method].objectives[0], models, OPTIMIZERS[optimizer], shapes)


class Learner:
    """A state under a compiled update."""

    def __init__(self, method="sdpo", optimizer="adamw", dtype=jnp.float32, **shapes):
        self.update, optimizer = compiled(method, optimizer, dtype, **shapes), OPTIMIZERS[optimizer]
        self.params = jax.tree.map(jnp.array, params(0))
        self.opt_state, self.step = optimizer.init(self.params), 0
        self.others = {"teacher": params(1)}

    def learn(self, *batches):
        for one in batches:
            step = jax.device_put(np.int32(self.step))
            args = (self.params, self.opt_state, self.others, jax.device_put(one), step)
            self.params, self.opt_state, outcome = self.update(*args)
            self.step += 1
        return jax.device_get(outcome)


def host(*trees):
    return jax.tree.map(np.array, jax.device_get(trees))


def assert_same(a, b):
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), a, b)


BATCHES = [batch(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def plain():
    """Three updates without chunks."""
    learner = Learner()
    learner.learn(*BATCHES)
    return learner


# ---- what changes nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"rows_per_chunk": 2}, {"rows_per_chunk": 4, "tokens_per_chunk": 16}])
def test_chunks_change_nothing_but_memory(plain, sizes):
    learner = Learner(**sizes)
    outcome = learner.learn(*BATCHES)
    assert outcome.useful
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    jax.tree.map(close, *host(learner.params, plain.params))


def test_one_program_for_many_batches(plain):
    """And nothing goes to the device that was not put there, nor comes back that was not asked for."""
    learner = Learner()
    learner.others = jax.device_put(learner.others)
    with jax.transfer_guard("disallow"):
        learner.learn(batch(seed=0))
        before = tiny.programs("update")
        for seed in range(1, 6):
            learner.learn(batch(seed=seed))
    assert tiny.programs("update") == before > 0


def test_bf16_computes_and_float32_is_kept():
    batches = [batch(TRAP, seed=seed) for seed in range(3)]
    learner, plain = Learner("trap", dtype=jnp.bfloat16), Learner("trap")
    outcome, expected = learner.learn(*batches), plain.learn(*batches)
    assert {x.dtype for x in jax.tree.leaves(learner.params)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(learner.opt_state) if x.ndim} == {jnp.dtype("float32")}
    assert np.isfinite(outcome.loss)
    np.testing.assert_allclose(outcome.loss, expected.loss, rtol=0.02)
    # Parameters would not move like this if they were rounded to bfloat16 (3 digits) in every step.
    flat = lambda tree: np.concatenate([x.ravel() for x in jax.tree.leaves(host(tree))])
    found, wanted = flat(learner.params) - flat(params(0)), flat(plain.params) - flat(params(0))
    assert np.dot(found, wanted) > 0.9 * np.linalg.norm(found) * np.linalg.norm(wanted)


def test_gradients_are_clipped():
    learner = Learner("trap", optimizer="sgd")
    before = host(learner.params)[0]
    outcome = learner.learn(batch(TRAP))
    moved = jax.tree.map(np.subtract, before, host(learner.params)[0])
    assert outcome.grad_norm > 1e-3  # before clipping
    np.testing.assert_allclose(optax.tree.norm(moved), 1e-3, rtol=1e-3)


# ---- what is not applied --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_what_is_not_finite_is_skipped(factor):
    learner = Learner("trap")
    learner.learn(batch(TRAP))
    before = host(learner.params, learner.opt_state)
    outcome = learner.learn(batch(TRAP, reward=lambda i: factor if i == 3 else 1.0))
    assert not outcome.finite and not outcome.useful
    assert_same(host(learner.params, learner.opt_state), before)
    assert learner.learn(batch(TRAP)).useful
    assert not np.array_equal(jax.tree.leaves(before[0])[0], jax.tree.leaves(host(learner.params))[0])


NO_SIGNAL = {
    "all right": ("grpo", {"reward": lambda i: 1.0}),
    "all of a reward without a finite binary fraction": ("grpo", {"reward": lambda i: 0.1}),
    "no lesson": ("sdpo", {"taught": False}),
}


@pytest.mark.parametrize("case", NO_SIGNAL)
def test_no_signal_leaves_everything_as_it_is(case):
    """Weight decay and momentum from an update before it would move the parameters: they do not."""
    name, of = NO_SIGNAL[case]
    method, learner = METHODS[name], Learner(name)
    assert learner.learn(batch(method)).useful
    before = host(learner.params, learner.opt_state)
    outcome = learner.learn(batch(method, **of))
    assert outcome.finite and not outcome.useful and outcome.loss == 0
    assert_same(host(learner.params, learner.opt_state), before)


# ---- parts and snapshots --------------------------------------------------------------------------------------------


def test_minibatches_hold_whole_groups():
    whole = batch(groups=4)
    parts = list(train.minibatches(whole, 2))
    assert [sorted({*part.group.tolist()}) for part in parts] == [[0, 2], [1, 3]]
    for number, part in enumerate(parts):
        rows = np.isin(whole.group, [number, number + 2])
        np.testing.assert_array_equal(part.completion, whole.completion[rows])
        for name, context in whole.contexts.items():
            of = rows.reshape(len(context.tokens), -1).any(-1)
            np.testing.assert_array_equal(part.contexts[name].tokens, context.tokens[of])
            np.testing.assert_array_equal(part.contexts[name].valid, context.valid[rows])
    with pytest.raises(ExperimentError, match="minibatches=3 does not divide the 4 groups"):
        next(train.minibatches(whole, 3))


def test_snapshots_follow_their_rules():
    rules = {"frozen": frozen(), "ema": ema(0.25), "refresh": refresh(2)}
    run = refresh_snapshots(Method(None, (), rules))
    snapshots = {name: {"w": jnp.full(2, 1.0)} for name in rules}
    seen = []
    for step, live in enumerate((2.0, 3.0, 4.0), start=1):
        snapshots = run({"w": jnp.full(2, live)}, snapshots, jnp.asarray(step))
        seen.append({name: float(tree["w"][0]) for name, tree in snapshots.items()})
    assert [s["frozen"] for s in seen] == [1, 1, 1]
    assert [s["refresh"] for s in seen] == [1, 3, 3]
    assert [s["ema"] for s in seen] == [1.25, 1.6875, 2.265625]


# ---- experiments that cannot work -----------------------------------------------------------------------------------


def experiment(**changes):
    values = {"method": METHOD, "task": tiny.TASK, "student": tiny.pretrained(), "optimizer": ADAMW, **changes}
    return Experiment(**values)


ODD = View("teachr")
BEST = {"keep_best": True, "evaluation": 1, "evaluate_every": 1, "save_every": 1}
WRONG = {
    "steps=0: expected at least 1": {"steps": 0},
    "prompts=-1: expected at least 1": {"prompts": -1},
    "save_every=-1: expected at least 0": {"save_every": -1},
    "completion=0: expected at least 1": {"shapes": Shapes(completion=0)},
    "minibatches=3 does not divide prompts=4": {"minibatches": 3},
    "task empty has no training examples": {"task": Task("empty", (), (), tiny.parity)},
    "view 'teacher' reads policy 'teachr', which is neither": {
        "method": METHOD._replace(objectives=(METHOD.objectives[0]._replace(views={"teacher": ODD}),))
    },
    "the method writes with policy 'nobody', which is neither": {
        "method": METHOD._replace(writers=("teacher", "nobody"))
    },
    "minibatches=2 does not divide the 3 groups that this method adds to prompts=4": {
        "method": METHOD._replace(groups=lambda prompts: prompts + 3),
        "minibatches": 2,
    },
    "keep_best needs evaluation": BEST | {"evaluation": 0},
    "keep_best needs .* evaluate_every": BEST | {"evaluate_every": 0},
    "keep_best needs .* save_every": BEST | {"save_every": 0},
    "teacher 'teacher' goes by the name of one of the method's own": {"teachers": {"teacher": tiny.pretrained()}},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_experiments_are_refused(sentence):
    with pytest.raises(ExperimentError, match=sentence):
        experiment(**WRONG[sentence])


def test_experiments_beside_the_wrong_ones_work():
    experiment(**BEST)
    experiment(method=METHOD._replace(writers=("teacher", "live")))
    experiment(method=METHOD._replace(groups=lambda prompts: prompts + 2), minibatches=2)


def test_what_a_run_does_unless_told_otherwise():
    """Beside the numbers, which are in the table of defaults."""
    whole = experiment()
    assert (whole.shapes, whole.reduce, whole.protocol, whole.dtype) == (Shapes(), token_mean, Protocol(), jnp.float32)
    assert (whole.remat, whole.teacher_dtype, whole.mesh, whole.lora, whole.teachers) == (None, None, None, None, {})


# ---- what an experiment says of its networks ------------------------------------------------------------------------


def test_networks_compute_as_the_experiment_says():
    teachers = {"other": tiny.pretrained(1)}
    some = experiment(teachers=teachers, dtype=jnp.bfloat16, shapes=Shapes(context=100, completion=20))
    found = train.models(some)
    assert {*found} == {"live", "teacher", "other"} and {m.dtype for m in found.values()} == {jnp.bfloat16}
    assert {(m.remat, m.scan, m.reach) for m in found.values()} == {(False, False, 120)}
    found = train.models(dataclasses.replace(some, teacher_dtype=jnp.float16, remat=True, scan=True))
    assert [found[name].dtype for name in ("live", "teacher", "other")] == [jnp.bfloat16, jnp.bfloat16, jnp.float16]
    assert {(m.remat, m.scan) for m in found.values()} == {(True, True)}


def test_a_policy_writes_by_the_template_of_its_first_view_a_trained_one_first():
    views = {
        "other": View("teacher", template={"a": 0}),
        "first": View(template={"a": 1}),
        "second": View(template={"a": 2}),
    }
    of = lambda views: METHOD._replace(objectives=(METHOD.objectives[0]._replace(views=views),))
    assert train.template_of(of(views), "live") == {"a": 1} and train.template_of(of(views), "teacher") == {"a": 0}
    trained = {**views, "second": views["second"]._replace(trainable=True)}
    assert train.template_of(of(trained), "live") == {"a": 2} and train.template_of(of(views), "nobody") == {}


def test_one_device_is_no_mesh():
    assert train.mesh_of(experiment()) is None and train.mesh_of(experiment(mesh=(1, 1))) is None


def test_only_teachers_over_the_students_tokens_get_as_many_rows():
    """Another vocabulary stays what it is: its teacher may write, and is refused where it would score."""
    strange = tiny.pretrained(1)._replace(tokenizer=word_tokenizer(["strange"]))
    wide = with_rows(tiny.pretrained(2), len(tiny.tokenizer()) + 3)
    found = train.over_shared_ids({"strange": strange, "wide": wide, "same": tiny.pretrained(3)}, tiny.pretrained())
    assert found["strange"] is strange and found["same"] is tiny.pretrained(3)
    assert found["wide"].config == tiny.config() and found["wide"].params["embed"].shape[0] == len(tiny.tokenizer())
