"""Which axis of a large parameter is split over the model axis of a mesh, by the parameter's path."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """Parameters of `dims` axes whose path matches `pattern` are split over the model axis along `axis` of `what`.

    Those of experts are split over the expert axis, too, if there is one.
    """

    pattern: str
    dims: int
    axis: int
    what: str


VOCABULARY, EXPERTS = "vocabulary entries", "experts"
RULES = (
    Rule(r"(^|/)(embed|head)$", 2, 0, VOCABULARY),
    Rule(r"(^|/)attention/qkv$", 4, 1, "kv_heads"),
    Rule(r"(^|/)attention/qkv_bias$", 3, 0, "kv_heads"),
    Rule(r"(^|/)attention/sinks$", 2, 0, "kv_heads"),
    Rule(r"(^|/)attention/out$", 4, 0, "kv_heads"),
    Rule(r"(^|/)delta/mixed$", 3, 1, "key heads"),
    Rule(r"(^|/)delta/convolution$", 4, 0, "key heads"),
    Rule(r"(^|/)delta/(decay_rate|step_bias)$", 2, 0, "key heads"),
    Rule(r"(^|/)delta/out$", 3, 0, "key heads"),
    Rule(r"(^|/)mlp/(shared/)?gate_up$", 3, 2, "hidden units"),
    Rule(r"(^|/)mlp/gate_up_bias$", 2, 1, "hidden units"),
    Rule(r"(^|/)mlp/(shared/)?down$", 2, 0, "hidden units"),
    Rule(r"(^|/)mlp/gate_up$", 4, 0, EXPERTS),
    Rule(r"(^|/)mlp/gate_up_bias$", 3, 0, EXPERTS),
    Rule(r"(^|/)mlp/down$", 3, 0, EXPERTS),
    Rule(r"(^|/)mlp/down_bias$", 2, 0, EXPERTS),
    Rule(r"(^|/)[ab]$", 3, 0, EXPERTS),
)
"""First match wins.  Queries lie with the key and value that they read, so heads are split by groups.  Of adapters only those of experts have three axes."""
