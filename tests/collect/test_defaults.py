"""Defaults of `collect`, written down once more: a change of one is seen here, and meant."""

from signatures import listed

DEFAULTS = {
    "hindsight.aftermath": {"success": 0.5},
    "alignment.alignment_terms": {"success": 0.5},
    "annotators.by_policy": {"name": "live", "success": 0.5},
    "annotators.by_rule": {"success": 0.5},
    "annotators.request": {"success": 0.5},
    "context_signals.context_signals": {"policy": "live", "success": 0.5},
    "context_signals.peer_contexts": {"success": 0.5},
    "context_signals.with_signals": {"success": 0.5},
    "contexts.rewrite_last": {"privileged": ""},
    "contexts.with_feedback": {"instruction": "Correctly solve the original question."},
    "contexts.with_solution": {"header": "Correct solution:", "instruction": "Correctly solve the original question."},
    "continuations.with_continuation_gains": {"success": 0.5},
    "controls.controlled": {
        "context": "matched",
        "weights": "as-is",
        "length_penalty": 0.0,
        "diagnose": False,
        "success": 0.5,
    },
    "controls.with_token_weights": {"seed": 0},
    "conversations.Talk": {"reward": 0.0, "going": True, "finished": False},
    "corrections.anchors": {"success": 0.5},
    "diagnostics.agreement_by_outcome": {"threshold": 0.6931},
    "diagnostics.cells_by_outcome": {"threshold": 0.6931},
    "diagnostics.concentration": {"share": 0.1},
    "diagnostics.distinct": {"n": 1},
    "diagnostics.epistemic_count": {
        "words": ("wait", "hmm", "perhaps", "maybe", "actually", "alternatively", "seems", "might", "likely", "check")
    },
    "diagnostics.epistemic_words": {
        "words": ("wait", "hmm", "perhaps", "maybe", "actually", "alternatively", "seems", "might", "likely", "check")
    },
    "diagnostics.fork": {"below": 0.25},  # Kaur et al.
    "diagnostics.lock": {"above": 0.65},  # Kaur et al.
    "diagnostics.marks": {"words": ("wait", "hmm", "but", "maybe")},
    "diagnostics.repeated_ngrams": {"n": 3},
    "diagnostics.repeats": {"tail": 10000, "ratio": 10.0},  # StableOPD
    "diagnostics.repetition_rate": {"tail": 10000, "ratio": 10.0},
    "hindsight.hindsight": {"success": 0.5, "peers": True, "observations": True},
    "instruments.with_instruments": {"k": 16, "success": 0.5},
    "lessons.attempt_and_verdict": {"success": 0.5},
    "lessons.peer_or_feedback": {
        "success": 0.5,
        "use_feedback": True,
        "feedback_beside_solution": False,
        "thinking": False,
        "shown_itself": False,
    },
    "peers.peers": {
        "success": 0.5,
        "another": True,
        "failure": "always",
        "use_feedback": True,
        "thinking": False,
        "shown": "peers",
        "summaries": 0,
        "summarised": "all",
    },
    "playbook.Rules": {"reflection": True, "playbook": True, "cap": 200, "prune": "staleness", "every": 4},  # RESD
    "refreshing.with_refresh": {"window": 10, "longest": 0},
    "rollouts.resample": {"rounds": 10},
    "rollouts.sample": {"n": 1, "source": 0},
    "rollouts.solved_peer": {"success": 0.5},
    "rollouts.written": {"finished": True},
    "saliency.measured": {
        "delimiter": "####",
        "steps": 200,
        "mask_loss": "nll",
        "target": "own",
        "inner": "adamw",
        "view": "student",
    },  # AtManRL: 200 steps
    "saliency.relearned": {"steps": 200, "inner": "adamw"},
    "selection.Rule": {
        "candidates": 2,
        "success": 0.5,
        "align": "position",
        "retry": True,
        "skip": False,
        "perturb": False,
    },  # BRTS
    "selections.marked": {"powers": (0.0, 0.0)},
    "selections.routed": {"success": 0.5, "clip": (0.2, 0.2)},
    "selections.selected": {
        "rows": "all",
        "pass_rate": (0.0, 0.0),
        "route": False,
        "success": 0.5,
        "share": 1.0,
        "shown": "beginning",
        "refresh_every": 0,
        "refresh_window": 10,
        "refresh_longest": 0,
    },
    "selections.with_partial_references": {"shown": "beginning"},
    "selections.with_rows": {"success": 0.5},
    "synthesis.Trace": {"answer": ""},
    "synthesis.Writer": {"chunk": 20},  # TESSY
    "synthesis.repetitive": {"tail": 1000, "least": 3, "most": 50, "times": 8},
    "synthesis.to_dataset": {"size": 8},
    "synthesis.together": {"n": 1},
    "synthesis.weave": {"end": "</think>", "tries": 5},
    "taggers.boundary": {"skip_first": False, "swap": "trigger", "word": "complete", "window": 200, "slots": 8},
    "taggers.fit_tagger": {
        "layers": 2,
        "epochs": 3,
        "batch": 32,
        "lr": 0.001,
        "held_out": 0.05,
        "most": 512,
        "seed": 0,
    },
    "taggers.kept": {"skip_first": False},
    "taggers.snippets": {"words": 60},
}
"""By module and function.  Where a paper gives a value it stands in the function's docstring."""


def test_defaults():
    assert listed("sdjax.collect", DEFAULTS) == DEFAULTS
