"""Frozen outer factors ``A_aux (in, a)`` and ``B_aux (b, out)``: drawn, or made from data."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from lora_mini_jax.low_rank import orthonormal, top_singular
from lora_mini_jax.method import Factors

OuterInit = Literal["normal", "fan_in", "orthogonal", "svd", "gradient", "activation"]
"""``"normal"``: N(0, 1), the code of LoRA-Mini's authors. ``"fan_in"``: N(0, 1/in) and N(0, 1/b).
``"orthogonal"``: orthonormal columns and rows. ``"svd"``: the kernel's top singular vectors.
``"gradient"``: those of the kernel's gradient. ``"activation"``: the main directions of the layer's
inputs and of its outputs. The last two come from data, see `calibrate`."""
FROM_DATA = ("gradient", "activation")


def draw(
    outer_init: OuterInit, keys: Sequence[jax.Array] | jax.Array, kernel: jax.Array, a: int, b: int
) -> tuple[jax.Array, jax.Array]:
    """``A_aux (in, a)`` and ``B_aux (b, out)`` in float32, from a key each; 0 where they come from
    data."""
    n_in, n_out = kernel.shape
    if outer_init in FROM_DATA:
        return jnp.zeros((n_in, a)), jnp.zeros((b, n_out))
    if outer_init == "svd":
        u, _, vt = top_singular(kernel, max(a, b))
        return u[:, :a], vt[:b]
    left, right = keys
    a_aux = jax.random.normal(left, (n_in, a), jnp.float32)
    b_aux = jax.random.normal(right, (b, n_out), jnp.float32)
    if outer_init == "orthogonal":
        return orthonormal(a_aux), orthonormal(b_aux.T).T
    if outer_init == "fan_in":
        return a_aux * n_in**-0.5, b_aux * b**-0.5
    return a_aux, b_aux


def from_data(
    outer_init: OuterInit,
    kernel: jax.Array,
    gradient: jax.Array,
    moment: jax.Array,
    a: int,
    b: int,
) -> Factors:
    """The factors of ``"gradient"`` and ``"activation"``; arguments as in `Method.from_data`."""
    if outer_init == "gradient":
        left, _, right = top_singular(gradient, max(a, b))
    else:
        left, _, _ = top_singular(moment, a)
        _, _, right = top_singular(kernel.T @ moment @ kernel, b)
    return {"A_aux": left[:, :a], "B_aux": right[:b]}


def widest(outer_init: OuterInit, n_in: int, n_out: int, side: int) -> int:
    """The most columns or rows on a side; singular vectors end with the kernel's shorter side."""
    return min(n_in, n_out) if outer_init in ("svd", "gradient") else side
