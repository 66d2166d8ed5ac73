"""Synthesised data: MixSD's two contexts, TESSY's two authors with trained taggers, and the files they end in."""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spies
import tiny
from method_checks import close, expected_gradient, restored
from networks import unoptimised

from sdjax.collect import synthesis, taggers
from sdjax.collect.contexts import question
from sdjax.collect.remembered import Remembered
from sdjax.collect.rollouts import RolloutError
from sdjax.collect.synthesis import (
    Trace,
    Writer,
    ask,
    continued,
    repetitive,
    to_dataset,
    together,
    until_accepted,
    weave,
)
from sdjax.engine import policies
from sdjax.engine.generate import GREEDY, Sampling, draw, mixture
from sdjax.engine.policies import Policy, Sample
from sdjax.engine.tokens import Shapes
from sdjax.kernels.distributions import entropy, normalise
from sdjax.methods import tessy as tessy_module
from sdjax.methods.mixsd import mixsd, with_worked_answer
from sdjax.methods.sft import sft
from sdjax.methods.tessy import tessy
from sdjax.models.transformer import Transformer, initialise
from sdjax.tasks.answers.marks import last_boxed
from sdjax.tasks.data.problems import problems
from sdjax.types import SYNTHETIC, Rollout, Verdict

SHAPES = Shapes(context=128, completion=8, rows=8, tokens_per_chunk=None)
EXAMPLES = tiny.TASK.train[:4]
NAIVE, EXPERT = tiny.log(0.7, 0.2, 0.1), tiny.log(0.1, 0.1, 0.8)


quick_compiles = pytest.fixture(scope="module", autouse=True)(unoptimised)


def environment(method, **how):
    return tiny.environment(method, shapes=SHAPES, **how)


# ---- MixSD: its note, section 6 ---------------------------------------------------------------------------------------


def informed(example):
    return with_worked_answer(Rollout(example, (), (), "", 0), [])


CONTEXTS = ([question(e) for e in EXAMPLES], [informed(e) for e in EXAMPLES])


@functools.cache
def greedy(naive):
    pair = (tiny.policy(shapes=SHAPES),) * 2
    rows = together(pair, EXAMPLES, CONTEXTS, jax.random.key(0), choose=mixture(1.0 - naive), sampling=GREEDY)
    return [r.tokens for r in rows]


def alone(contexts):
    return [s.tokens for s in ask(tiny.policy(shapes=SHAPES), contexts, jax.random.key(0), slots=4, sampling=GREEDY)]


def test_mixsd_limits():
    assert greedy(1.0) == alone(CONTEXTS[0])
    assert greedy(0.0) == alone(CONTEXTS[1])
    assert greedy(0.0) != greedy(1.0)


def test_mixsd_tokens_are_one_side_s_choice():
    """Replay: every token is the likeliest after the stored prefix of at least one of the contexts."""
    rows, sides = greedy(0.5), set()
    policy = tiny.policy(shapes=SHAPES)
    for place in range(4):
        before = [tiny.tokenizer().decode(tokens[:place]) for tokens in rows]
        keys = [jax.random.key(0)] * len(EXAMPLES)
        how = {"length": 1, "slots": 4, "sampling": GREEDY}
        said = [continued(policy, contexts, before, keys, **how) for contexts in CONTEXTS]
        for i, tokens in enumerate(rows):
            options = [tiny.tokenizer().encode(new[i][0], add_special_tokens=False) for new in said]
            assert [tokens[place]] in options
            sides.add(tuple(option == [tokens[place]] for option in options))
    assert {(True, False), (False, True)} & sides


def test_mixsd_replays_from_its_key():
    """Every token is the likeliest after the stored prefix of the very context that its recorded coin chose."""
    policy, rows, naive = tiny.policy(shapes=SHAPES), greedy(0.5), 0.5
    row_keys = policies.row_keys(jax.random.key(0), jnp.arange(len(rows)), 1)
    both = set()
    for place in range(3):
        coins = [jax.random.uniform(jax.random.fold_in(jax.random.fold_in(k, place), 1)) for k in row_keys]
        informed_side = [bool(coin < 1.0 - naive) for coin in coins]
        chats = [CONTEXTS[side][i] for i, side in enumerate(informed_side)]
        before = [tiny.tokenizer().decode(tokens[:place]) for tokens in rows]
        keys = [jax.random.key(9)] * len(rows)
        said = continued(policy, chats, before, keys, length=1, slots=4, sampling=GREEDY)
        for tokens, (new, _) in zip(rows, said, strict=True):
            assert tiny.tokenizer().encode(new, add_special_tokens=False) == [tokens[place]]
        both |= set(informed_side)
    assert both == {True, False}


