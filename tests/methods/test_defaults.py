"""Published values that are defaults here, each with where it is published.

A tuple of lines per method: `(options, source)`.  "ours" marks values that no source gives, so that changing one is seen
and meant; what a method does not list (its lesson, how tokens are averaged by a paper's code) is in its card.
"""

import inspect

import pytest

from sdjax.cli import options
from sdjax.collect.playbook import policy_writes
from sdjax.kernels import reductions
from sdjax.kernels.weights import entropy_gate
from sdjax.methods import opd as opd_module
from sdjax.methods.opsd import V1, opsd_v1
from sdjax.methods.rlrt import rlrt

TOKENS, ROWS = reductions.token_mean, reductions.sequence_mean
OPSD_V3 = {"temperature": 1.1, "top_p": 0.95, "top_k": 20, "ema_rate": 0.0, "group_size": 1}
SDPO_TABLE = {"group_size": 8, "alpha": 0.5, "top_k": 100, "rest": True, "ema_rate": 0.05, "is_cap": 2.0}

DEFAULTS = {
    "antisd": [
        ({"group_size": 8, "coef": 0.5, "warmup": 5, "low": 0.93, "clip": (0.2, 0.2), "temperature": 1.0}, "Table 5"),
        ({"beta": 0.5, "reduce": TOKENS}, "Eq. for phi, Jensen-Shannon at one half; verl's token mean"),
    ],
    "atmanrl": [
        ({"group_size": 8, "steps": 200, "clip": (0.2, 0.2), "delimiter": "####"}, "paper, hyperparameters"),
        ({"coef": 1.0, "temperature": 1.0}, "ours"),
        ({"mask_loss": "nll", "target": "own", "inner": "adamw", "combine": "add", "ratio": "token"}, "paper; its printed ratio is the row's"),
    ],
    "brts": [
        ({"top_k": 16, "coef": 10.0, "candidates": 2}, "paper: K 16, lambda 10, N 2"),
        ({"teacher_temperature": 0.7, "teacher_top_p": 0.95, "temperature": 1.0, "reduce": TOKENS}, "paper, sampling"),
        ({"align": "position", "retry": True, "fallback": "most_similar"}, "code; tiers: paper"),
    ],
    "cipo": [
        ({"group_size": 8, "clip": (0.2, 0.2), "kl_coef": 1e-4, "temperature": 1.0}, "independent reproduction"),
        ({"coef": 1.0, "risk": 1.0, "share": (0.3, 0.2, 0.8), "target": 0.8, "gains": (0.8, 0.3, 0.05)}, "the same"),
        ({"medium": (0.375, 0.75)}, "the same: 3/8 to 6/8"),
        ({"replay": 1.0, "compare": "problem", "normalised": True}, "ours: see the card"),
    ],
    "cispo": [
        ({"group_size": 16, "clip": (1.0, 4.0)}, "TRL's ScaleRL recipe: epsilon_high 5, an absolute cap"),
        ({"compared": "group", "normalised": True}, "TRL's default; ScaleRL: the batch's deviation"),
    ],
    "dapo": [
        ({"group_size": 16, "clip": (0.2, 0.28), "rounds": 10}, "arXiv:2503.14476 and verl"),
        ({"overlong": 4096 / 20480, "overlong_factor": 1.0}, "the buffer of 4096 of 20480 tokens"),
    ],
    "dasd": [
        ({"repelled": 0.2}, "the note: rho 0.20"),
        ({"beta": 0.1, "group_size": 8, "clip": (0.2, 0.2)}, "ours"),
        ({"about": "mean", "unit": "magnitude", "ema_rate": 1.0}, "ours: one transcription"),
    ],
    "dash": [
        ({"kappa": 5.0, "horizon": 1.0}, "a survey's line: kappa 5"),
        ({**OPSD_V3, "entry_clip": 0.05, "reduce": TOKENS}, "OPSD's; ours here"),
    ],
    "dr_grpo": [({"group_size": 8, "clip": (0.2, 0.2), "length": 1024}, "GRPO's in TRL; the length is ours")],
    "egrsd": [
        ({"strength": 0.3, "window": 0, "ratio_eps": 0.2, "length_bonus": 0.5, "group_size": 1}, "paper, EGRSD"),
        ({"temperature": 1.1, "top_p": 0.95, "top_k": 20, "reduce": TOKENS}, "paper, sampling"),
        ({"warmup": 10}, "paper, EGRSD"),
    ],
    "gkd": [
        ({"lmbda": 0.5, "beta": 0.5, "temperature": 0.9, "seq_kd": False}, "TRL (the paper's XSum runs: 1.0)"),
        ({"reduce": TOKENS, "group_size": 1}, "TRL"),
    ],
    "grpo": [
        ({"group_size": 8, "clip": (0.2, 0.2), "kl_coef": 0.0, "normalised": True, "compared": "group"}, "TRL"),
        ({"reduce": ROWS}, "arXiv:2402.03300, Eq. 3"),
        ({"dual_clip": None, "tis_cap": None, "tis_bounds": None, "temperature": 1.0}, "TRL"),
    ],
    "gspo": [
        ({"clip": (3e-4, 4e-4)}, "arXiv:2507.18071"),
        ({"group_size": 8, "normalised": True}, "GRPO's in TRL"),
    ],
    "iw_opd": [
        ({"gamma": 0.5}, "paper and TRL's iw_opd"),
        ({"group_size": 1, "temperature": 1.0, "reduce": TOKENS}, "ours"),
    ],
    "minillm": [
        ({"mix": 0.2, "single_step": True, "length_normalised": True}, "paper: alpha 0.2; TRL's flags"),
        ({"discount": 1.0, "clip": (0.2, 0.2), "lm_coef": 1.0}, "paper, section 2 and its code"),
        ({"group_size": 4}, "ours"),
    ],
    "mixsd": [
        ({"naive": 0.3, "temperature": 0.0, "top_k": 64}, "README's command; decoding of the code"),
        ({"retries": 10, "verified": True}, "code"),
    ],
    "mopd": [
        (SDPO_TABLE, "released configuration"),
        ({"another": True, "failure": "always", "success": 0.5, "use_feedback": True}, "paper 2S+1F; yaml: tau 0.5"),
        ({"shown": "peers", "summarised": "all"}, "paper: solutions of peers"),
    ],
    "msd": [
        ({"weighted": True, "ema_rate": 0.0}, "paper: the frozen teacher is best"),
        ({"top_k": 20, "group_size": 1, "temperature": 1.0}, "ours"),
    ],
    "op2sd": [
        ({**OPSD_V3, "beta": 0.0, "clip": 0.05, "context": "mismatched"}, "OPSD's; the paper's were not available"),
        ({"topic": "topic", "remembered": 256}, "ours"),
    ],
    "opd": [
        ({"group_size": 4, "coef": 1.0, "discount": 0.0, "temperature": 1.0}, "tinker-cookbook"),
        ({"rl_weight": 0.0, "direct": None, "full_vocabulary": False, "reduce": TOKENS}, "tinker-cookbook; its sum: card"),
    ],
    "opsa": [({"threshold": 0.1, "penalty": 1.0, "group_size": 4}, "ours: only the abstract was read")],
    "opsd": [
        ({**OPSD_V3, "beta": 0.0, "clip": 0.05, "teacher_top_k": None, "sampled_token": False}, "version 3 and its code"),
        ({"reduce": TOKENS}, "code: batchmean over a micro-batch"),
    ],
    "pbsd": [({"beta": 0.1, "pairs": 1, "ema_rate": 0.0, "per_token": False}, "ours: the paper's were not found")],
    "power_opd": [
        ({"alpha": 5.0, "scaled": False}, "released script"),
        ({"group_size": 1, "temperature": 1.0, "reduce": TOKENS}, "ours"),
    ],
    "purified_opsd": [({"beta": 1.0, "alpha": 0.5, "temperature": 1.0, "group_size": 1}, "ours: known from a paragraph")],
    "pw_opsd": [
        ({"lowest": 0.25, "centre": 0.3, "width": 0.1, "entry_clip": 0.05}, "paper: w_min .25, tau .30, s .10"),
        ({**OPSD_V3, "reduce": ROWS}, "paper: T 1.1, one rollout, mean over rows of 1/L sums"),
    ],
    "resd": [
        ({"group_size": 1, "top_k": 100, "ema_rate": 1e-4, "low": 0.2, "high": None, "alpha": 1.0}, "paper, Manufactoria"),
        ({"cap": 200, "prune": "staleness", "prune_every": 4, "balance": True}, "released scripts, Manufactoria"),
        ({"temperature": 1.0, "top_p": 0.95, "is_cap": 2.0}, "released scripts"),
        ({"balance_powers": (1.0, 1.0), "reflection": True, "playbook": True, "buffer": True}, "paper"),
        ({"write": policy_writes}, "paper: the policy writes"),
    ],
    "rethinking_opd": [
        ({"top_k": 16, "support": "student", "weights": "student", "group_size": 4}, "paper: k 16, only_stu, student_p, 4"),
        ({"clip": (0.2, 0.2), "dual_clip": 3.0, "loss": "released", "rl_weight": 0.0, "raw_weights": False}, "code"),
        ({"temperature": 1.0, "reduce": TOKENS, "cold_start": 0}, "paper: T 1.0, token-mean"),
    ],
    "rlcsd": [
        ({"group_size": 8, "coef": 0.5, "tau": 1.0, "threshold": 0.0, "wrong_peers": 2}, "ours: known from a paragraph"),
        ({"clip": (0.2, 0.2)}, "GRPO's in TRL"),
    ],
    "rlrt": [
        ({"group_size": 8, "mix": 0.5, "ratio_eps": 1.0, "mix_decay": 0}, "paper: lambda .5; base models: eps 1, no decay"),
        ({"clip": (0.2, 0.28), "tis_cap": 2.0, "temperature": 1.0, "reduce": TOKENS, "rows": "correct"}, "paper, settings"),
    ],
    "sdft": [
        ({"alpha": 0.0, "skip": 3, "ema_rate": 0.01, "is_cap": 2.0}, "code: forward KL, three tokens, cap 2; EMA of .01-.05"),
        ({"temperature": 1.0, "group_size": 1, "reduce": ROWS}, "code"),
    ],
    "sdpo": [(SDPO_TABLE, "Table 12, without rich feedback"), ({"rl_weight": 0.0, "trust": None, "temperature": 1.0}, "code")],
    "sft": [({"texts": None, "reduce": TOKENS}, "the usual cross-entropy")],
    "sort": [
        ({"group_size": 8, "coef": 1.0, "plan_rate": 0.5, "uplift_cap": 5.0, "clip": (0.2, 0.2)}, "ours: none is known"),
        ({"plans": "written", "normalised": True}, "ours: none is known"),
    ],
    "stable_opd": [
        ({"group_size": 4, "temperature": 1.0}, "paper: 4 rollouts, T 1.0"),
        ({"gold_coef": 0.1, "kl_coef": 0.01}, "a third party's code (kiln)"),
        ({"anchor": "full", "clip": (0.2, 0.2)}, "ours"),
    ],
    "tessy": [
        ({"chunk": 20}, "paper: k 20"),
        ({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "tries": 5}, "script defaults"),
        ({"end": "</think>", "annotator": "rule", "tagger_rollouts": 8, "tagger_snippets": 256}, "ours"),
        ({"swap": "trigger", "word": "complete"}, "code"),
    ],
    "topd": [({"alpha": 0.5, "discount": 1.0, "normalised": True, "group_size": 8}, "ours: known from a paragraph")],
    "trace": [
        ({"group_size": 8, "schedule": (0.5, 10, 30), "refresh_every": 10, "most": 0.25}, "paper: w0 .5, t0 10, Td 30, N 10"),
        ({"top_k": 100, "entry_clip": 0.05, "clip": (0.2, 0.28), "temperature": 0.6}, "paper: K, tau, DAPO's eps, T"),
        ({"error_weight": 0.0, "key_weight": 1.0}, "TRACE-FKL(K), the better variant of the 8B table"),
        ({"mask": "annotated", "active_only": True, "annotator": "rule"}, "ours: the paper's annotator is another model"),
    ],
    "vopd": [
        ({"group_size": 1, "temperature": 1.0, "baseline": "value", "top_k": None}, "paper: vOPD_full, one rollout"),
        ({"live_reward": False}, "paper; the code's baseline leaks"),
    ],
    "vpd": [
        ({"group_size": 8, "every": 5, "beta": 0.1, "alpha": 0.5, "top_k": 100}, "paper, SciKnowEval: F 5, BCO beta .1"),
        ({"feedback": "sibling", "temperature": 1.0}, "paper, SciKnowEval"),
        ({"midpoint_rate": 1.0, "prior": "current", "ema_rate": 1.0}, "Algorithm 1"),
    ],
}  # fmt: skip

