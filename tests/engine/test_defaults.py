"""Defaults of `engine`, written down once more: a change of one is seen here, and meant."""

from signatures import listed

DEFAULTS = {
    "routers.Router": {"z": 0.0, "aux": 0.0},
    "score.token_signals": {"routers": False},
    "generate.Sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    "policies.Follows": {"every_update": False},
    "policies.ema": {"every_update": False},
    "policies.one_sample": {"opening": ""},
    "policies.sample": {"n": 1},
    "protocol.Protocol": {"samples": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0},
    "sketch.collected": {"prompts": 2},
    "sketch.rows_per_prompt": {"prompts": 2},
    "sketch.sketched": {"prompts": 2},
    "tokens.Shapes": {"context": 512, "completion": 128},
    "tokens.collate": {"groups": 1, "multiple": 1},
    "tokens.decode_text": {"opening": ""},
    "train.Experiment": {
        "steps": 100,
        "prompts": 4,
        "rounds": 1,
        "minibatches": 1,
        "epochs": 1,
        "seed": 0,
        "memory": "auto",
        "scan": False,
        "evaluation": 100,
        "evaluate_every": 0,
        "save_every": 25,
        "keep": 2,
        "keep_every": 0,
        "keep_best": False,
        "grace": 0.0,
        "most_skipped": 3,
        "stop_on": "nothing",
        "completions_every": 10,
        "log": ("tensorboard",),
        "log_project": "sdjax",
        "export": True,
    },
}
"""By module and function.  Where a paper gives a value it stands in the function's docstring."""


def test_defaults():
    assert listed("sdjax.engine", DEFAULTS) == DEFAULTS