@pytest.mark.parametrize(("naive", "law"), [(0.3, (0.28, 0.13, 0.59)), (0.5, (0.40, 0.15, 0.45))])
def test_mixsd_mixture_law(naive, law):
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.stack([jnp.broadcast_to(x, (count, 3)) for x in (NAIVE, EXPERT)])
    chosen = mixture(1.0 - naive)(logits, keys)
    tokens = draw(chosen, jax.vmap(jax.random.uniform)(keys), Sampling())
    counts = np.bincount(tokens, minlength=3)
    expected = count * np.asarray(law)
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, 0.1 %
    coins = np.asarray((chosen == logits[0]).all(-1))
    assert abs(coins.mean() - naive) < 3 * np.sqrt(naive * (1 - naive) / count)


def test_mixsd_target_likelihood_is_linear():
    informative = -jnp.exp(EXPERT) @ NAIVE
    found = [naive * entropy(NAIVE) + (1 - naive) * informative for naive in (0.0, 0.3, 0.5, 1.0)]
    close(found, (2.038679, 1.667621, 1.420249, 0.801819))
    for naive, nll in zip((0.0, 0.3, 0.5, 1.0), found, strict=True):
        mixed = naive * jnp.exp(NAIVE) + (1 - naive) * jnp.exp(EXPERT)
        close(-mixed @ NAIVE, nll)


def test_mixsd_first_gradient():
    # The student is the base model: its own samples teach it nothing on average, its likeliest token does.
    close(expected_gradient(sft(), NAIVE, NAIVE), 0.0, atol=1e-7)
    of_token = lambda token: tiny.logit_gradient(lambda dist: -dist[token], NAIVE)
    assert np.abs(of_token(0)).max() > 0.1
    mixed = 0.3 * np.exp(NAIVE) + 0.7 * np.exp(EXPERT)
    mean = lambda weights: sum(w * of_token(t) for t, w in enumerate(np.asarray(weights)))
    close(mean(mixed), 0.7 * mean(np.exp(EXPERT)))


@pytest.mark.parametrize(
    ("naive", "decisive", "passed", "failed"), [(0.5, 1, 0.5, 4.9e-4), (0.5, 3, 0.125, 0.230), (0.7, 3, 0.027, 0.740)]
)
def test_mixsd_rejection(monkeypatch, naive, decisive, passed, failed):
    """An item passes when the informed side wrote each of its decisive tokens: hard items are dropped."""
    count, rng = 2000, np.random.default_rng(0)
    share = []

    def coins(pair, examples, contexts, key, **how):
        right = (rng.random((len(examples), decisive)) >= naive).all(-1)
        share.append(right.mean())
        return [
            Rollout(e, (1,), (0.0,), "right" if ok else "wrong", i)
            for i, (e, ok) in enumerate(zip(examples, right, strict=True))
        ]

    monkeypatch.setattr(synthesis, "together", coins)
    examples = [EXAMPLES[0]] * count
    how = {"retries": 10, "choose": None, "sampling": None}
    accept = lambda example, r: r.text == "right"
    texts, attempts = until_accepted((), examples, ([None] * count,) * 2, jax.random.key(0), accept, **how)
    assert attempts <= 11
    assert abs(share[0] - passed) < 0.03
    assert abs(texts.count(None) / count - failed) < 0.03


def test_mixsd_does_not_retry_without_chance():
    asked = []
    verify = lambda example, text: asked.append(text) or Verdict(0.0)
    for options, attempts in (({"naive": 0.0}, 1), ({"naive": 1.0}, 1), ({"naive": 0.5, "temperature": 1.0}, 3)):
        calls = []
        method = mixsd(retries=2, **options)
        env = environment(method, verify=verify)
        original = synthesis.together
        count = lambda *args, _call=original, _calls=calls, **how: _calls.append(1) or _call(*args, **how)
        synthesis.together = count
        try:
            rows, memory = method.collect(env, EXAMPLES[:2], jax.random.key(0), method.memory)
        finally:
            synthesis.together = original
        assert len(calls) == attempts
        assert rows == [] and memory == dict.fromkeys(e.id for e in EXAMPLES[:2])
        # What failed is not tried again.
        asked.clear()
        assert method.collect(env, EXAMPLES[:2], jax.random.key(1), memory)[0] == [] and not asked


