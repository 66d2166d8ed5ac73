"""How well student and teacher agree on what is likely, measured beside a method's loss: signals and terms."""

from __future__ import annotations

import jax
from jax import Array

from sdjax.collect.continuations import GAIN
from sdjax.collect.diagnostics import auroc_of_groups, entropy_gap, overlap_statistics, sequence_reward
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.reductions import token_mean
from sdjax.types import Batch, Term

ON_SHARED = ("overlap_advantage", "extreme_token_gap")
"""What is measured only where the two top-k sets have a token in common."""


def alignment_signals(student: Array, teacher: Array, token: Array, k: int) -> dict[str, Array]:
    """Log-probabilities of the token by both, the student's entropy, overlap of the top-k sets and the entropy gap."""
    frozen = jax.lax.stop_gradient(student)
    return {
        **overlap_statistics(frozen, teacher, min(k, student.shape[-1])),
        "entropy_gap": entropy_gap(frozen, teacher),
        "entropy": entropy(frozen),
        "logprobs": logprob(student, token),
        "teacher_logprobs": logprob(teacher, token),
    }


def alignment_terms(batch: Batch, sig: dict[str, Array], taught: Array, success: float = 0.5) -> dict[str, Term]:
    """Terms of coefficient 0 from `alignment_signals` `[B, T]` over the rows `taught` `[B]`; other signals are left out.

    Besides: the mean log-ratio (teacher minus student), how well its row means tell right from wrong rows of a prompt
    (a right one has a reward of at least `success`; `auroc`, over prompts with both; 1/2 without any), and the gains of `with_continuation_gains`.
    """
    over = batch.mask & (batch.valid & taught)[:, None]
    shared = over & (sig["overlap"] > 0)
    measure = lambda value, over: Term(value, over=over, reduce=token_mean, coef=0.0)
    names = ("overlap", "student_mass", "teacher_mass", "entropy_gap", *ON_SHARED)
    found = {name: measure(sig[name], shared if name in ON_SHARED else over) for name in names}
    gap = sig["teacher_logprobs"] - sig["logprobs"]
    share, mixed = auroc_of_groups(sequence_reward(gap, over), batch.reward >= success, over.any(-1), batch.group)
    found |= {"log_ratio": measure(gap, over), "auroc": measure(share, mixed)}
    depths = {name: int(name.split("/")[1]) for name in batch.extras if name.startswith(GAIN)}
    longer = lambda depth: taught & (batch.present.sum(-1) > depth)
    found |= {name: measure(batch.extras[name], longer(depth)) for name, depth in depths.items()}
    return {**found, "entropy": Term(sig["entropy"], coef=0.0)}
