"""RESD: the self-teacher reads a reflection on the failure, a growing playbook of lessons, and earlier successes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import jax

from sdjax.collect import playbook as book
from sdjax.collect.contexts import without_thinking
from sdjax.collect.remembered import Remembered
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import ema
from sdjax.kernels.distributions import entropy, logprob, top_k_with_rest
from sdjax.kernels.divergences import clamp_around, jsd
from sdjax.kernels.policy_gradient import importance_weight
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.kernels.weights import success_balance
from sdjax.ranges import NonNegative, Positive, PositiveInt, PositiveShare, Range, Share, check_ranges
from sdjax.types import Card, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Zhang et al. 2026, Learning with Rare Success but Rich Feedback via Reflection-Enhanced Self-Distillation",
    arxiv="2605.12741",
    equation="s_i w KL(p || clip(q, p low, p high)) on the student's top k and the rest, s_i balances successes",
    student="question",
    teacher="question + playbook + the attempt + feedback + reflection + a success; parameters: EMA of the student",
    reduction="token mean over rows with a lesson",
    differences=(
        "the paper averages over rows (Eq. 3), its code over tokens (default)",
        "balance is on for two of four tasks in the paper, for three in the scripts (default: on)",
        "the divergence depends on the task: KL(student||teacher) (default) or alpha=0.5",
        "four rounds of fresh rollouts per prompt are the run's business: `Experiment(rounds=4)`, --rounds 4",
        "one prompt for all tasks, its parts in the paper's order: the wording of its prompt per task was not available",
        "texts the policy wrote are cut where the context would not hold them",
    ),
)


def successes(rollouts: Sequence[Rollout], success: float) -> dict[str, str]:
    """The first success of each example, by its id, without its thinking; none that is then empty."""
    right = [(r.example.id, without_thinking(r.text)) for r in reversed(rollouts) if r.reward >= success]
    return {id: text for id, text in right if text}


@check_ranges
def resd(
    *,
    group_size: PositiveInt = 1,
    alpha: Share = 1.0,
    top_k: PositiveInt | None = 100,
    low: Share = 0.2,
    high: Annotated[float, Range(1)] | None = None,
    ema_rate: Share = 1e-4,
    is_cap: Positive | None = 2.0,
    balance: bool = True,
    balance_powers: tuple[NonNegative, NonNegative] = (1.0, 1.0),
    reflection: bool = True,
    playbook: bool = True,
    buffer: bool = True,
    cap: PositiveInt = 200,
    prune: Literal["prioritized", "staleness"] = "staleness",
    prune_every: PositiveInt = 4,
    success: PositiveShare = 0.5,
    temperature: NonNegative = 1.0,
    top_p: PositiveShare = 0.95,
    write: book.Write = book.policy_writes,
    reduce: Reducer = token_mean,
) -> Method:
    """Reflection-enhanced self-distillation (Zhang et al. 2026, arXiv:2605.12741, Eq. 3).  Token mean.

    `loss_t = s_i w_t D(student || teacher clipped around the student)`.  `memory` is `{"playbook", "solved": {id: text}}`.

    Args:
      group_size: rollouts per prompt.
      alpha: 0 KL(teacher||student), 1 KL(student||teacher), between: Jensen-Shannon.
      top_k: entries of the student's distribution that are kept, the others in one bucket; `None`: all.
      low, high: the teacher's probability is kept within these factors of the student's; 0 and `None`: no bound.
        With `low` above 1/e (0.37) the clipped divergence can be negative.
      ema_rate: the teacher's parameters follow the student's: 1 is live, and at 1e-4 they hardly leave the initial ones.
      is_cap: cap of the importance weight; `None`: no weight.
      balance: the rarer outcome gets more weight, at powers of 1 half of it all.
      balance_powers: a and b of the weights `(1 - s)^a` of successes and `s^b` of failures, s the share of successes.
      reflection, playbook, buffer: what the teacher reads beside attempt and feedback; the paper's ablations.
      cap: most entries of the playbook.
      prune: which entries go: all that do not help, or those not tagged lately.
      prune_every: updates between prunings.
      success: the least reward that counts as a success; reflections are on rewards below 1.
      temperature, top_p: of sampling.
      write: who writes reflections and lessons: `(environment, chats, key) -> texts`.
      reduce: how tokens are averaged.
    """
    reader = "live" if ema_rate == 1.0 else "teacher"
    rules = book.Rules(reflection, playbook, cap, prune, prune_every)

    def collect(environment, examples, key, memory):
        own, told = jax.random.split(key)
        sampling = Sampling(temperature=temperature, top_p=top_p)
        rollouts = attempts(environment, examples, own, n=group_size, sampling=sampling)
        reflections, lessons = book.updated(environment, rollouts, told, memory["playbook"], rules, write)
        solved = successes(rollouts, success)
        known = memory["solved"] | solved if buffer else solved
        shown = book.render_text(lessons) if playbook else ""
        read = [(r, reflections.get(i), known.get(r.example.id)) for i, r in enumerate(rollouts)]
        rows = [r.read_by(teacher=book.teacher_context(environment, r, shown, *rest)) for r, *rest in read]
        return rows, {"playbook": lessons, "solved": known if buffer else memory["solved"]}

    def signals(dist, token):
        student, teacher = dist["student"], dist["teacher"]
        found = {"logprobs": logprob(student, token), "entropy": entropy(student)}
        if top_k is not None:
            student, teacher = top_k_with_rest(student, teacher, by=student, k=top_k)
        return {**found, "divergence": jsd(student, clamp_around(student, teacher, low, high), alpha)}

    def terms(batch, sig, step):
        importance = 1.0 if is_cap is None else importance_weight(sig["logprobs"], batch.behavior_logprobs, cap=is_cap)
        weight = success_balance(batch.reward >= success, batch.valid, power=balance_powers) if balance else 1.0
        return {
            "divergence": Term(
                sig["divergence"], weight, batch.contexts["teacher"].valid, reduce, importance=importance
            ),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    views = {"student": View(trainable=True), "teacher": View(reader, per_rollout=True, told=True)}
    memory = {"playbook": book.empty(), "solved": Remembered()}
    snapshots = {} if reader == "live" else {"teacher": ema(ema_rate)}
    return Method(collect, (Objective(views, signals, terms),), snapshots, memory)