@functools.cache
def mixed():
    method = mixsd(temperature=1.0, naive=0.5, retries=20, success=1.0)  # a reward of as much passes
    env = environment(method)
    rows, memory = method.collect(env, EXAMPLES, jax.random.key(0), method.memory)
    return method, env, tuple(rows), memory


def test_mixsd_keeps_what_passes():
    method, env, rows, memory = mixed()
    assert rows and all(r.reward == 1.0 and r.finished and r.source == SYNTHETIC for r in rows)
    assert {r.example.id: r.text for r in rows} == {id: text for id, text in memory.items() if text is not None}
    end = tiny.tokenizer().eos_token_id
    for r in rows:
        assert r.tokens == (*tiny.tokenizer().encode(r.text, add_special_tokens=False), end)
        assert r.contexts == {"student": r.example.prompt}
    # Texts are made once; with a file between the steps, too.
    again, same = method.collect(env, EXAMPLES, jax.random.key(9), restored(memory))
    assert same == memory and tuple(again) == rows
    bare = [dataclasses.replace(EXAMPLES[0], solution=None, id="bare")]
    assert method.collect(env, bare, jax.random.key(0), {}) == ([], {"bare": None})


def test_mixsd_training_does_not_see_the_solution():
    method, _, rows, _ = mixed()
    other = [dataclasses.replace(r, example=dataclasses.replace(r.example, solution="something else")) for r in rows]
    one, two = tiny.collected(method, rows), tiny.collected(method, other)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert method.objectives[0].views.keys() == {"student"}


def test_extraction():
    assert last_boxed(r"\boxed{1} then \boxed{a{b}c}") == "a{b}c"
    assert last_boxed(r"\boxed{1 and no end") is None


# ---- files ------------------------------------------------------------------------------------------------------------


def test_synthetic_data_ends_in_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    method, env, rows, memory = mixed()
    again = method._replace(memory=memory)
    assert to_dataset(path, again, env, EXAMPLES, jax.random.key(0), size=2) == len(rows)
    found, bad = problems(path, duplicates=True)[:2]
    assert not bad and [e.solution for e in found] == [r.text for r in rows]
    assert [e.prompt for e in found] == [r.example.prompt for r in rows]
    trained, _ = sft().collect(env, found, jax.random.key(0), None)
    assert [r.tokens for r in trained] == [r.tokens for r in rows]


# ---- TESSY: two authors, scripted ---------------------------------------------------------------------------------------

END = "</think>"


def script(author, text):
    """The next word of an author after a text: who wrote it and where it stands; thinking ends after twelve words."""
    words = text.split()
    if END in words:
        return None if "answer" in words else "answer"
    return END if len(words) == 12 else f"{author}{len(words)}"


def scripted(policy, chats, texts, keys, *, length, slots, sampling):
    found = []
    for text in texts:
        new, ended = " " if text.endswith(END) else "", False
        for _ in range(length):
            word = script(policy, text + new)
            if word is None:
                ended = True
                break
            new += f"{word} "
        found.append((new, ended))
    return found


class Named(str):
    """A policy that is only a name."""

    shapes = SHAPES

    class tokenizer:
        encode = staticmethod(lambda text, add_special_tokens=False: [0])


def oracle(other, *, skip_first=False):
    """A causal tagger: words at places 0, 1, 5, 6, 10 and 11 are style (1)."""

    def find(texts, chunks):
        cuts = []
        for text, new in zip(texts, chunks, strict=True):
            start, words = len(text.split()), new.split()
            labels = [int(((start + i + 1) % 5 < 2) == (other == 1)) for i in range(len(words))]
            count, over = taggers.kept(labels, skip_first=skip_first)
            cuts.append((len("".join(f"{w} " for w in words[:count])), over))
        return cuts

    return find


def never(texts, chunks):
    return [(len(new), False) for new in chunks]


def at_once(texts, chunks):
    return [(len(new.split(" ")[0]) + 1 if new else 0, True) for new in chunks]


def scripts(monkeypatch, student, teacher, chunk=5, names=("s", "t")):
    monkeypatch.setattr(synthesis, "continued", scripted)
    chats = [question(e) for e in EXAMPLES[:2]]
    writers = {
        "student": Writer(Named(names[0]), chats, student, chunk),
        "teacher": Writer(Named(names[1]), chats, teacher, chunk),
    }
    return weave(writers, jax.random.key(0), sampling=GREEDY)[0]