THROUGHOUT = {"success": 0.5, "temperature": 1.0, "tis_level": "token"}
"""Defaults of all methods that list no others."""

CASES = [(name, values, source) for name, lines in DEFAULTS.items() for values, source in lines]


@pytest.mark.parametrize(("name", "values", "source"), CASES, ids=[f"{n}: {s}" for n, _, s in CASES])
def test_published_values_are_the_defaults(name, values, source):
    parameters = inspect.signature(options.method_factory(name)).parameters
    assert source and {option: parameters[option].default for option in values} == values


def test_the_table_has_every_method():
    assert sorted(DEFAULTS) == options.method_names()


@pytest.mark.parametrize("name", DEFAULTS)
def test_no_default_is_left_out(name):
    """What a method does not list is as it is throughout, or off: nothing that the published method has not."""
    listed = {option for values, _ in DEFAULTS[name] for option in values}
    for option, parameter in inspect.signature(options.method_factory(name)).parameters.items():
        if option in THROUGHOUT and option not in listed:
            assert parameter.default == THROUGHOUT[option]
        assert option in {*listed, *THROUGHOUT, "reduce"} or not parameter.default


def test_defaults_that_stand_elsewhere():
    """Version 1 of OPSD; EGRSD's gate; verl's top k; RLSD as RLRT's other direction takes no default of its own."""
    assert V1 == {"beta": 0.5, "clip": None, "temperature": 1.2, "top_p": 1.0, "top_k": 0}
    assert opsd_v1().objectives and opd_module.VERL_TOP_K == 32
    gate = inspect.signature(entropy_gate).parameters
    assert (gate["strength"].default, gate["floor"].default) == (0.3, 0.1)
    assert not inspect.signature(rlrt).parameters["toward"].default
