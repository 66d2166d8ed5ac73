"""SFT: imitation of given texts, token by token."""

from __future__ import annotations

from collections.abc import Callable

from sdjax.collect.rollouts import references
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.ranges import check_ranges
from sdjax.types import Card, Example, Method, Objective, Term, View

CARD = Card(
    paper="Supervised fine-tuning: maximum likelihood of given texts",
    arxiv="",
    equation="-log p(y_t), y given",
    student="question",
    teacher="none; the texts are the examples' solutions",
    reduction="token mean",
    status="baseline",
)


@check_ranges
def sft(*, texts: Callable[[Example], str | None] | None = None, reduce: Reducer = token_mean) -> Method:
    """Supervised fine-tuning: `loss_t = -log p(y_t)` on texts that the student did not write.  Token mean.

    Args:
      texts: `example -> text, or None` to leave it out; by default the example's solution.
      reduce: how tokens are averaged.
    """

    def collect(environment, examples, key, memory):
        return references(environment, examples, texts), memory

    def signals(dist, token):
        return {"logprobs": logprob(dist["student"], token), "entropy": entropy(dist["student"])}

    def terms(batch, sig, step):
        return {"nll": Term(-sig["logprobs"], reduce=reduce), "entropy": Term(sig["entropy"], coef=0.0)}

    return Method(collect, (Objective({"student": View(trainable=True)}, signals, terms),))
