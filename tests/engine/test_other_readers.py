"""Views without one network of their own: a policy that depends on the example, and scores that a server gave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from networks import VOCABULARY, batch, context, full_logits, network, prompts, unoptimised

from sdjax.devices import sharding
from sdjax.engine import score, sketch
from sdjax.engine.policies import reading
from sdjax.engine.score import over_members, policies_of, spread, token_signals
from sdjax.engine.tokens import FieldError, collate
from sdjax.kernels.distributions import logprob, normalise, top_k_with_rest
from sdjax.kernels.divergences import forward_kl, jsd
from sdjax.methods.opd import opd
from sdjax.types import UNUSED, ByField, Example, Rollout, Scored, Scores, View

ROWS, LENGTH = 8, 8
LENGTHS = (8, 5, 0, 7, 1, 6, 3, 4)
SHARED, OWN = prompts((3, 7, 5, 4)), prompts((9, 4, 6, 2, 8, 5, 3, 7), seed=1)
EACH = ByField("domain", ("maths", "code"))
NETWORKS = {"live": network("plain"), "maths": network("mixed", 1), "code": network("plain", 2)}
MODELS = {name: model for name, (model, _) in NETWORKS.items()}
PARAMS = {name: params for name, (_, params) in NETWORKS.items()}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


def views(per_rollout, policy=EACH):
    return {"student": View(trainable=True), "teacher": View(policy, per_rollout=per_rollout)}


def data(members, per_rollout=False):
    """Four groups of two rows; `members` says which teacher reads each group."""
    taught = context(OWN if per_rollout else SHARED, 9, ROWS)
    taught = taught.replace(member=jnp.repeat(jnp.asarray(members, jnp.int32), 2))
    found = batch({"student": context(SHARED, 8, ROWS), "teacher": taught}, LENGTHS, LENGTH)
    return found.replace(valid=jnp.asarray([True] * 7 + [False]))


def measured(dist, token):
    return {"jsd": jsd(dist["student"], dist["teacher"], 0.5), "teacher": logprob(dist["teacher"], token)}


@functools.cache
def engine(per_rollout=False, rows=None, tokens=None, policy=EACH, signals=measured):
    """`(params, batch) -> signals, gradients`, compiled."""

    def loss(params, batch):
        found = token_signals(views(per_rollout, policy), signals, MODELS, params, batch, rows=rows, tokens=tokens)
        return sum((1.0 + i) * x.sum() for i, (_, x) in enumerate(sorted(found.items()))), found

    def read_and_pulled(params, batch):
        return jax.grad(loss, has_aux=True)(params, batch)[::-1]

    return jax.jit(read_and_pulled)


# ---- a policy for each example --------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_rollout, sizes", [(False, {}), (True, {"rows": 2, "tokens": 4})])
@pytest.mark.parametrize("members", [(0, 1, 1, 0), (1, 1, 1, 1)])
def test_each_row_is_scored_by_the_policy_of_its_group(per_rollout, sizes, members):
    """Row by row, as plain forward passes score it; the student and the other rows notice nothing."""
    some = data(members, per_rollout)
    found, grads = engine(per_rollout, **sizes)(PARAMS, some)
    for row, length in enumerate(LENGTHS):
        who = EACH.policies[members[row // 2]]
        tokens, told = some.completion[row, :length], OWN[row] if per_rollout else SHARED[row // 2]
        logits = {"teacher": full_logits(MODELS[who], PARAMS[who], told, tokens)}
        logits["student"] = full_logits(MODELS["live"], PARAMS["live"], SHARED[row // 2], tokens)
        wanted = measured({name: normalise(jnp.asarray(x)) for name, x in logits.items()}, tokens)
        for name, value in found.items():
            np.testing.assert_allclose(value[row, :length], wanted[name] * some.valid[row], atol=2e-5, err_msg=name)
    assert all(not x.any() for who in EACH.policies for x in jax.tree.leaves(grads[who]))


def test_gradients_are_those_of_one_teacher_where_all_examples_have_it():
    grads = engine()(PARAMS, data((1, 1, 1, 1)))[1]["live"]
    plain = engine(policy="code")(PARAMS, data((1, 1, 1, 1)).replace(contexts=without_member(data((1, 1, 1, 1)))))[1]
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain["live"]))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * largest)
    jax.tree.map(close, grads, plain["live"])


def without_member(some):
    return {name: own.replace(member=None) for name, own in some.contexts.items()}


def test_one_program_for_every_mixture():
    compiled, before = engine(rows=2), tiny.programs("read_and_pulled")
    for members in ((0, 1, 0, 1), (0, 0, 0, 0), (1, 1, 1, 0)):
        compiled(PARAMS, data(members))
    assert tiny.programs("read_and_pulled") == before + 1


def test_a_policy_reads_its_own_rows_and_no_others(monkeypatch):
    """Two rows at a time, whatever the order of the groups: as many runs as one teacher would take."""
    read, states = [], score.hidden_states

    def counted(model, params, context, completion, present):
        jax.debug.callback(lambda: read.append((model.config.family, len(completion))))
        return states(model, params, context, completion, present)

    monkeypatch.setattr(score, "hidden_states", counted)
    run = jax.jit(lambda batch: token_signals(views(False), measured, MODELS, PARAMS, batch))
    for members, maths in (((0, 1, 1, 0), 2), ((1, 1, 1, 1), 0)):
        read.clear()
        jax.block_until_ready(run(data(members)))
        jax.effects_barrier()
        teachers = [family for family, rows in read if rows == 2]
        assert len(teachers) == 4 and teachers.count(MODELS["maths"].config.family) == maths


@pytest.mark.parametrize("units, members, chunks", [(8, 2, 4), (12, 3, 6), (16, 3, 16)])
def test_chunks_hold_rows_of_one_policy_but_for_one_less_than_there_are_policies(units, members, chunks):
    member = jnp.asarray(np.random.default_rng(0).integers(0, members, units), jnp.int32).repeat(2)
    mixed = lambda x: jnp.broadcast_to(x["m"].max() != x["m"].min(), x["m"].shape) * 1000 + x["row"]
    found = np.asarray(over_members(mixed, {"m": member, "row": jnp.arange(2 * units)}, member, members, units, chunks))
    np.testing.assert_array_equal(found % 1000, np.arange(2 * units))  # every row came back to its place
    size = 2 * units // max(chunks, 2 * members)
    assert (found >= 1000).sum() <= (members - 1) * max(size, 2)


def test_on_a_mesh_rows_stay_in_their_places():
    """Traced for two devices, computed on one: chunks are strided as without members, and nothing is sorted."""
    tree = {"m": jnp.asarray([0, 1, 1, 0] * 2, jnp.int32).repeat(2), "row": jnp.arange(16)}
    first = lambda x: x["row"] + 100 * x["row"][0]
    run = lambda tree: over_members(first, tree, tree["m"], 2, 8, 2)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 1), sharding.AXES)):
        traced = jax.make_jaxpr(run)(tree)
    (found,) = jax.core.eval_jaxpr(traced.jaxpr, traced.consts, *jax.tree.leaves(tree))
    np.testing.assert_array_equal(found % 100, np.arange(16))
    np.testing.assert_array_equal(found // 100, np.tile([0, 0, 2, 2], 4))
    assert "sort" not in str(traced) and "sort" in str(jax.make_jaxpr(run)(tree))


def test_rows_of_several_policies_that_are_read_together_have_a_part_each():
    """As on a mesh, where the rows of a chunk may have any policy; the other policy's part of a row is 0."""
    some, names = data((0, 1, 1, 0)), EACH.policies
    networks, params = [MODELS[n] for n in names], [PARAMS[n] for n in names]

    @jax.jit
    def read(context):
        rest = context, some.completion, some.present
        alone = [score.hidden_states(model, own, *rest) for model, own in zip(networks, params, strict=True)]
        return score.states_by_member(networks, params, *rest), alone

    found, alone = read(some.contexts["teacher"])
    rows = np.asarray(some.contexts["teacher"].member)[:, None, None]
    wanted = np.concatenate([np.where(rows == number, own, 0.0) for number, own in enumerate(alone)], axis=-1)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert all((np.abs(own) > 1e-3).any((1, 2)).all() for own in alone)


