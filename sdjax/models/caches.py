"""What a run of tokens leaves behind for those that continue it: one pair of arrays per layer."""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax
from jax import Array

from sdjax.models.attention import Keys


@flax.struct.dataclass
class KeyValues:
    """Keys and values of a run of tokens: one `[N, S, kv_heads, head_dim]` array per layer, and where they stand.

    Layers that borrow theirs (`ModelConfig.keys_of`), the last ones, have none.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    positions: Array  # [N, S] int32
    mask: Array  # [N, S] bool: False for padding and for cache columns not yet written


class Column(NamedTuple):
    """Where decoding writes a cache: the column of this step, and how many, from the first on, then hold something."""

    index: Array  # []
    written: Array  # []


def put(old: Array, new: Array, column: Column) -> Array:
    """A cache's array `[B, T, ...]` with `new [B, 1, ...]` in one column."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), column.index, axis=1)


def layer_of(run: KeyValues | None, layer: int) -> Keys | None:
    """What one layer reads of a run, or `None` of none."""
    return None if run is None else Keys(run.keys[layer], run.values[layer], run.positions, run.mask)
