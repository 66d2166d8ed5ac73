"""The sampler against full forward passes, and its draws against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from networks import NAMES, VOCABULARY, full_logits, jaxprs, network, padded, prompts, unoptimised

from sdjax.engine import score
from sdjax.engine.generate import GREEDY, Sampling, draw, filtered, generate, inverse_cdf, mixture
from sdjax.kernels.distributions import logprob, normalise
from sdjax.models import attention, transformer
from sdjax.types import Context

ROWS, LENGTH = 4, 8
NEVER = (-1, -1, -1)
LAST = np.float32(1 - 2.0**-24)
CHOSEN = Sampling(temperature=0.7, top_p=0.8)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


def keys(rows=ROWS, seed=5):
    return jax.random.split(jax.random.key(seed), rows)


def write(name, rows, sampling=GREEDY, *, width=8, key=None, stop=NEVER, limit=LENGTH):
    """Completions of one network after prompts, as numpy arrays."""
    model, params = network(name)
    key = keys() if key is None else key
    limit = jnp.broadcast_to(jnp.asarray(limit, jnp.int32), (len(key),))
    done = generate((model,), (params,), (padded(rows, width),), key, sampling, jnp.asarray(stop), limit, length=LENGTH)
    return jax.tree.map(np.asarray, done)


TWO = prompts((3, 7))


# ---- tokens and log-probabilities ---------------------------------------------------------------------------------


def test_greedy_tokens_are_the_argmax_of_the_full_forward_pass_at_every_step(name):
    done = write(name, TWO)
    for row in range(ROWS):
        logits = full_logits(*network(name), TWO[row // 2], done.tokens[row])
        np.testing.assert_array_equal(done.tokens[row], logits.argmax(-1))
    assert len({tuple(row) for row in done.tokens}) == 2
    assert all(len(set(row)) > 3 for row in done.tokens)


def test_how_much_of_the_cache_a_step_reads_changes_nothing(name, monkeypatch):
    monkeypatch.setattr(attention, "LEAST", 2)
    (model, params), length = network(name), 17  # read in 2, 4, 8 and 17 columns
    done = generate((model,), (params,), (padded(TWO, 8),), keys(), GREEDY, jnp.asarray(NEVER), length, length=length)
    for row in range(ROWS):
        logits = full_logits(model, params, TWO[row // 2], np.asarray(done.tokens[row]))
        np.testing.assert_array_equal(done.tokens[row], logits.argmax(-1))


@pytest.mark.parametrize("sampling", [Sampling(), CHOSEN, GREEDY], ids=["plain", "filtered", "greedy"])
def test_recorded_logprobs_are_those_of_the_scorer(name, sampling):
    """At temperature 1 and unfiltered, whatever the sampling was."""
    model, params = network(name)
    done = write(name, TWO, sampling)
    scored = scorer(model)(params, Context(*padded(TWO, 8), jnp.ones(ROWS, bool)), done.tokens, done.present)
    np.testing.assert_allclose(done.logprobs, scored, atol=1e-5)
    for row in range(ROWS):
        plain = normalise(jnp.asarray(full_logits(model, params, TWO[row // 2], done.tokens[row])))
        np.testing.assert_allclose(done.logprobs[row], logprob(plain, jnp.asarray(done.tokens[row])), atol=1e-5)


@functools.cache
def scorer(model):
    """`(params, context, completion, present)` -> log-probabilities by the engine's hidden states."""

    def scored(params, context, completion, present):
        hidden = score.hidden_states(model, params, context, completion, present)
        return logprob(normalise(transformer.logits(model, params, hidden)), completion)

    return jax.jit(scored)


def test_a_completion_of_one_token_is_scored_by_its_context_alone():
    model, params = network("mixed")
    done = write("mixed", TWO, limit=1)
    found = scorer(model)(params, Context(*padded(TWO, 8), jnp.ones(4, bool)), done.tokens[:, :1], done.present[:, :1])
    np.testing.assert_allclose(done.logprobs[:, :1], found, atol=1e-5)


# ---- the end ------------------------------------------------------------------------------------------------------