def test_tessy_extremes(monkeypatch):
    thinking = lambda names: " ".join([*(f"{a}{i}" for i, a in enumerate(names)), END])
    trace = scripts(monkeypatch, never, never)
    assert trace.text.split() == f"{thinking('s' * 12)} answer".split()
    trace = scripts(monkeypatch, at_once, never)
    assert trace.text.split() == f"{thinking('s' + 't' * 11)} answer".split()
    trace = scripts(monkeypatch, at_once, at_once)
    assert trace.text.split() == f"{thinking('st' * 6)} answer".split()
    for student, teacher in ((never, never), (at_once, oracle(1)), (oracle(0), oracle(1))):
        same = scripts(monkeypatch, student, teacher, names=("s", "s"))
        assert same.text.split() == f"{thinking('s' * 12)} answer".split()


def test_tessy_chunks(monkeypatch):
    """With a cut wherever the type changes, the size of chunks does not matter; the code's rule makes it matter."""
    texts = {k: scripts(monkeypatch, oracle(0), oracle(1), chunk=k).text for k in (1, 2, 3, 5, 20)}
    assert len(set(texts.values())) == 1
    authors = [w[0] for w in texts[5].split()[:12]]
    assert authors == ["s" if place % 5 < 2 else "t" for place in range(12)]
    skipping = {
        k: scripts(monkeypatch, oracle(0, skip_first=True), oracle(1, skip_first=True), chunk=k).text for k in (1, 5)
    }
    assert len(set(skipping.values())) == 2


def test_tessy_traces_are_their_spans(monkeypatch):
    trace = scripts(monkeypatch, oracle(0), oracle(1))
    assert "".join(text for _, text in trace.spans) + trace.answer == trace.text
    assert {author for author, _ in trace.spans} == {"student", "teacher"}
    assert trace.text.count(END) == 1 and trace.text.index(END) + len(END) == len(trace.text) - len(trace.answer)
    assert trace.answer.strip() == "answer"
    shares = [sum(len(text) for a, text in trace.spans if a == author) for author in ("student", "teacher")]
    assert sum(shares) + len(trace.answer) == len(trace.text)


def test_tessy_cuts():
    assert taggers.kept([0, 0, 1, 0, 0]) == (3, True)
    assert taggers.kept([0] * 5) == (5, False)
    assert taggers.kept([0, 0, 0, 0, 1]) == (5, True)
    assert taggers.kept([1, 0, 0, 0, 0], skip_first=True) == (5, False)
    assert taggers.kept([1, 0, 0, 0, 0]) == (1, True)  # a turn always writes something
    assert taggers.kept([]) == (0, False)


