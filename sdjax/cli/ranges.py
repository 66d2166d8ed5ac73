"""Which values of methods' numeric options make sense; others are refused by name before anything is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.cli.options import OptionError


class Range(NamedTuple):
    """Finite numbers from `low` to `high`; `above` and `below` leave out the ends.  `but` is a number in between that is not in it."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    but: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a number lies in it; NaN and infinities never do."""
        start = value > self.low if self.above else value >= self.low
        end = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and start and end and value != self.but

    def __str__(self) -> str:
        words = []
        if self.low > -math.inf:
            words.append(f"above {self.low:g}" if self.above else f"at least {self.low:g}")
        if self.high < math.inf:
            words.append(f"below {self.high:g}" if self.below else f"at most {self.high:g}")
        words += [] if self.but is None else [f"other than {self.but:g}"]
        return f"expected {' and '.join(words)}" if words else "expected a finite number"


ANY, SHARE, COUNT, SIZE = Range(), Range(0, 1), Range(0), Range(1)
POSITIVE, PART = Range(0, above=True), Range(0, 1, above=True)


def named(range: Range, names: str) -> dict[str, Range]:
    """The same range for several options."""
    return dict.fromkeys(names.split(), range)


RANGES = {
    **named(ANY, "centre"),
    **named(Range(but=0), "width"),
    **named(SHARE, "alpha beta discount ema_rate horizon lmbda low lowest medium mix most naive overlong plan_rate"),
    **named(SHARE, "repelled share target trust opsa.threshold sdpo.rl_weight"),
    **named(COUNT, "balance_powers clip coef cold_start copy_every depths entry_clip error_weight every gains gamma"),
    **named(
        COUNT, "gold_coef kappa key_weight kl_coef length_bonus lm_coef mix_decay overlong_factor penalty ratio_eps"
    ),
    **named(COUNT, "reason_first replay retries risk rl_weight schedule skip strength summaries teacher_temperature"),
    **named(COUNT, "temperature threshold tis_bounds warmup window dasd.beta vpd.beta"),
    **named(
        SIZE, "candidates cap chunk group_size high length pairs prune_every refresh_every remembered rounds steps"
    ),
    **named(SIZE, "tagger_rollouts tagger_snippets teacher_top_k top_k tries wrong_peers"),
    **named(POSITIVE, "advantage_clip is_cap tau tis_cap uplift_cap pbsd.beta purified_opsd.beta power_opd.alpha"),
    **named(POSITIVE, "opsd.temperature op2sd.temperature dash.temperature pw_opsd.temperature"),
    **named(PART, "midpoint_rate success teacher_top_p top_p topd.alpha"),
    **named(Range(1, above=True), "dual_clip"),
    **named(Range(2), "msd.top_k"),
    # A filter of sampling, or the sampled token alone: 0 is a choice.
    **named(COUNT, "dash.top_k egrsd.top_k mixsd.top_k op2sd.top_k opsd.top_k pw_opsd.top_k tessy.top_k"),
    **named(COUNT, "rethinking_opd.top_k"),
    "minillm.mix": Range(0, 1, below=True),
    # A negative weight descends the divergence that the method ascends: its baseline.
    "antisd.coef": ANY,
}
"""By the name of an option, or of a method and its option where that differs from others of the name."""

RISING = {"medium": (0, 1), "tis_bounds": (0, 1), "share": (1, 0, 2)}
"""Options of several numbers that must not fall in this order: `share` is the first value, the least and the most."""


def range_of(method: str, option: str) -> Range | None:
    """The range of a method's option; `None` for one that is not numeric."""
    return RANGES.get(f"{method}.{option}", RANGES.get(option))


def check_options(method: str, chosen: Mapping[str, Any]) -> None:
    """Raises `OptionError` for a number that makes no sense, such as `--method.group-size 0`."""
    for name, value in chosen.items():
        numbers: Sequence[Any] = value if isinstance(value, tuple | list) else (value,)
        if not numbers or any(isinstance(x, bool) or not isinstance(x, int | float) for x in numbers):
            continue
        typed = f"--method.{name.replace('_', '-')} {' '.join(map(str, numbers))}"
        known = range_of(method, name)
        if known and not all(map(known.holds, numbers)):
            raise OptionError(f"{typed}: {known}")
        order = [numbers[i] for i in RISING.get(name, ())]
        if order != sorted(order):
            places = "the first between the other two" if len(order) > 2 else "the first at most the second"
            raise OptionError(f"{typed}: expected {places}")