def test_a_stop_token_that_comes_first_is_the_whole_completion():
    opening = int(write("plain", TWO).tokens[0, 0])
    done = write("plain", TWO, stop=(opening, -1, -1))
    assert done.tokens[0].tolist() == [opening] + [0] * (LENGTH - 1)
    assert done.present.sum(-1)[0] == 1 and done.finished[0]
    assert done.logprobs[0, 0] < 0 and not done.logprobs[0, 1:].any()


def test_without_a_stop_token_the_buffer_is_filled_and_nothing_is_finished():
    done = write("plain", TWO, Sampling())
    assert done.present.all() and not done.finished.any()


def test_each_of_several_stop_tokens_ends_its_own_row_and_changes_nothing_before():
    free = write("mixed", TWO, Sampling())
    stop = (int(free.tokens[0, 2]), int(free.tokens[2, 4]), -1)
    done = write("mixed", TWO, Sampling(), stop=stop)
    for row in range(ROWS):
        hits = np.flatnonzero(np.isin(free.tokens[row], stop))
        length = hits[0] + 1 if len(hits) else LENGTH
        assert done.present[row].tolist() == [True] * length + [False] * (LENGTH - length)
        assert done.finished[row] == bool(len(hits))
        np.testing.assert_array_equal(done.tokens[row, :length], free.tokens[row, :length])
        np.testing.assert_array_equal(done.logprobs[row, :length], free.logprobs[row, :length])
        assert not done.tokens[row, length:].any() and not done.logprobs[row, length:].any()
    assert done.finished.sum() >= 2 and not done.finished.all()


def test_the_limit_is_per_row_and_cuts_without_finishing():
    free = write("plain", TWO, Sampling())
    limit = (0, 1, 5, 99)
    done = write("plain", TWO, Sampling(), limit=limit)
    assert done.present.sum(-1).tolist() == [0, 1, 5, LENGTH]
    np.testing.assert_array_equal(done.tokens, np.where(done.present, free.tokens, 0))
    assert not done.finished.any()


def test_a_stop_token_at_the_limit_is_finished():
    free = write("plain", TWO)
    stop = int(free.tokens[0, 2])
    assert stop not in free.tokens[0, :2]
    assert write("plain", TWO, stop=(stop, -1, -1), limit=3).finished[0]


def test_the_loop_ends_with_the_last_row():
    """Counts how often a distribution is asked for."""
    free = write("plain", TWO)
    model, params = network("plain")
    counted = []

    def choose(logits, keys):
        jax.debug.callback(lambda: counted.append(1))
        return logits[0]

    def steps(stop, limit):
        counted.clear()
        inputs = (padded(TWO, 8),), keys(), GREEDY, jnp.asarray(stop), jnp.asarray(limit)
        jax.block_until_ready(generate((model,), (params,), *inputs, length=LENGTH, choose=choose))
        jax.effects_barrier()
        return len(counted)

    assert steps(NEVER, (8, 8, 8, 8)) == LENGTH
    assert steps(NEVER, (1, 3, 5, 2)) == 5
    stop = (int(free.tokens[0, 1]), int(free.tokens[2, 2]), -1)
    wanted = max(np.flatnonzero(np.isin(row, stop))[0] + 1 for row in free.tokens)
    assert steps(stop, (8, 8, 8, 8)) == wanted < LENGTH


# ---- independence -------------------------------------------------------------------------------------------------


def same(found, expected):
    """Equal tokens, and log-probabilities up to rounding."""
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.present, expected.present)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


def some(done, rows):
    return jax.tree.map(lambda x: x[rows], done)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()], ids=["greedy", "sampled"])
def test_left_padding_is_invisible(sampling):
    same(write("mixed", TWO, sampling, width=13), write("mixed", TWO, sampling))


def test_a_row_depends_neither_on_its_neighbours_nor_on_the_batch_size():
    done = write("mixed", TWO, Sampling())
    others = [prompts((5,), seed=9)[0], TWO[1]]
    same(some(write("mixed", others, Sampling()), slice(2, 4)), some(done, slice(2, 4)))
    alone = write("mixed", TWO[1:], Sampling(), key=keys()[3:])
    same(some(alone, [0]), some(done, [3]))
    assert not np.array_equal(done.tokens[2], done.tokens[3])