def test_repetition():
    assert repetitive("so it is " * 8) and not repetitive("so it is " * 7)
    assert not repetitive(" ".join(map(str, range(200)))) and not repetitive("")
    assert not repetitive("so it is " * 8 + "x " * 2 + " ".join(map(str, range(400))))
    # In a row, at most 50 words long, with something that is said: an enumeration is no loop.
    assert not repetitive(" ".join(f"Step {i}: multiply both sides by 3." for i in range(1, 9)))
    assert not repetitive(" ".join(f"f({i}) = {i}^2, so f({i}) is a square;" for i in range(1, 9)))
    assert not repetitive("so it is well " + "so it is fine " * 7) and repetitive(
        "so it is well " + "so it is fine " * 8
    )
    assert not repetitive("| - + " * 30) and repetitive("| a + " * 8)
    assert repetitive("the " * 24) and not repetitive("the " * 23) and not repetitive("a b " * 11)
    words = lambda count: " ".join(chr(97 + i % 26) + chr(97 + i // 26) for i in range(count)) + " "
    assert repetitive(words(50) * 8, tail=2000) and not repetitive(words(51) * 8, tail=2000)


@pytest.mark.parametrize(
    ("text", "place", "complete", "drop"),
    [
        ("a word here", 4, 6, 2),  # inside a word
        ("a word here", 6, 6, 6),  # behind it
        (".\n\nWait, maybe", 3, 3, 3),  # after white space: what follows is the other's
        ("so maybe", 8, 8, 3),  # at the end: it may go on
        ("maybe I", 3, 5, 5),  # the only word
        ("so ", 3, 3, 3),
    ],
)
def test_tessy_splits_no_word(text, place, complete, drop):
    assert taggers.between_words(text, place, "complete") == complete
    assert taggers.between_words(text, place, "drop") == drop


def stopping(script):
    """`continued` by a script: what each author writes whenever it is asked, and whether it then stops."""

    def said(policy, chats, texts, keys, *, length, slots, sampling):
        return [script[str(policy)].pop(0) for _ in texts]

    return said


def test_tessy_stop_tokens_do_not_end_the_thinking(monkeypatch):
    """With an end tag the text goes on and fails where nothing comes; without, the student alone may end it."""
    chats = [question(EXAMPLES[0])]
    writer = lambda name, cut: Writer(Named(name), chats, cut, 5)
    writers = {"student": writer("s", at_once), "teacher": writer("t", never)}

    def woven(end, **script):
        monkeypatch.setattr(synthesis, "continued", stopping({name: [*said] for name, said in script.items()}))
        return weave(writers, jax.random.key(0), end=end, sampling=GREEDY, tries=1)[0]

    start, stopped, nothing = ("Okay, ", False), ("the answer is 4 ", True), ("", True)
    assert woven(END, s=[start], t=[stopped, nothing]) is None
    trace = woven(END, s=[start, ("4", True)], t=[stopped, (f"so {END} rest", False)])
    assert trace.text == f"Okay, the answer is 4 so {END}4" and trace.answer == "4"
    # A stop token that is cut off with what stands before it has not been written.
    monkeypatch.setitem(writers, "teacher", writer("t", at_once))
    trace = woven(END, s=[start, (f"{END} ", False), ("4", True)], t=[stopped])
    assert trace.spans == (("student", "Okay, "), ("teacher", "the "), ("student", END)) and trace.answer == "4"
    monkeypatch.setitem(writers, "teacher", writer("t", never))
    trace = woven("", s=[start, ("done", True)], t=[stopped])
    assert trace.spans == (("student", "Okay, "), ("teacher", "the answer is 4 "), ("student", "done"))
    assert woven("", s=[start, nothing], t=[stopped]).text == "Okay, the answer is 4 "
    assert woven("", s=[("", False)], t=[]) is None


def test_style_and_capability_in_likelihood():
    """Texts in turns are likelier under the student than the teacher's own, by exact enumeration of all of them.

    Three words, style, capability, style; every word's distribution depends on the words before it.
    """
    keys = jax.random.split(jax.random.key(1), 3)
    student, capable, dialect = ([normalise(2.0 * jax.random.normal(k, (3**t, 3))) for t in range(3)] for k in keys)

    def likelihood(authors):
        """Mean `-log student(text)` of texts whose word `t` is drawn from `authors[t]`."""
        chance, nll = jnp.ones(1), 0.0
        for t, author in enumerate(authors):
            own = chance[:, None] * jnp.exp(author[t])
            nll, chance = nll - jnp.sum(own * student[t]), own.reshape(-1)
        return float(nll)

    ours, theirs = likelihood((student, capable, student)), likelihood((dialect, capable, dialect))
    assert ours < theirs
    # A style word of the student's costs its entropy, one of the teacher's the cross-entropy, which is never less.
    near_first = [-jnp.sum(jnp.exp(d[0]) * student[0]) for d in (student, dialect)]
    close(near_first[0], entropy(student[0])[0])
    assert near_first[0] < near_first[1]
    assert likelihood((student,) * 3) < ours


# ---- TESSY: taggers ---------------------------------------------------------------------------------------------------

COLOURS = ("red", "green", "blue", "black", "white", "pink", "gold", "grey")


def test_labels():
    text = "so key 1 then red"
    spans = taggers.located(text, ["so", "then"])
    assert spans == [(0, 2), (9, 13)]
    ids, offsets = taggers.encode(tiny.tokenizer(), text)
    types = taggers.token_types(offsets, spans)
    assert types == [1, 0, 0, 1, 0] and len(ids) == 5
    assert taggers.next_types(types) == [0, 0, 1, 0, taggers.IGNORE] and taggers.next_types([]) == []
    assert taggers.token_types([(0, 6)], [(3, 8)]) == [1]  # a token that contains a span's beginning
    assert taggers.located(text, ["then", "so"]) is None and taggers.located(text, ["missing"]) is None


def test_annotators(monkeypatch):
    text = "Okay, so the answer is 4. Wait, let me check: therefore 5."
    found = taggers.connectives(text)
    assert found == ["Okay", "so", "the answer is", "Wait", "let me check", "therefore"]
    assert taggers.located(text, found) is not None
    replies = iter(['Sure: ["so", "wait"]', "nothing", "[1, 2]", '["x"'])
    reply = lambda policy, chats, key, slots: [Sample((), (), next(replies), True) for _ in chats]
    monkeypatch.setattr(taggers, "ask", reply)
    assert taggers.annotated_by(None, ["a"] * 4, None) == [["so", "wait"], None, None, None]


def test_snippets():
    texts = [" ".join(map(str, range(100))), "one two", "", "single"]
    found = taggers.snippets(texts, 50, seed=0)
    assert found == taggers.snippets(texts, 50, seed=0)
    assert all(text in texts[0] or text == "one two" for text in found)
    assert max(len(text.split()) for text in found) == 60 and len(set(found)) == len(found)
    assert taggers.snippets([], 5, seed=0) == []


def sentences(count, seed):
    rng = random.Random(seed)
    say = lambda: f"{rng.choice(('ask', 'tell', 'find'))} key {rng.randrange(8)} {rng.choice(COLOURS)}"
    return [" ".join(say() for _ in range(rng.randrange(2, 5))) for _ in range(count)]


@functools.cache
def colour_tagger():
    """Colours are style: they follow digits."""
    phrases = lambda text: [w for w in text.split() if w in COLOURS]
    return taggers.fit_tagger(tiny.policy(shapes=SHAPES), sentences(192, 0), phrases, epochs=8, lr=3e-3)


def test_a_tagger_learns():
    tagger = colour_tagger()
    assert tagger.accuracy > 0.95
    untrained = taggers.initial_tagger(tiny.policy(shapes=SHAPES), 2, 0)
    body = jax.tree.map(lambda a, b: bool((a != b).any()), tagger.params["trained"], untrained.params["trained"])
    assert all(jax.tree.leaves(body))
    np.testing.assert_array_equal(tagger.params["fixed"]["embed"], tiny.pretrained().params["embed"])
    right, total = {"new": 0, "trained": 0}, 0
    for text in sentences(20, 1):
        ids, offsets = taggers.encode(tagger.tokenizer, text)
        spans = taggers.located(text, [w for w in text.split() if w in COLOURS])
        labels = taggers.next_types(taggers.token_types(offsets, spans))
        tokens, mask, _ = taggers.padded([(ids, [])], 16)
        for name, one in (("new", untrained), ("trained", tagger)):
            said = np.asarray(taggers._predicted(one.model, one.params, tokens, mask))[0, : len(ids)]
            right[name] += int((said == labels)[:-1].sum())
        total += len(ids) - 1
    assert right["trained"] / total > 0.95 > right["new"] / total


def test_a_tagger_is_measured_on_snippets_that_it_does_not_learn_from(monkeypatch):
    """Of two snippets one is held out; it starts with a small head."""
    learnt, step = [], taggers._step

    def watched(model, optimizer, trained, state, fixed, tokens, mask, labels):
        learnt.extend({tuple(row[own].tolist()) for row, own in zip(tokens, mask, strict=True)})
        return step(model, optimizer, trained, state, fixed, tokens, mask, labels)

    monkeypatch.setattr(taggers, "_step", watched)
    policy, texts = tiny.policy(shapes=SHAPES), ["ask key 1 red", "tell key 2 blue"]
    phrases = lambda text: [w for w in text.split() if w in COLOURS]
    taggers.fit_tagger(policy, texts, phrases, layers=1, epochs=2, batch=2)
    coded = [tuple(tiny.tokenizer().encode(text, add_special_tokens=False)) for text in texts]
    assert len(learnt) == 2 and len({*learnt}) == 1 and learnt[0] in coded
    head = np.asarray(taggers.initial_tagger(policy, 1, 0).params["trained"]["head"])
    assert head.shape == (32, 2) and 0.01 < head.std() < 0.03


def test_a_tagger_s_boundary():
    before = taggers.boundary(colour_tagger(), 1)
    texts, chunks = ["ask key", "tell", "ask key 1", ""], [" 1 red ask key", " key", " red tell key 2 blue", ""]
    assert before(texts, chunks) == [(2, True), (4, False), (len(" red tell key 2"), True), (0, False)]
    after = taggers.boundary(colour_tagger(), 0)
    assert after(["ask key 1"], [" red ask key"]) == [(4, True)]
    skipping = taggers.boundary(colour_tagger(), 1, skip_first=True)
    assert skipping(["ask key"], [" 1 red ask key 2"]) == [(len(" 1 red ask key 2"), True)]
    # The chunk's last token announces a colour: the other goes on, or the same if nothing is cut off for it.
    last = (["ask key", "ask key"], [" 1", " 1 red"])
    assert before(*last) == [(2, True), (2, True)]
    assert taggers.boundary(colour_tagger(), 1, swap="cut")(*last) == [(2, False), (2, True)]
    assert taggers.boundary(colour_tagger(), 1, word="drop")(*last) == [(1, True), (2, True)]


def test_a_tagger_outlives_the_parameters_it_came_from():
    """Snapshots are donated after every batch: what a step keeps of them must be its own."""
    params = jax.tree.map(jnp.array, tiny.pretrained().params)
    phrases = lambda text: [w for w in text.split() if w in COLOURS]
    tagger = taggers.fit_tagger(tiny.policy(params, SHAPES), sentences(40, 2), phrases, epochs=1)
    jax.tree.map(lambda x: x.delete(), params)
    assert len(taggers.boundary(tagger, 1)(["ask key"], [" 1 red"])) == 1


def test_nothing_to_learn_from_is_said():
    with pytest.raises(RolloutError, match="no snippet is left"):
        taggers.fit_tagger(tiny.policy(), ["ask key"], lambda text: ["missing"])
    with pytest.raises(RolloutError, match="no snippet is left"):
        taggers.fit_tagger(tiny.policy(), [], lambda text: [])


# ---- TESSY: real models -----------------------------------------------------------------------------------------------


@functools.cache
def foreigner():
    """A teacher of another vocabulary: the same words, and one more, by other numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(tiny.tokenizer().get_vocab(), reverse=True)
    words = [*words, "stranger"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tiny.TEMPLATE, **special)
    model = Transformer(dataclasses.replace(tiny.config(), vocab_size=len(words)))
    return Policy(model, jax.jit(initialise, static_argnums=0)(model, jax.random.key(7)), tokenizer, SHAPES)


def real_writers(count=2, chunk=3):
    chats = [question(e) for e in EXAMPLES[:count]]
    word = lambda texts, chunks: [
        (len(new), bool(i % 2) or len(text) > 3) for i, (text, new) in enumerate(zip(texts, chunks, strict=True))
    ]
    return {
        "student": Writer(tiny.policy(shapes=SHAPES), chats, word, chunk),
        "teacher": Writer(foreigner(), chats, word, chunk),
    }


def test_tessy_provenance():
    """Every span is what its author writes after the text before it."""
    writers, key, sampling = real_writers(), jax.random.key(3), Sampling()
    traces = weave(writers, key, end="", sampling=sampling, tries=12)
    assert traces == weave(writers, key, end="", sampling=sampling, tries=12)
    replayed, authors = 0, set()
    for i, trace in enumerate(traces):
        if trace is None:
            continue
        for attempt in range(12):
            own = jax.random.fold_in(jax.random.fold_in(key, i), attempt)
            text, same = "", True
            for turn, (author, span) in enumerate(trace.spans):
                writer = writers[author]
                how = {"length": writer.chunk, "slots": 2, "sampling": sampling}
                ((new, _),) = continued(
                    writer.policy, [writer.chats[i]], [text], [jax.random.fold_in(own, turn)], **how
                )
                same, text = same and new == span, text + span
                authors.add(author)
            if same:
                replayed += 1
                break
        else:
            raise AssertionError(trace)
    assert replayed and "student" in authors


def test_a_text_that_does_not_survive_is_dropped():
    policy = tiny.policy(shapes=SHAPES)
    how = {"length": 2, "slots": 1, "sampling": GREEDY}
    ((new, _),) = continued(policy, [question(EXAMPLES[0])], ["unheard words"], [jax.random.key(0)], **how)
    assert new is None  # <unk> is not decoded to what it was


@pytest.mark.parametrize("annotator", ["rule", "teacher"])
def test_tessy_with_trained_taggers(monkeypatch, annotator):
    monkeypatch.setattr(tessy_module, "connectives", lambda text: [w for w in text.split() if w in COLOURS])
    monkeypatch.setattr(
        tessy_module, "annotated_by", lambda policy, some, key: [[w for w in t.split() if w in COLOURS] for t in some]
    )
    method = tessy(
        end="", chunk=3, annotator=annotator, tagger_rollouts=8, temperature=1.0, top_p=1.0, top_k=0, tries=12
    )
    env = environment(method)
    env = env._replace(policies={**env.policies, "teacher": foreigner()})
    rows, memory = method.collect(env, EXAMPLES, jax.random.key(0), method.memory)
    assert rows and all(r.source == SYNTHETIC and r.contexts == {"student": r.example.prompt} for r in rows)
    assert {author: len(marks) > 4 for author, marks in memory["snippets"].items()} == {
        "student": True,
        "teacher": True,
    }
    for r in rows:
        assert memory["texts"][r.example.id] == r.text and len(r.tokens) <= SHAPES.completion
    # Nothing of who wrote what reaches training: the same texts from a file are the same batch.
    plain, _ = sft(texts=lambda e: memory["texts"].get(e.id) or None).collect(env, EXAMPLES, jax.random.key(0), None)
    as_synthetic = [dataclasses.replace(r, source=SYNTHETIC) for r in plain]
    jax.tree.map(np.testing.assert_array_equal, tiny.collected(method, rows), tiny.collected(method, as_synthetic))
    assert all(not r.extras for r in rows)
    # The second time everything is known; a new process trains the same taggers from the memory.
    memory = restored(memory)
    again, same = method.collect(env, EXAMPLES, jax.random.key(5), memory)
    assert same == memory and [r.tokens for r in again] == [r.tokens for r in rows]
    fresh = tessy(
        end="", chunk=3, annotator=annotator, tagger_rollouts=8, temperature=1.0, top_p=1.0, top_k=0, tries=12
    )
    known = {**memory, "texts": Remembered()}
    assert fresh.collect(env, EXAMPLES, jax.random.key(0), known)[1]["texts"] == memory["texts"]


@pytest.mark.parametrize("teacher", ["live", "initial", "teacher"])
def test_tessy_taggers_do_not_depend_on_when_they_are_trained(teacher, monkeypatch):
    """A live teacher's tagger begins with the initial parameters: a resumed run, whose live ones moved, has the same."""
    fit, found = tessy_module.fit_tagger, []
    monkeypatch.setattr(
        tessy_module,
        "fit_tagger",
        lambda policy, *rest: found.append((policy, fit(policy, *rest, epochs=1))) or found[-1][1],
    )
    marks = {
        author: [[t, [w for w in t.split() if w in COLOURS]] for t in sentences(8, i)] for i, author in enumerate("st")
    }
    marks = {"student": marks["s"], "teacher": marks["t"]}
    seeds = {"live": 2, "initial": 3, "teacher": 4}
    for live in (2, 5):
        own = {n: tiny.policy(tiny.pretrained(s).params, SHAPES) for n, s in {**seeds, "live": live}.items()}
        tessy_module.fitted(tiny.environment()._replace(policies=own), teacher, marks, {}, {})
        bodies = [own["initial"], own["initial" if teacher == "live" else teacher]]
        assert [policy for policy, _ in found[-2:]] == bodies
    for one, other in zip(found[:2], found[2:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one[1].params, other[1].params)


def test_tessy_draws_every_key_once(monkeypatch):
    """Texts of both authors and the lists of their phrases come from keys of their own."""
    method = tessy(annotator="teacher", tagger_rollouts=4, temperature=1.0, top_p=1.0, top_k=0)
    env = spies.distinct(method, shapes=SHAPES)
    sampled, _ = spies.watch(monkeypatch, env)
    with pytest.raises(RolloutError, match="no snippet is left"):  # what a random model lists is no JSON
        method.collect(env, EXAMPLES, jax.random.key(0), method.memory)
    assert [s.who for s in sampled] == ["initial", "teacher", "teacher", "teacher"]
    assert len({s.key for s in sampled}) == 4 and [s.n for s in sampled] == [4, 1, 4, 1]


def test_tessy_trace_text():
    assert Trace((("student", "so "), ("teacher", "4")), " done").text == "so 4 done"


# ---- how many chats go in one call ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chats, slots, rows", [(0, 2, None), (1, 2, 2), (2, 2, 2), (3, 2, 4), (5, 2, 8), (8, 8, 8), (8, 2, 8), (20, 2, 24)]
)
def test_chats_are_padded_to_few_sizes(chats, slots, rows):
    """To the slots, twice, four times as many, and from eight rows on to a multiple; the padding is not given back."""
    seen = []

    def writer(policy, encoded, key, *, n, sampling, limit):
        seen.append((len(encoded), n, limit))
        return [[Sample((i,), (0.0,), "", True)] for i in range(len(encoded))]

    policy = dataclasses.replace(tiny.policy(), writer=writer)
    asked = [question(tiny.TASK.train[i % 7]) for i in range(chats)]
    found = synthesis.ask(policy, asked, jax.random.key(0), slots=slots, limit=5)
    assert [s.tokens for s in found] == [(i,) for i in range(chats)]
    assert seen == ([(rows, 1, 5)] if chats else [])
