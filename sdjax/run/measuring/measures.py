"""What judged answers come to: avg@n, maj@k and pass@k with intervals over problems, by length cap, hedging and length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sdjax.collect.contexts import question
from sdjax.collect.diagnostics import epistemic_count
from sdjax.collect.rollouts import sample, verdicts
from sdjax.engine.policies import Policy
from sdjax.engine.protocol import Protocol
from sdjax.engine.tokens import decode_text, encode_context, thinking_opened
from sdjax.run.measuring.answering import Answer, by_problem
from sdjax.run.measuring.estimates import Estimate, clustered, majority_at, mean, paired, pass_at
from sdjax.run.measuring.evaluate import Accuracy
from sdjax.tasks import maths
from sdjax.tasks.answers import votes as voting
from sdjax.tasks.judging import Case
from sdjax.types import Example, Rollout, Verdict

Answers = Sequence[Sequence[Answer]]
"""By problem, equally many to each."""


class Measures(NamedTuple):
    """Numbers of one model on some problems; `shares` is the share of right answers to each problem."""

    problems: int
    samples: int
    average: Estimate
    passed: dict[int, Estimate]
    majority: dict[int, Estimate]
    caps: dict[int, Estimate]
    length: Estimate
    hedges: Estimate
    cut_off: Estimate
    shares: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """The measures under the names that papers use."""
        number = lambda e: {"value": e.value, "low": finite(e.low), "high": finite(e.high)}
        named = {f"avg@{self.samples}": number(self.average)}
        named |= {f"pass@{k}": number(e) for k, e in self.passed.items()}
        named |= {f"maj@{k}": number(e) for k, e in self.majority.items()}
        named |= {f"avg@{self.samples} within {cap} tokens": number(e) for cap, e in self.caps.items()}
        named |= {"tokens": number(self.length), "hedges": number(self.hedges), "cut off": number(self.cut_off)}
        return {"problems": self.problems, "samples": self.samples, "measures": named, "shares": list(self.shares)}


def sampled_accuracy(
    policy: Policy,
    examples: Sequence[Example],
    verify: Callable[[Example, str], Verdict],
    protocol: Protocol,
    *,
    votes: bool = False,
) -> tuple[Accuracy, dict[str, float]]:
    """`avg@n` of several samples of each example as an accuracy, and for a run's log pass@k and, with `votes`, maj@k.

    Every call draws from the same keys: two evaluations of a run differ by what it has learnt.
    """
    key = jax.random.key(protocol.seed)
    rollouts = sample(policy, examples, key, n=protocol.samples, sampling=protocol.sampling())
    answers = by_problem(rollouts, verdicts(verify, rollouts), protocol.samples)
    found = measures(examples, answers, same=maths.equal if votes else None)
    right = tuple(answer.right() for own in answers for answer in own)
    more = {f"pass@{k}": e.value for k, e in found.passed.items()}
    more |= {f"maj@{k}": e.value for k, e in found.majority.items()}
    return Accuracy(*found.average, len(examples), tuple(rollouts), right), more


def finite(value: float) -> float | None:
    """A number as JSON has it."""
    return value if np.isfinite(value) else None


def measures(
    examples: Sequence[Example],
    answers: Answers,
    *,
    caps: dict[int, Answers] | None = None,
    same: Callable[[str, str], bool] | None = None,
) -> Measures:
    """The measures of judged answers; `caps` are as `capped` makes them.

    With `same`, which says whether two answers are, majorities are counted.
    """
    count, samples = len(examples), len(answers[0])
    right = [[answer.right() for answer in own] for own in answers]
    ks = sorted({k for k in (2**i for i in range(samples.bit_length())) if k <= samples} | {samples})
    share = lambda values, k=1: clustered(values, count * samples / k)
    passed = {k: share([pass_at(sum(own), samples, k) for own in right], k) for k in ks[1:]}
    majority = {}
    if same is not None and samples > 1:
        said = [
            voting.votes(e, [voting.given(Case(e, a.text, a.finished)) for a in own], same)
            for e, own in zip(examples, answers, strict=True)
        ]
        of = lambda k: [majority_at(own, good, k) for own, good in zip(said, right, strict=True)]
        majority = {k: share(of(k), k) for k in ks[1:] if k > 2}
    shares = [float(np.mean(own)) for own in right]
    averages = lambda number: [float(np.mean([number(answer) for answer in own])) for own in answers]
    return Measures(
        count,
        samples,
        share(shares),
        passed,
        majority,
        {cap: share([float(np.mean([a.right() for a in own])) for own in some]) for cap, some in (caps or {}).items()},
        mean(averages(lambda a: len(a.tokens))),
        mean(averages(lambda a: epistemic_count(a.text))),
        share(averages(lambda a: not a.finished)),
        tuple(shares),
    )


def capped(
    policy: Policy,
    examples: Sequence[Example],
    answers: Answers,
    verify: Callable[[Example, str], Verdict],
    cap: int,
) -> Answers:
    """The answers as they would have been judged had they been cut off after `cap` tokens.

    An answer that ends before is the same; of a longer one the first tokens are judged again, as one that was cut off.
    """
    longer = [(i, j) for i, own in enumerate(answers) for j, a in enumerate(own) if len(a.tokens) > cap]
    openings: dict[int, str] = {}
    for i in {i for i, _ in longer}:
        ids = encode_context(policy.tokenizer, question(examples[i]), policy.shapes, policy.template)
        openings[i] = thinking_opened(policy.tokenizer, ids)
    texts = {(i, j): decode_text(policy.tokenizer, answers[i][j].tokens[:cap], openings[i]) for i, j in longer}
    rollouts = [Rollout(examples[i], (), (), text, i, finished=False) for (i, _), text in texts.items()]
    found = [list(own) for own in answers]
    for (i, j), verdict in zip(texts, verdicts(verify, rollouts), strict=True):
        tokens = answers[i][j].tokens[:cap]
        found[i][j] = Answer(texts[i, j], tokens, False, float(verdict.reward))
    return found


def difference(one: Measures, other: Measures) -> Estimate:
    """The paired difference of the share of right answers, over the same problems."""
    return paired(one.shares, other.shares, min(one.samples, other.samples))


def lines(found: Measures) -> list[tuple[str, str]]:
    """The measures for people: name, and value with interval."""
    plain = lambda e: f"{e.value:.1f}" + (f" [{e.low:.1f}, {e.high:.1f}]" if np.isfinite(e.low) else "")
    first = "accuracy" if found.samples == 1 else f"avg@{found.samples}"
    rows = [(first, found.average.percent())]
    rows += [(f"maj@{k}", e.percent()) for k, e in found.majority.items()]
    rows += [(f"pass@{k}", e.percent()) for k, e in found.passed.items()]
    rows += [(f"{first} within {cap} tokens", e.percent()) for cap, e in found.caps.items()]
    rows += [("cut off", found.cut_off.percent()), ("tokens of an answer", plain(found.length))]
    return [*rows, ("hedges of an answer", plain(found.hedges))]