def test_a_prompt_that_is_shared_and_one_that_is_repeated_give_the_same_tokens():
    same(write("mixed", TWO[:1] * 4, Sampling()), write("mixed", TWO[:1], Sampling()))


def test_the_key_decides():
    assert not np.array_equal(
        write("plain", TWO, Sampling()).tokens, write("plain", TWO, Sampling(), key=keys(seed=6)).tokens
    )


# ---- several contexts ---------------------------------------------------------------------------------------------

OTHER = prompts((4, 6), seed=3)
QUARTER, NONE, ALL = mixture(0.25), mixture(0.0), mixture(1.0)


def write_two(names, contexts, choose, sampling):
    models, params = zip(*map(network, names), strict=True)
    contexts = tuple(padded(rows, 8) for rows in contexts)
    limit = jnp.full(ROWS, LENGTH)
    done = generate(models, params, contexts, keys(), sampling, jnp.asarray(NEVER), limit, length=LENGTH, choose=choose)
    return jax.tree.map(np.asarray, done)


def test_a_mixture_of_equal_contexts_is_ordinary_sampling():
    same(write_two(("mixed", "mixed"), (TWO, TWO), QUARTER, Sampling()), write("mixed", TWO, Sampling()))


def test_mixture_of_rate_0_is_the_first_context():
    same(write_two(("plain", "mixed"), (TWO, OTHER), NONE, Sampling()), write("plain", TWO, Sampling()))


