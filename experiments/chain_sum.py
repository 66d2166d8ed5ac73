"""SmolLM2-135M learns one-digit sums from itself: the student reads the question, the teacher also a worked solution.

    sdjax train experiments/chain_sum.py                    self-distillation (SDPO with a forward KL)
    sdjax train experiments/chain_sum.py --method grpo      the same rollouts, rewards only

The teacher is the initial model reading four worked demonstrations and the worked solution of the problem at hand (or
another correct attempt, with `--peers`).  Problems are split by expression.  Results: experiments/README.md.
"""

from __future__ import annotations

from sdjax.cli.options import Choice
from sdjax.collect.contexts import after_demonstrations, question, with_solution
from sdjax.collect.rollouts import solved_peer
from sdjax.engine.train import Experiment
from sdjax.run.settings import Settings
from sdjax.tasks.reasoning_gym import chain_sum, worked_demonstrations

METHOD = "sdpo"
OPTIONS = {
    "sdpo": {"group_size": 4, "alpha": 0.0, "top_k": None, "ema_rate": 0.0},
    "grpo": {"group_size": 4, "normalised": False},
}
SETTINGS = Settings(
    steps=40, lr=2e-5, warmup=5, weight_decay=1e-4, completion=28, tokens_per_chunk=256, evaluation=100, save_every=20
)


def experiment(
    *,
    method: Choice,
    settings: Settings = SETTINGS,
    terms: int = 2,
    demonstrations: int = 4,
    peers: bool = False,
    train_size: int = 100,
) -> Experiment:
    """Chain sums with `terms` one-digit terms.

    Args:
      terms: numbers per problem; two make 200 distinct problems.
      demonstrations: solved problems that the teacher reads before the question.
      peers: the teacher reads another correct attempt of the group where there is one, instead of the reference.
      train_size: distinct training problems.
    """
    settings = settings.shortened()
    task = chain_sum(terms=(terms, terms), train_size=train_size, test_size=settings.evaluation, seed=settings.seed)
    shown = worked_demonstrations(task, demonstrations, seed=settings.seed)
    # The demonstrations show what to do with a solution, too: each is asked as the teacher is asked.
    told = tuple(
        turn
        for user, answer in zip(shown[::2], shown[1::2], strict=True)
        for turn in (*with_solution((user,), answer["content"]), answer)
    )

    def lesson(rollout, rollouts):
        peer = solved_peer(rollout, rollouts) if peers else None
        solution = rollout.example.solution if peer is None else peer.text
        return after_demonstrations(with_solution(question(rollout.example), solution), told)

    return settings.experiment(method=settings.method(method, lesson), task=task)
