"""TESSY: teacher and student write a text in turns, the teacher what matters and the student how it is said; then SFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from sdjax.collect.contexts import question
from sdjax.collect.lessons import before_writing
from sdjax.collect.remembered import Remembered
from sdjax.collect.rollouts import judge, sample, written
from sdjax.collect.synthesis import Boundary, Writer, weave
from sdjax.collect.taggers import Swap, Word, annotated_by, boundary, connectives, fit_tagger, snippets
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import Environment, frozen, teacher_name
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.sft import sft
from sdjax.ranges import NonNegative, NonNegativeInt, PositiveInt, PositiveShare, check_ranges
from sdjax.types import SYNTHETIC, Card, Messages, Method, Rollout

CARD = Card(
    paper="Huang et al. 2026, How to Fine-Tune a Reasoning Model? A Teacher-Student Cooperation Framework",
    arxiv="2604.14164",
    equation="-log p(y_t), y_t ~ teacher on capability tokens, initial student on style tokens and the answer",
    student="question",
    teacher="question while writing; an external policy of any vocabulary, or the initial one with a lesson",
    reduction="token mean",
    differences=(
        "chunks are 20 tokens in the paper (default), 10 and 5 in the code",
        "the code never cuts after a turn's first token (skip_first=True): texts then depend on the chunk size",
        "a word that a cut would split is completed, as in the code; the paper drops it (word='drop')",
        "a cut that stands after white space stays there; the code gives the first word after it to the wrong author",
        "the other goes on at any trigger, as in the code; in the paper only if something was cut off (swap='cut')",
        "loops are looked for after every turn, in the code after every hundredth; symbols alone are none",
        "taggers are two blocks of each policy trained on its first texts, marked by a rule or by the teacher",
        "taggers keep the epoch of best held-out accuracy, which is not logged: a resumed run may train none",
        "the paper's taggers are Qwen3-0.6B on 100,000 snippets, the code's default 10,000",
    ),
)


def fitted(
    environment: Environment, teacher: str, marks: Mapping[str, Any], known: dict, rules: Mapping[str, Any]
) -> dict[str, Boundary]:
    """Both authors' boundaries, each by a tagger trained on its marked snippets, or already `known` from them.

    A tagger begins with its author's parameters, a live teacher's with the initial ones: so it is the same whenever it is
    trained, in a resumed run as well.
    """
    bodies = {"student": "initial", "teacher": "initial" if teacher == "live" else teacher}
    names = {author: (author, json.dumps(marks[author])) for author in bodies}
    for author, body in bodies.items():
        if names[author] not in known:
            listed = dict(marks[author])
            tagger = fit_tagger(environment.policies[body], list(listed), listed.get)
            # The student's turn ends before capability (0), the teacher's before style (1).
            known[names[author]] = boundary(tagger, int(author == "teacher"), **rules)
    return {author: known[name] for author, name in names.items()}


@check_ranges
def tessy(
    *,
    teacher: str | None = None,
    chunk: PositiveInt = 20,
    end: str = "</think>",
    annotator: Literal["rule", "teacher"] = "rule",
    tagger_rollouts: PositiveInt = 8,
    tagger_snippets: PositiveInt = 256,
    skip_first: bool = False,
    swap: Swap = "trigger",
    word: Word = "complete",
    temperature: NonNegative = 0.7,
    top_p: PositiveShare = 0.8,
    top_k: NonNegativeInt = 20,
    tries: PositiveInt = 5,
    taggers: Callable | None = None,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Student-consistent data (Huang et al. 2026, arXiv:2604.14164, Algorithm 1): `loss_t = -log p(y_t)`.  Token mean.

    The initial student begins; trained taggers say when the other goes on; the student answers alone.  Hand-over is by
    text.  No verifier.  `memory` is `{"texts": {id: text}, "snippets": ...}`; taggers are trained again from the snippets.

    Args:
      teacher: an external policy's name; "live"; or "initial", the default when there is a lesson (else "teacher").
      chunk: most tokens of a turn.
      end: what closes the thinking, and without which a text fails; "": no thinking, the student's stop token ends it.
      annotator: who marks style phrases for the taggers: a list of connectives, or the teacher.
      tagger_rollouts: texts per prompt of the first batch and model that taggers learn from.
      tagger_snippets: windows of 60 words of them.
      skip_first: the code's rule: a turn's first token never ends it.
      swap: who writes next after a turn at whose very end the other's token would come: the other, or ("cut") the same.
      word: what becomes of a word that a cut splits.
      temperature, top_p, top_k: of sampling, both models.
      tries: at a text that is too long or repeats itself.
      taggers: instead, `(environment) -> {"student": Boundary, "teacher": Boundary}`.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`, asked about an empty rollout; by default the
        question.
      reduce: how tokens are averaged.
    """
    name = teacher_name(teacher, lesson)
    sampling, trained = Sampling(temperature, top_p, top_k), {}
    rules = {"skip_first": skip_first, "swap": swap, "word": word}
    told = before_writing(lesson)
    authors = {"student": ("initial", question), "teacher": (name, told)}

    def collect(environment, examples, key, memory):
        able = [e for e in examples if told(e) is not None]
        marking, weaving = jax.random.split(key)
        if not memory["snippets"] and able and taggers is None:
            memory = {**memory, "snippets": memory["snippets"] | marked(environment, able, marking)}
        new = [e for e in able if e.id not in memory["texts"]]
        texts = memory["texts"] | (woven(environment, new, weaving, memory["snippets"]) if new else {})
        kept = [(group, e, texts.get(e.id)) for group, e in enumerate(examples)]
        how = {"policy": environment.live, "source": SYNTHETIC}
        rows = judge(environment, [written(e, text, group=group, **how) for group, e, text in kept if text])
        return [r.read_by(student=question(r.example)) for r in rows], {**memory, "texts": texts}

    def phrases(environment, some, key):
        """The style phrases of each snippet."""
        by_model = annotator == "teacher" and some
        return annotated_by(environment.policies[name], some, key) if by_model else list(map(connectives, some))

    def marked(environment, examples, key):
        """Snippets of both authors' own texts with their style phrases."""
        found = {}
        for own, (author, (policy, context)) in zip(jax.random.split(key), authors.items(), strict=True):
            writing, listing = jax.random.split(own)
            how = {"n": tagger_rollouts, "sampling": sampling, "context": context}
            texts = [r.text for r in sample(environment.policies[policy], examples, writing, **how)]
            some = snippets(texts, tagger_snippets, seed=0)
            found[author] = list(map(list, zip(some, phrases(environment, some, listing), strict=True)))
        return found

    def woven(environment, examples, key, marks):
        cuts = taggers(environment) if taggers else fitted(environment, name, marks, trained, rules)
        writer = lambda author, policy, context: Writer(
            environment.policies[policy], [context(e) for e in examples], cuts[author], chunk
        )
        writers = {author: writer(author, *who) for author, who in authors.items()}
        traces = weave(writers, key, end=end, sampling=sampling, tries=tries)
        return {e.id: None if t is None else t.text for e, t in zip(examples, traces, strict=True)}

    memory = {"texts": Remembered(), "snippets": Remembered()}
    return Method(collect, sft(reduce=reduce).objectives, {"initial": frozen()}, memory, writers=(name,))
