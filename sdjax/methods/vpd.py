"""VPD: SDPO whose teacher learns to use feedback: every few batches it is trained to tell right attempts from wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from sdjax.collect.contexts import question, rewrite_last, with_feedback
from sdjax.collect.rollouts import solved_peer
from sdjax.collect.synthesis import ask
from sdjax.engine.policies import frozen
from sdjax.kernels.distributions import logprob
from sdjax.kernels.preference import sequence_log_ratio, unpaired
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.sdpo import peer_or_feedback, sdpo
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Li et al. 2026, Learning from Language Feedback via Variational Policy Distillation",
    arxiv="2605.15113",
    equation="M: JSD_alpha(p||q); E: -log sigmoid(+-(beta log q(y)/p_old(y) - midpoint)), mean per class",
    student="question",
    teacher="question + a peer's success or feedback; the live parameters, trained in the E-step",
    reduction="E: mean per class of rows; M: token mean over rows with a lesson",
    differences=(
        "no official code; the divergence depends on the task: JSD on the top 100 (default), alpha=1 on the top 20, or 0",
        "a live M-step teacher as in Algorithm 1 (default); the tables list SDPO's EMA rate (0.01, 0.05)",
        "a batch with one class has no E-step, and rows without a lesson are in neither step: both ours",
        "Proposition 1 (the objective never falls) does not hold as stated; nothing here depends on it",
    ),
)


def critique_request(rollout: Rollout) -> Messages:
    """A failed attempt and the correct answer, and the request for two or three sentences about the mistake."""
    example = rollout.example
    content = (
        f"{question(example)[-1]['content']}\n\nA wrong attempt:\n{rollout.text}\n\nThe correct answer is "
        f"{example.answer}. In two or three sentences, say what the mistake and the misconception behind it are, "
        "specifically and so that it can be acted upon, without merely stating the answer."
    )
    return rewrite_last(question(example), content, rollout.text)


def vpd(
    *,
    group_size: int = 8,
    every: int = 5,
    beta: float = 0.1,
    prior: Literal["current", "initial"] = "current",
    feedback: Literal["sibling", "environment", "critique"] = "sibling",
    success: float = 0.5,
    alpha: float = 0.5,
    top_k: int | None = 100,
    ema_rate: float = 1.0,
    is_cap: float | None = None,
    temperature: float = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Variational policy distillation (Li et al. 2026, arXiv:2605.15113, Algorithm 1): two objectives on one batch.

    E, every few batches: BCO on `beta * (log q(y|x, lesson) - log p_old(y|x))`, sums over tokens; the student that wrote
    the attempt is the constant reference.  M, on every batch: SDPO.  Weights are shared, so E moves the student too.
    The paper's one-phase hybrids with GRPO: `sdpo(rl_weight=...)` (joint), `antisd(beta=1, coef=-w, warmup=0, low=0)`
    (advantage reshaping) and `rlrt(toward=True, rows="all")` (reweighting).

    Args:
      group_size: rollouts per prompt.
      every: batches per E-step; 0: none, which is SDPO.
      beta: scale of the implicit reward; 0 makes E a constant.
      prior: E's reference: the student that wrote the attempt, or the initial model (the paper's ablation, which loses).
      feedback: what the lesson is made of: a peer's success alone; a peer's success, else the verifier's feedback; or a
        critique by the policy, which is told the answer.
      success: the least reward of a success.
      alpha: M's divergence: 0 KL(teacher||student), 1 KL(student||teacher), between: Jensen-Shannon.
      top_k: entries of the student's distribution that are kept, the others in one bucket; `None`: all.
      ema_rate: of the M-step's teacher; 1 is live.
      is_cap: cap of M's importance weight; `None`: no weight.
      temperature: of sampling.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; instead of `feedback`.
      reduce: how M's tokens are averaged.
    """
    told = lesson or peer_or_feedback(success=success, use_feedback=feedback == "environment")
    how = {"group_size": group_size, "alpha": alpha, "top_k": top_k, "ema_rate": ema_rate, "is_cap": is_cap}
    distil = sdpo(**how, temperature=temperature, lesson=told, reduce=reduce)

    def collect(environment, examples, key, memory):
        rollouts, memory = distil.collect(environment, examples, key, memory)
        rollouts = [r.read_by(prior=question(r.example)) for r in rollouts]
        return (criticised(environment, rollouts, key) if feedback == "critique" and not lesson else rollouts), memory

    def criticised(environment, rollouts, key):
        """Failures read a critique; successes, and groups without one, what they read anyway."""
        wrong = [r for r in rollouts if r.reward < success and solved_peer(r, rollouts, success)]
        said = ask(environment.live, [critique_request(r) for r in wrong], key, slots=len(rollouts))
        chats = {id(r): with_feedback(question(r.example), feedback=s.text) for r, s in zip(wrong, said, strict=True)}
        return [r.read_by(teacher=chats.get(id(r), r.contexts["teacher"])) for r in rollouts]

    def signals(dist, token):
        return {f"{name}_logprobs": logprob(dist[name], token) for name in readers}

    def terms(batch, sig, step):
        kept, positive = batch.valid & batch.contexts["teacher"].valid, batch.reward >= success
        # The sampler's log-probabilities are the student's as it was when it wrote the attempt.
        reference = batch.behavior_logprobs if prior == "current" else sig["prior_logprobs"]
        ratio = sequence_log_ratio(sig["teacher_logprobs"], reference, batch.mask & kept[:, None])
        value = unpaired(beta * ratio, positive, kept)
        return {
            "right": Term(value, over=kept & positive, reduce=token_mean),
            "wrong": Term(value, over=kept & ~positive, reduce=token_mean),
        }

    readers = {"teacher": View("live", trainable=True, per_rollout=True)}
    snapshots = dict(distil.snapshots)
    if prior == "initial":
        readers, snapshots = {**readers, "prior": View("initial")}, {**snapshots, "initial": frozen()}
    refine = Objective(readers, signals, terms, every)
    objectives = (*((refine,) if every else ()), *distil.objectives)
    return distil._replace(collect=collect, objectives=objectives, snapshots=snapshots)
