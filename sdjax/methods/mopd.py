"""MOPD (peers): SDPO whose teacher reads two successes and a failure of the same group."""

from __future__ import annotations

from sdjax.collect.annotators import step_numbers
from sdjax.collect.context_signals import with_signals
from sdjax.collect.peers import Failures, Shown, Summarised, peers
from sdjax.kernels.credit import step_mean
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.sdpo import sdpo
from sdjax.ranges import NonNegative, NonNegativeInt, Positive, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import Card, Method, Term

CARD = Card(
    paper="Yu et al. 2026, Multi-Rollout On-Policy Distillation via Peer Successes and Failures",
    arxiv="2605.12652",
    equation="w * JSD_alpha(student || teacher), alpha 0: KL(teacher||student), 1: KL(student||teacher)",
    student="question",
    teacher="question + two peers' successes + a peer's failure; parameters: EMA of the student",
    reduction="token mean over rows with a lesson",
    differences=(
        "the paper's and the README's context is 2 successes and 1 failure always (default)",
        "the code's default condition shows a failure only without a success (failure='without_success')",
        "reverse KL (alpha=1) for mathematics, Jensen-Shannon (default) for all else",
        "success is 0.5 in the configuration (default) and 1.0 in the README",
        "the random failure is drawn from a seed made of the attempt, so that replays agree",
        "the code's diagnostic per context counts prompts of one outcome as 0; here they are left out",
        "how the code extracts summaries is not known: the last paragraph; controls match the number of attempts",
        "alpha near 0 or 1 shrinks the loss to nothing (0.999: under 0.001 of the KL); only 0 and 1 are the two KLs",
    ),
)


@check_ranges
def mopd(
    *,
    group_size: PositiveInt = 8,
    another: bool = True,
    failure: Failures = "always",
    shown: Shown = "peers",
    summaries: NonNegativeInt = 0,
    summarised: Summarised = "all",
    step_level: bool = False,
    use_feedback: bool = True,
    thinking: bool = False,
    success: PositiveShare = 0.5,
    alpha: Share = 0.5,
    top_k: PositiveInt | None = 100,
    rest: bool = True,
    ema_rate: Share = 0.05,
    is_cap: Positive | None = 2.0,
    diagnose_contexts: bool = False,
    temperature: NonNegative = 1.0,
    reduce: Reducer = token_mean,
) -> Method:
    """Multi-rollout on-policy distillation (Yu et al. 2026, arXiv:2605.12652, Eq. 5-7): `sdpo` with `peers` as lesson.

    Not multi-teacher OPD, which goes by the same letters.  Token mean over rows with a lesson.

    Args:
      group_size: rollouts per prompt.
      another: show a second success.
      failure: when a failure is shown; "never" is the paper's positive variant.
      shown: peers by outcome, or a control with as many attempts: random ones of the group, another prompt's, successes.
      summaries: show at most so many peers' last paragraphs instead of whole solutions; 0: solutions.
      summarised: whose summaries.
      step_level: a token's divergence is the mean of its step's, steps being separated by blank lines.  It changes
        anything only where the tokens of a step have different weights: after the first update on a batch.
      use_feedback: show feedback on the attempt where there is no success to show.
      thinking: show peers with their thinking.
      success: the least reward of a success.
      alpha: 0 KL(teacher||student), 1 KL(student||teacher), between: Jensen-Shannon.
      top_k: entries of the student's distribution that are kept; `None`: all.
      rest: the others in one bucket; without, they are dropped and the kept ones renormalised.
      ema_rate: the teacher's parameters follow the student's: 0 is frozen, 1 is live.
      is_cap: cap of the importance weight; `None`: no weight.
      diagnose_contexts: log how well the live model ranks the attempts at a prompt, by Spearman's correlation, pairs and
        AUC, when it reads nothing, a failure, successes, or both: `signal/2S+1F/auc`, and `signal/prompts`, those with
        both outcomes and every context (without any: 0, 1/2, 1/2).  Costs six forward passes.
      temperature: of sampling.
      reduce: how tokens are averaged.
    """
    told = {"success": success, "another": another, "failure": failure, "use_feedback": use_feedback}
    lesson = peers(**told, thinking=thinking, shown=shown, summaries=summaries, summarised=summarised)
    how = {"group_size": group_size, "alpha": alpha, "top_k": top_k, "rest": rest, "ema_rate": ema_rate}
    base = sdpo(**how, is_cap=is_cap, temperature=temperature, lesson=lesson, reduce=reduce)
    (plain,) = base.objectives

    def collect(environment, examples, key, memory):
        rollouts, memory = base.collect(environment, examples, key, memory)
        if step_level:
            rollouts = [r.with_extras(step=step_numbers(r.tokens, environment.live.tokenizer)) for r in rollouts]
        return (with_signals(environment, rollouts, success) if diagnose_contexts else rollouts), memory

    def terms(batch, sig, step):
        if step_level:
            over = batch.mask & batch.valid[:, None]
            sig = {**sig, "divergence": step_mean(sig["divergence"], batch.extras["step"], over)}
        measured = {name: Term(value, coef=0.0) for name, value in batch.extras.items() if name.startswith("signal/")}
        return {**plain.terms(batch, sig, step), **measured}

    if not step_level and not diagnose_contexts:
        return base
    return base._replace(collect=collect, objectives=(plain._replace(terms=terms),))
