"""Snapshots of a run: what they are at the start, and their rules (`sdjax.engine.policies`) as compiled programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.devices.sharding import constrain_parameters, place_parameters
from sdjax.engine.policies import Follows, unchanged
from sdjax.types import Method


def begun(rule: Callable, params: Any) -> Any:
    """What a snapshot is before the first step: a copy of the parameters, in float32 if its rule averages."""
    averages = isinstance(rule, Follows) and rule.averages
    return jax.tree.map(lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32) if averages else None), params)


def frozen_snapshots(method: Method, start: Any) -> dict[str, Any]:
    """The snapshots that stay what the student was at the start, all of them the same arrays."""
    names = [name for name, rule in method.snapshots.items() if rule is unchanged]
    return dict.fromkeys(names, place_parameters(start)) if names else {}


def refresh_snapshots(
    method: Method, names: Sequence[str] | None = None
) -> Callable[[Any, Mapping[str, Any], Array], dict[str, Any]]:
    """The compiled rules of a method's snapshots: `(live params, snapshots, step)` -> snapshots, which are donated.

    Those of other `names` (default: all) stay what they are.
    """

    def refreshed(live, snapshots, step):
        chosen = method.snapshots if names is None else names
        new = {name: constrain_parameters(method.snapshots[name](live, snapshots[name], step)) for name in chosen}
        return {**snapshots, **new}

    return jax.jit(refreshed, donate_argnums=1)
