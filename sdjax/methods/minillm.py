"""MiniLLM: sequence-level reverse KL by policy gradient, its first step exact, on texts that the teacher helps to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated

import jax.numpy as jnp

from sdjax.collect.contexts import question
from sdjax.collect.lessons import before_writing
from sdjax.collect.rollouts import judge, written
from sdjax.collect.synthesis import together
from sdjax.engine.generate import mixture
from sdjax.engine.policies import Environment, frozen, score, teacher_name
from sdjax.kernels.advantages import reward_after, reward_to_go
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.divergences import reverse_kl
from sdjax.kernels.policy_gradient import clipped_surrogate, importance_weight
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.ranges import NonNegative, PositiveInt, Range, Share, check_ranges
from sdjax.tasks.data.problems import problems
from sdjax.types import REFERENCE, Card, Example, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Gu et al. 2024, MiniLLM: Knowledge Distillation of Large Language Models",
    arxiv="2306.08543",
    equation="w KL(p||q) + max(-w R, -clip(w) R) - lm_coef log p(d); R = mean of later log q/p, w = p/(mix q + (1-mix) p)",
    student="question",
    teacher="question; an external policy, or the initial one with a lesson",
    reduction="token mean",
    differences=(
        "TRL samples from the student alone and counts the present token twice: mix=0, discount=0, count_present=True",
        "TRL leaves the advantage live and weighs later tokens once more by their position; neither is done here",
        "the loss on pre-training text d needs a file (corpus=...; rows of a chat and a text); TRL has none",
    ),
    status="reconstruction",
)


def read_beside(environment: Environment, documents: Sequence[Example], start: int, first: int, count: int):
    """`count` texts of a corpus from number `start` on, round and round, as rows of groups from `first` on.

    No teacher speaks about them.
    """
    some = [documents[(start + i) % len(documents)] for i in range(count)]
    texts = [(e, e.solution or e.main_answer) for e in some]
    rows = [written(e, t, environment.live, group=first + i, source=REFERENCE) for i, (e, t) in enumerate(texts)]
    return [r.read_by(student=question(r.example), teacher=None) for r in rows]


@check_ranges
def minillm(
    *,
    teacher: str | None = None,
    mix: Annotated[float, Range(0, 1, below=True)] = 0.2,
    single_step: bool = True,
    discount: Share = 1.0,
    length_normalised: bool = True,
    count_present: bool = False,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2),
    corpus: str | None = None,
    lm_coef: NonNegative = 1.0,
    group_size: PositiveInt = 4,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """MiniLLM (Gu et al. 2024, arXiv:2306.08543): `KL(p||q)` of whole sequences.  Token mean.

    `loss_t = w_t KL(p_t||q_t) + max(-w_t R_t, -clip(w_t) R_t)`: the exact single step and the return of later tokens,
    a constant.  `w = p / b` with `b` what the tokens were drawn from; the first of them is a constant, the second live.
    With a `corpus`, `- lm_coef * log p` of one of its texts per prompt, in turn; `memory` is how many were read.

    Args:
      teacher: an external policy's name; "live"; or "initial", the default when there is a lesson (else "teacher").
      mix: share of the teacher in what tokens are drawn from, below 1; the weights are then at most `1 / (1 - mix)`.
      single_step: the immediate part as the full reverse KL; without, it is the present token's log-ratio.
      discount: of later log-ratios (1: the sequence's KL; 0: none).
      length_normalised: the return is a mean instead of a sum.
      count_present: the return includes the present token although `single_step` has counted it (TRL).
      clip: widths of the ratio's clip below and above 1, in the return's part.
      corpus: a file, folder or hub data set as `sdjax.tasks.data` reads it, against forgetting: its solutions (else answers) are learnt.
      lm_coef: weight of the corpus's part.
      group_size: rollouts per prompt.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`, asked before anything is written, about an
        empty rollout; by default the question.
      reduce: how tokens are averaged.
    """
    name = teacher_name(teacher, lesson)
    writers = {"student": View(), "teacher": View(name)}
    coin, documents = mixture(mix), problems(corpus).examples if corpus else ()

    def collect(environment, examples, key, memory):
        told = list(map(before_writing(lesson), examples))
        # Without a lesson there is nothing to mix with: the teacher reads the question, and the row is not trained.
        contexts = [[question(e) for e in examples], [t or question(e) for t, e in zip(told, examples, strict=True)]]
        policies = (environment.live, environment.policies[name])
        rollouts = judge(environment, together(policies, examples, contexts, key, n=group_size, choose=coin))
        rollouts = [r.read_by(student=question(r.example), teacher=told[r.group]) for r in rollouts]
        rollouts = [mixed(r) for r in score(environment, rollouts, writers, drawn_from)] if mix else rollouts
        if not documents:
            return rollouts, memory
        rows = read_beside(environment, documents, memory, len(examples), len(examples))
        return [*rollouts, *rows], memory + len(rows)

    def drawn_from(dist, token):
        student, teacher = logprob(dist["student"], token), logprob(dist["teacher"], token)
        return {"drawn": jnp.logaddexp(jnp.log1p(-mix) + student, jnp.log(mix) + teacher)}

    def mixed(rollout):
        extras = {name: value for name, value in rollout.extras.items() if name != "drawn"}
        return dataclasses.replace(rollout, logprobs=tuple(map(float, rollout.extras["drawn"])), extras=extras)

    def signals(dist, token):
        student, teacher = dist["student"], dist["teacher"]
        found = {"logprobs": logprob(student, token), "teacher_logprobs": logprob(teacher, token)}
        return {**found, "reverse_kl": reverse_kl(student, teacher), "entropy": entropy(student)}

    def returns(gap, over):
        if single_step and not count_present:
            return reward_after(gap, over, discount, normalised=length_normalised)
        return reward_to_go(gap, over, discount, normalised=length_normalised)

    def terms(batch, sig, step):
        taught, behavior = batch.contexts["teacher"].valid, batch.behavior_logprobs
        gap = sig["teacher_logprobs"] - sig["logprobs"]
        advantage = returns(gap, batch.mask & taught[:, None])
        importance, read = importance_weight(sig["logprobs"], behavior), batch.source == REFERENCE
        surrogate = clipped_surrogate(sig["logprobs"], behavior, advantage, clip)
        corpus_loss = {"corpus": Term(-sig["logprobs"], 1.0, read, reduce, lm_coef)} if documents else {}
        return {
            "reverse_kl": Term(
                sig["reverse_kl"], 1.0, taught, reduce, 1.0 if single_step else 0.0, importance=importance
            ),
            "returns": Term(surrogate, 1.0, taught, reduce),
            "entropy": Term(sig["entropy"], over=~read, coef=0.0),
            **corpus_loss,
        }

    views = {"student": View(trainable=True), "teacher": View(name, told=lesson is not None)}
    snapshots = {"initial": frozen()} if name == "initial" else {}
    groups = lambda prompts: (2 if documents else 1) * prompts
    memory = 0 if documents else None
    return Method(collect, (Objective(views, signals, terms),), snapshots, memory, (name,), groups)