def test_mixture_of_rate_1_writes_as_the_second_context_and_records_the_first():
    done = write_two(("plain", "mixed"), (TWO, OTHER), ALL, Sampling())
    np.testing.assert_array_equal(done.tokens, write("mixed", OTHER, Sampling()).tokens)
    for row in range(ROWS):
        plain = normalise(jnp.asarray(full_logits(*network("plain"), TWO[row // 2], done.tokens[row])))
        np.testing.assert_allclose(done.logprobs[row], logprob(plain, jnp.asarray(done.tokens[row])), atol=1e-5)


def test_the_coin_of_a_mixture_falls_at_its_rate_and_ignores_the_draw():
    many = keys(4000)
    logits = jnp.stack([jnp.zeros((4000, 2)), jnp.ones((4000, 2))])
    second = np.asarray(QUARTER(logits, many))[:, 0]
    assert abs(second.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    uniform = np.asarray(jax.vmap(jax.random.uniform)(many))
    assert abs(np.corrcoef(second, uniform)[0, 1]) < 4 / np.sqrt(4000)


# ---- one program --------------------------------------------------------------------------------------------------


def test_many_calls_compile_once_with_filters_and_once_without():
    write("plain", TWO, Sampling()), write("plain", TWO, Sampling(top_p=0.5))
    before = tiny.programs("generate")
    for seed, sampling in enumerate([Sampling(0.5), Sampling(1.0, 0.9, 7, 0.1), Sampling(0.0), Sampling(top_k=3)]):
        stop, limit = (seed, 7, -1), (1, 2, 3, 4 + seed)
        write("plain", prompts((2, 5), seed), sampling, key=keys(seed=seed), stop=stop, limit=limit)
    assert tiny.programs("generate") == before > 0


def random_sizes(jaxpr):
    """The sizes of all arrays that come out of a random bit generator."""
    known = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")
    found = [e for e in jaxprs(jaxpr) if any(e.primitive.name.startswith(k) for k in known)]
    return [variable.aval.size for equation in found for variable in equation.outvars]


def test_no_random_bits_of_vocabulary_size_are_drawn():
    model, params = network("plain")
    inputs = (padded(TWO, 8),), keys(), Sampling(), jnp.asarray(NEVER), jnp.full(ROWS, LENGTH)
    program = jax.make_jaxpr(lambda *x: generate((model,), (params,), *x, length=LENGTH))(*inputs)
    sizes = random_sizes(program)
    assert sizes and max(sizes) <= 2 * ROWS
    categorical = jax.make_jaxpr(jax.random.categorical)(keys()[0], jnp.zeros((ROWS, VOCABULARY)))
    assert max(random_sizes(categorical)) >= ROWS * VOCABULARY


# ---- the inverse distribution function ----------------------------------------------------------------------------

inverse = jax.jit(inverse_cdf)


def at(mass, uniform):
    """One mass at many uniforms."""
    uniform = np.asarray(uniform, np.float32)
    return np.asarray(inverse(jnp.broadcast_to(jnp.asarray(mass, jnp.float32), (len(uniform), len(mass))), uniform))


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 700])
def test_inverse_cdf_returns_each_entry_as_often_as_its_mass_says(size):
    """Whole-number masses, one uniform in the middle of each unit: exact."""
    mass = np.random.default_rng(size).integers(0, 4, size)
    mass[-1] += size == 1
    total = mass.sum()
    found = at(mass, (np.arange(total) + 0.5) / total)
    np.testing.assert_array_equal(found, np.repeat(np.arange(size), mass))


def test_inverse_cdf_agrees_with_numpy_on_random_masses():
    rng = np.random.default_rng(0)
    for size in (300, 513):
        mass = (rng.exponential(size=size) ** 3 * (rng.random(size) < 0.6)).astype(np.float32)
        uniform = rng.random(500).astype(np.float32)
        cumulated = np.cumsum(mass.astype(np.float64)) / mass.sum(dtype=np.float64)
        found = at(mass, uniform)
        # Up to float32 rounding at an entry's edges.
        before = np.where(found > 0, cumulated[found - 1], 0.0)
        assert (uniform > before - 1e-6).all() and (uniform < cumulated[found] + 1e-6).all()
        assert (mass[found] > 0).all()


def test_inverse_cdf_never_returns_an_entry_without_mass():
    """At the ends, at every entry's edge, and where the order of additions decides about the last bit."""
    rng = np.random.default_rng(1)
    small = np.float32(2.0**-24)
    grown = np.zeros(300)
    grown[[0, 4, 6, 290]] = 1, small, small, 1
    masses = [grown, np.eye(300)[299], np.eye(300)[0], np.eye(300)[256]]
    masses += [rng.choice([0.0, 0.0, small, 3 * small, 1.0], 300) for _ in range(40)]
    masses += [rng.random(300) * (rng.random(300) < 0.3) for _ in range(10)]
    for mass in masses:
        mass = mass.astype(np.float32)
        mass[rng.integers(300)] += 1
        edges = (np.cumsum(mass.astype(np.float64)) / mass.sum(dtype=np.float64)).astype(np.float32)
        uniform = np.concatenate([[0, LAST, 0.5], edges, np.nextafter(edges, 0), np.nextafter(edges, 1)])
        assert (mass[at(mass, np.clip(uniform, 0, LAST))] > 0).all()


def test_rounding_in_the_cumulated_sum_cannot_reach_a_block_without_mass():
    """Additions in a tree can grow (or shrink) at a block that adds nothing: aim exactly there, as far as it happens."""
    rng = np.random.default_rng(7)
    per_block = (rng.random(594) * (rng.random(594) < 0.5)).astype(np.float32)
    mass = np.zeros((594, 256), np.float32)
    mass[:, 3] = per_block
    edges = np.asarray(jnp.cumsum(per_block))
    empty = np.flatnonzero((per_block[1:] == 0) & (edges[1:] != edges[:-1]))[:8]
    centres = edges[empty] / per_block.sum()
    uniform = [centres, *(np.nextafter(centres, np.float32(side)) for side in (0, 1)), np.float32([0, 0.5, LAST])]
    found = at(mass.reshape(-1), np.concatenate(uniform))
    assert (mass.reshape(-1)[found] > 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_distribution(temperature):
    count = 20_000
    logits = np.random.default_rng(2).normal(size=VOCABULARY).astype(np.float32) * 1.5
    chance = np.exp(logits / temperature - np.log(np.exp(logits / temperature).sum()))
    uniform = jax.random.uniform(jax.random.key(0), (count,))
    wide = jnp.broadcast_to(logits, (count, VOCABULARY))
    found = np.bincount(drawn(wide, uniform, Sampling(temperature)), minlength=VOCABULARY)
    squares = ((found - count * chance) ** 2 / (count * chance)).sum()
    freedom = VOCABULARY - 1
    assert squares < freedom + 5 * np.sqrt(2 * freedom)
    # The bound can be failed: the other temperature's distribution is refused.
    other = np.exp(logits) / np.exp(logits).sum() if temperature != 1 else np.full(VOCABULARY, 1 / VOCABULARY)
    assert ((found - count * other) ** 2 / (count * other)).sum() > 2 * (freedom + 5 * np.sqrt(2 * freedom))


drawn = jax.jit(draw)


def test_temperature_0_takes_the_likeliest_whatever_the_uniform_and_the_filters():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(4, VOCABULARY)), jnp.float32)
    for uniform in (0.0, 0.5, LAST):
        found = drawn(logits, jnp.full(4, uniform), Sampling(0.0, 0.5, 3, 0.2))
        np.testing.assert_array_equal(found, logits.argmax(-1))


# ---- filters ------------------------------------------------------------------------------------------------------

kept_by = jax.jit(filtered)


def reference(logits, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    """Which entries survive, by sorting, in the order temperature, top-k, top-p, min-p."""
    mass = np.exp(logits.astype(np.float64) / temperature)
    kept = np.ones(len(mass), bool)
    if top_k:
        kept &= mass >= np.sort(mass)[-min(top_k, len(mass))]
    mass = np.where(kept, mass, 0)
    if top_p < 1:
        order = np.argsort(-mass, kind="stable")
        share = np.cumsum(mass[order]) / mass.sum()
        kept &= mass >= mass[order][np.argmax(share >= top_p)]
    mass = np.where(kept, mass, 0)
    return kept & (mass >= min_p * mass.max()) if min_p else kept


SETTINGS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.01},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7},
    {"top_p": 0.9, "min_p": 0.2},
    {"temperature": 0.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.6, "min_p": 0.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_keep_what_sorting_keeps(settings):
    logits = np.random.default_rng(4).normal(size=(6, VOCABULARY)).astype(np.float32) * 2
    mass = jnp.exp(jnp.asarray(logits) / settings.get("temperature", 1.0))
    kept = np.asarray(kept_by(mass, Sampling(**settings)))
    for row in range(6):
        wanted = reference(logits[row], **settings)
        np.testing.assert_array_equal(kept[row] > 0, wanted)
        np.testing.assert_array_equal(kept[row][wanted], np.asarray(mass)[row][wanted])


def test_the_order_of_the_filters_matters_and_is_top_k_first():
    """Of (4, 3, 2, 1)/10, top-k 2 leaves 4 and 3: then top-p 0.5 needs the first only, and of all four it needs two."""
    mass = jnp.asarray([[4.0, 3.0, 2.0, 1.0]])
    assert kept_by(mass, Sampling(top_p=0.5)).tolist() == [[4, 3, 0, 0]]
    assert kept_by(mass, Sampling(top_p=0.5, top_k=2)).tolist() == [[4, 0, 0, 0]]


def test_ties_at_a_threshold_are_all_kept():
    mass = jnp.asarray([[1.0, 2.0, 2.0, 0.5, 2.0]])
    assert kept_by(mass, Sampling(top_k=2)).tolist() == [[0, 2, 2, 0, 2]]
    assert kept_by(mass, Sampling(top_p=0.3)).tolist() == [[0, 2, 2, 0, 2]]


def test_filtered_entries_are_never_drawn():
    logits = np.random.default_rng(5).normal(size=VOCABULARY).astype(np.float32)
    wide = jnp.broadcast_to(logits, (2002, VOCABULARY))
    uniform = jnp.concatenate([jnp.asarray([0.0, LAST]), jax.random.uniform(jax.random.key(1), (2000,))])
    found = drawn(wide, uniform, Sampling(temperature=0.7, top_k=9, top_p=0.8))
    kept = reference(logits, 0.7, 0.8, 9)
    assert set(np.unique(found)) == set(np.flatnonzero(kept)) and 1 < kept.sum() < 9
