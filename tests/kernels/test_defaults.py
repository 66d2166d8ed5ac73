"""Defaults of `kernels`, written down once more: a change of one is seen here, and meant."""

from signatures import listed

DEFAULTS = {
    "advantages.group_advantage": {"normalised": True, "eps": 1e-06},  # GRPO: a mean and a deviation of the group
    "advantages.reward_after": {"discount": 1.0, "normalised": False},
    "advantages.reward_to_go": {"discount": 1.0, "normalised": False},
    "advantages.whiten": {"eps": 1e-08},
    "candidates.candidate_surrogate": {"clip": (0.2, 0.2), "dual_clip": 3.0},  # PPO's clip; Dual-clip PPO
    "candidates.candidate_weights": {"of": "student", "raw": False},
    "candidates.candidates": {"support": "student"},
    "credit.group_whiten": {"eps": 1e-08},
    "divergences.clamp_around": {"low": 0.2},
    "policy_gradient.cispo": {"clip": (0.2, 0.28)},  # DAPO's widths; TRL: (1, 4)
    "policy_gradient.clipped_surrogate": {"clip": (0.2, 0.28)},  # DAPO's clip-higher
    "policy_gradient.icepop": {"bounds": (0.5, 2.0)},  # IcePop
    "policy_gradient.overlong_penalty": {"factor": 1.0},
    "policy_gradient.sequence_clipped_surrogate": {"clip": (0.0003, 0.0004)},  # GSPO, section 5.1
    "policy_gradient.signed_surrogate": {"clip": (0.2, 0.28)},
    "weights.entropy_gate": {"strength": 0.3, "window": 0, "floor": 0.1},  # EGRSD
    "weights.entropy_router": {"fraction": 0.2, "about": "mean", "eps": 1e-06},  # DASD
    "weights.geometric_mean": {"rate": 0.5},
    "weights.likelihood_ratio": {"sign": 1.0},
    "weights.success_balance": {"power": (1.0, 1.0)},
    "weights.unit_deviation": {"eps": 1e-06},
    "weights.unit_magnitude": {"eps": 1e-06},
}
"""By module and function.  Where a paper gives a value it stands in the function's docstring."""


def test_defaults():
    assert listed("sdjax.kernels", DEFAULTS) == DEFAULTS