def test_a_view_reads_the_policies_that_it_names():
    assert policies_of(View(EACH)) == ("maths", "code") and policies_of(View("live")) == ("live",)
    assert policies_of(View(Scored("far"))) == ()
    method = reading(opd(), "teacher", EACH)
    assert {name: view.policy for name, view in method.objectives[0].views.items()} == {
        "student": "live",
        "teacher": EACH,
    }


def rollout(group, **meta):
    example = Example(f"e{group}", tiny.TASK.train[0].prompt, meta=meta)
    return Rollout(
        example, (5, 6), (-1.0, -1.0), "", group, contexts={"student": example.prompt, "teacher": example.prompt}
    )


def test_the_field_of_the_example_says_who_reads_it():
    some = [
        rollout(0, domain="code"),
        rollout(1, domain="maths"),
        rollout(1, domain="maths"),
        rollout(2, domain="code"),
    ]
    found = collate(some, views(False), tiny.tokenizer(), tiny.SHAPES, groups=4)
    np.testing.assert_array_equal(found.contexts["teacher"].member, [1, 1, 0, 0, 1, 1, 0, 0])
    assert found.contexts["student"].member is None
    with pytest.raises(FieldError, match="example 'e0' has domain='art': it must name one of the teachers maths, code"):
        collate([rollout(0, domain="art")], views(False), tiny.tokenizer(), tiny.SHAPES)
    with pytest.raises(FieldError, match="example 'e0' has no field 'domain'"):
        collate([rollout(0)], views(False), tiny.tokenizer(), tiny.SHAPES)
    silent = rollout(0).read_by(teacher=None)
    assert not collate([silent], views(False), tiny.tokenizer(), tiny.SHAPES).contexts["teacher"].member.any()


