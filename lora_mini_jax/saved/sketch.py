"""Short numeric digests of arrays, equal across machines up to rounding.

A hash of the bits would call a factor that was drawn on a TPU and drawn again on a CPU a different
one, although it differs in the last bit of a few numbers. A sketch is a handful of projections: it
moves by about the relative size of the rounding, and by about its own size when the array is
another one.
"""

import math
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_mini_jax.processes import on_host
from lora_mini_jax.tree import dense

MOST = 1 << 16  # entries looked at in one array, evenly spread: an 8B model is sketched in seconds


def sketch(array: Any, n: int = 2) -> list[float]:
    """An array's root mean square, then ``n`` projections of it on that scale (five digits each).

    Example:
        >>> a = np.ones((4, 4), np.float32)
        >>> same(sketch(a), sketch(a + 1e-6)), same(sketch(a), sketch(a.cumsum(1)))
        (True, False)
    """
    flat = _entries(array).astype(np.float64)
    flat = np.where(np.isfinite(flat), flat, 0)  # a mask's infinities are equal to no number
    if flat.size == 0:
        return [0.0] * (n + 1)
    waves = np.cos(np.outer(np.arange(1, n + 1) * 0.7548776662, np.arange(flat.size) + 1))
    values = [np.sqrt(np.mean(flat**2)), *(waves @ flat * (2 / flat.size) ** 0.5)]
    return [float(f"{value:.5g}") for value in values]


def same(a: list[float], b: list[float], tolerance: float = 1e-2) -> bool:
    """Whether two sketches are of the same array up to rounding, to bfloat16 at the coarsest.

    Measured: rounding to bfloat16 moves a sketch by up to 0.5 %, another draw by 5 % and more.
    """
    if len(a) != len(b):
        return False
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return bool(np.linalg.norm(x - y) <= tolerance * max(np.linalg.norm(x), 1e-30))


def _entries(array: Any) -> np.ndarray:
    """The entries that are looked at, flat. Those of a large array elsewhere are picked there: to
    fetch a whole model, or to gather it from all processes, takes minutes."""
    shape = np.shape(array)
    size = math.prod(shape)
    step = max(1, size // MOST)
    leaves = jax.tree.leaves(array)  # a quantised kernel's are several
    if step == 1 or all(_is_here(leaf) for leaf in leaves):
        return on_host(dense(array)).reshape(-1)[::step]
    sharding, everywhere = leaves[0].sharding, None
    if isinstance(sharding, NamedSharding):
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    places = np.unravel_index(np.arange(0, size, step), shape)  # a flat one may not fit an int32
    return on_host(_picked(array, places, everywhere))


def _is_here(leaf: Any) -> bool:
    """Whether NumPy sees the very memory of an array, so that there is nothing to fetch."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and [one.platform for one in leaf.devices()] == ["cpu"]


@partial(jax.jit, static_argnums=2)
def _picked(array: Any, places: tuple[Any, ...], everywhere: NamedSharding | None) -> jax.Array:
    # Entries in bounds: XLA asks each device for its own and adds them up, and gathers no shard.
    return (
        dense(array)
        .at[places]
        .get(mode="promise_in_bounds", wrap_negative_indices=False, out_sharding=everywhere)
    )
