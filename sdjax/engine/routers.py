"""What routers of a mixture of experts are trained for besides: to use all experts, with small logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from sdjax.engine.sensible import ExperimentError
from sdjax.kernels.reductions import token_mean
from sdjax.kernels.routers import load_balance, most_loaded
from sdjax.models.configs import ModelConfig
from sdjax.models.routing import Usage
from sdjax.types import Term


@dataclasses.dataclass(frozen=True)
class Router:
    """Coefficients of the two losses that `router_terms` adds to every objective's; with 0 a loss is measured alone."""

    aux: float = 0.0
    z: float = 0.0


def chosen(aux: float, z: float) -> Router | None:
    """The losses of two options of a command line; `None` without any: nothing is computed."""
    return Router(aux, z) if aux or z else None


def check(router: Router | None, config: ModelConfig) -> None:
    """Raises `ExperimentError` where there is nothing to route."""
    if router is not None and config.moe is None:
        raise ExperimentError(
            f"router_aux={router.aux:g} and router_z={router.z:g} are losses of routers, and a {config.family} model has no "
            "mixture of experts: leave both 0"
        )


def router_terms(usages: Mapping[str, Usage], router: Router) -> dict[str, Term]:
    """The terms of what routers did with all tokens that were read for a batch: prompts and completions, no padding.

    - `router_aux`: `sum over layers of E sum_i f_i P_i` (`sdjax.kernels.routers.load_balance`).
    - `router_z`: `sum over layers of mean over tokens of (log sum_i exp x_i)^2`, `x` the router's logits.
    - `router_entropy`, nats, and `router_load`, the most used expert's share in multiples of an even one: means over layers,
      measured alone.

    Sources: Fedus et al. 2022, arXiv:2101.03961, Eq. 4; Zoph et al. 2022 (ST-MoE), arXiv:2202.08906, Eq. 5.

    Args:
      usages: by trained view, `[B, L, ...]`; those of several views are added up.
    """
    rows = len(next(iter(usages.values())).tokens)
    whole = jax.tree.map(lambda *x: sum(part.sum(0) for part in x), *usages.values())
    mean = lambda sums: sums / jnp.maximum(whole.tokens, 1.0)
    term = partial(_of_batch, rows=rows)
    return {
        "router_aux": term(load_balance(whole.chosen, whole.probability), router.aux),
        "router_z": term(mean(whole.log_partition).sum(), router.z),
        "router_entropy": term(mean(whole.entropy).mean(), 0),
        "router_load": term(most_loaded(whole.chosen), 0),
    }


def _of_batch(value: jax.Array, coef: float, rows: int) -> Term:
    """A term that is one number for all rows."""
    return Term(jnp.broadcast_to(value, (rows,)), reduce=token_mean, coef=coef)
