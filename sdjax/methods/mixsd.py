"""MixSD: a model rewrites a reference, each token from itself with or without the reference in context; then SFT."""

from __future__ import annotations

from collections.abc import Callable

from sdjax.collect.contexts import question, rewrite_last
from sdjax.collect.lessons import before_writing
from sdjax.collect.remembered import Remembered
from sdjax.collect.rollouts import judge, written
from sdjax.collect.synthesis import until_accepted
from sdjax.engine.generate import Sampling, mixture
from sdjax.engine.policies import frozen
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.sft import sft
from sdjax.ranges import NonNegative, NonNegativeInt, PositiveShare, Share, check_ranges
from sdjax.types import SYNTHETIC, Card, Messages, Method, Rollout

CARD = Card(
    paper="Liu et al. 2026, MixSD: Mixed Contextual Self-Distillation for Knowledge Injection",
    arxiv="2605.16865",
    equation="-log p(y_t), y_t ~ base(.|question) with probability naive, else base(.|question, solution)",
    student="question",
    teacher="none at training; the text is the initial model's, with and without the solution in context",
    reduction="token mean",
    differences=(
        "the README discards what never passes the verifier (done here); the code writes it, marked",
        "the code retries up to 100 times, its README's command 10 (default)",
        "texts are made when a problem is first met, not before the run; memory keeps them",
        "a text that the length limit cut does not pass",
    ),
)


def with_worked_answer(rollout: Rollout, rollouts: list[Rollout]) -> Messages | None:
    """The question, a worked reference solution, and the request to try again step by step; `None` without one."""
    example, messages = rollout.example, question(rollout.example)
    if example.solution is None:
        return None
    content = (
        f"{messages[-1]['content']}\n\nHere is a reference solution with the final answer:\n\n{example.solution}\n\n"
        "Understand it, then try again yourself, step by step, and give the final answer."
    )
    return rewrite_last(messages, content, example.solution)


@check_ranges
def mixsd(
    *,
    naive: Share = 0.3,
    temperature: NonNegative = 0.0,
    top_k: NonNegativeInt = 64,
    retries: NonNegativeInt = 10,
    verified: bool = True,
    success: PositiveShare = 0.5,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Mixed contextual self-distillation (Liu et al. 2026, arXiv:2605.16865): `loss_t = -log p(y_t|question)`.  Token mean.

    The initial model is read after two contexts at once; a coin per token says which of them it is drawn from.  Texts
    that the verifier refuses are written anew with other coins, and dropped in the end.  `memory` is `{id: text}`.

    Args:
      naive: share of tokens that are drawn without the solution in context (paper: 0.3 to 0.5; 0: the informed alone).
      temperature: of both conditionals; 0 takes the likeliest token.
      top_k: entries that may be drawn; 0: all.
      retries: further attempts at a text that was refused.
      verified: refuse texts whose reward is below `success`.
      success: the least reward of a text that passes.
      lesson: `(rollout, its batch) -> what the informed side reads, or None`, asked about an empty rollout; by default
        the question and the example's solution.
      reduce: how tokens are averaged.
    """
    told, choose = lesson or with_worked_answer, mixture(1.0 - naive)
    sampling = Sampling(temperature=temperature, top_k=top_k)
    # Without a coin and without chance every attempt is the same.
    again = 0 if temperature == 0.0 and naive in (0.0, 1.0) else retries

    def collect(environment, examples, key, memory):
        new = {e.id: e for e in examples if e.id not in memory}
        informed = {id: before_writing(told)(e) for id, e in new.items()}
        some = [e for id, e in new.items() if informed[id] is not None]
        memory = memory | {**dict.fromkeys(new), **(mixed(environment, some, informed, key) if some else {})}
        rows = [
            written(e, memory[e.id], environment.live, group=group, source=SYNTHETIC)
            for group, e in enumerate(examples)
            if memory[e.id] is not None
        ]
        return [r.read_by(student=question(r.example)) for r in judge(environment, rows)], memory

    def mixed(environment, examples, informed, key):
        accept = lambda example, r: not verified or environment.verify(example, r.text).reward >= success
        contexts = [[question(e) for e in examples], [informed[e.id] for e in examples]]
        pair = (environment.policies["initial"],) * 2
        how = {"retries": again, "choose": choose, "sampling": sampling}
        texts, _ = until_accepted(pair, examples, contexts, key, accept, **how)
        return {e.id: text for e, text in zip(examples, texts, strict=True)}

    return Method(collect, sft(reduce=reduce).objectives, {"initial": frozen()}, Remembered())