# ---- scores from elsewhere ------------------------------------------------------------------------------------------


def answered(dist, token, k):
    """What a server says of positions `[..., V]`: the sampled token first, then the likeliest that are not it."""
    values, places = jax.lax.top_k(dist, k)
    own = places == token[..., None]
    entries = jnp.concatenate([token[..., None], jnp.where(own, UNUSED, places)], axis=-1)
    return Scores(entries, jnp.concatenate([logprob(dist, token)[..., None], values], axis=-1))


def test_spread_entries_are_exact_and_the_rest_has_what_is_left():
    draw = np.random.default_rng(0)
    dist = normalise(jnp.asarray(3 * draw.normal(size=(2, 5, 40)), jnp.float32))
    token = jnp.asarray(draw.integers(0, 40, (2, 5)))
    found = spread(answered(dist, token, 6), 40)
    np.testing.assert_allclose(jnp.exp(found).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(logprob(found, token), logprob(dist, token), atol=1e-6)
    for k in (1, 6):
        wanted = top_k_with_rest(dist, dist, by=dist, k=k)[0]
        np.testing.assert_allclose(top_k_with_rest(found, found, by=found, k=k)[0], wanted, atol=2e-5)
    whole = spread(answered(dist, token, 40), 40)
    np.testing.assert_allclose(whole, dist, atol=1e-6)


def coarse(dist, token):
    student, teacher = top_k_with_rest(dist["student"], dist["teacher"], by=dist["teacher"], k=4)
    return {"kl": forward_kl(student, teacher), "teacher": logprob(dist["teacher"], token)}


@pytest.mark.parametrize("sizes", [{}, {"rows": 2, "tokens": 4}])
def test_scores_stand_for_the_network_that_gave_them(sizes):
    """Values and gradients of signals that read no more than the entries and the rest are those of the network."""
    some = data((1, 1, 1, 1)).replace(contexts=without_member(data((1, 1, 1, 1))))
    wanted, grads = engine(policy="code", signals=coarse)(PARAMS, some)
    dist = whole_distribution(PARAMS, some)
    given = answered(dist, some.completion, 4)
    contexts = {**some.contexts, "teacher": some.contexts["teacher"].replace(scores=given)}
    found, scored = engine(policy=Scored("far"), signals=coarse, **sizes)(PARAMS, some.replace(contexts=contexts))
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-4, err_msg=name)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads["live"]))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4 * largest)
    jax.tree.map(close, scored["live"], grads["live"])


@jax.jit
def whole_distribution(params, some):
    """`[B, T, V]` of the teacher `code`."""
    return token_signals({"teacher": View("code")}, lambda dist, token: dist, MODELS, params, some)["teacher"]


def test_a_sketch_of_a_batch_keeps_who_reads_and_what_was_scored():
    some = data((0, 1, 1, 0))
    scored = some.contexts["teacher"].replace(scores=answered(jnp.zeros((ROWS, LENGTH, 40)), some.completion % 40, 4))
    some = some.replace(contexts={**some.contexts, "teacher": scored})
    found = sketch.sized(some, 5, 2, 64, {"student": 16, "teacher": 24}).contexts
    assert found["teacher"].member.shape == (10,) and found["teacher"].scores.tokens.shape == (10, 64, 5)
    assert found["student"].member is None and found["student"].scores is None


def test_scores_of_rollouts_go_into_the_batch():
    scores = Scores(np.asarray([[5, 9], [6, UNUSED]], np.int32), np.asarray([[-0.5, -1.5], [-2.0, 0.0]], np.float32))
    one, other = rollout(0), rollout(1).read_by(teacher=None)
    some = [one.scored(teacher=scores), other]
    found = collate(some, views(False, Scored("far")), tiny.tokenizer(), tiny.SHAPES, groups=2)
    tokens, logprobs = found.contexts["teacher"].scores
    np.testing.assert_array_equal(tokens[0, :2], scores.tokens)
    np.testing.assert_array_equal(logprobs[0, :2], scores.logprobs)
    assert (tokens[0, 2:] == UNUSED).all() and (tokens[1] == UNUSED).all() and tokens.shape[-1] == 2
    assert VOCABULARY < UNUSED
