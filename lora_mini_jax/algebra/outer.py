"""Frozen outer factors ``A_aux (in, a)`` and ``B_aux (b, out)``: drawn, or made from data."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra.decompositions import orthonormal, top_singular
from lora_mini_jax.algebra.draws import GENERATOR
from lora_mini_jax.method import Factors

OuterInit = Literal["normal", "fan_in", "orthogonal", "svd", "gradient", "activation"]
"""``"normal"``: N(0, 1), the code of LoRA-Mini's authors. ``"fan_in"``: N(0, 1/in) and N(0, 1/b).
``"orthogonal"``: orthonormal columns and rows. ``"svd"``: the kernel's top singular vectors.
``"gradient"``: those of the kernel's gradient. ``"activation"``: the main directions of the layer's
inputs and of its outputs. The last two come from data, see `calibrate`."""
FROM_DATA = ("gradient", "activation")
DRAWN = ("normal", "fan_in", "orthogonal")
"""Those that are a function of the key and the kernel's shape alone."""
Kept = Literal["float32", "bfloat16", "recompute"]
"""How they are kept: in this dtype, or drawn again in every call."""


def draw(
    outer_init: OuterInit, keys: Sequence[jax.Array] | jax.Array, kernel: Any, a: int, b: int
) -> tuple[jax.Array, jax.Array]:
    """``A_aux (in, a)`` and ``B_aux (b, out)`` in float32, from a key each; 0 where they come from
    data."""
    n_in, n_out = kernel.shape
    if outer_init in FROM_DATA:
        return jnp.zeros((n_in, a), jnp.float32), jnp.zeros((b, n_out), jnp.float32)
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


def seed(keys: jax.Array, kernel: jax.Array) -> Factors:
    """What `again` draws the factors from: two keys' data (uint32), and the factors without their
    entries, whose long sides say how long they are and take no memory."""
    n_in, n_out = kernel.shape
    none = {"A_aux": jnp.zeros((n_in, 0), jnp.float32), "B_aux": jnp.zeros((0, n_out), jnp.float32)}
    return {"outer_keys": jax.random.key_data(keys), **none}


def again(outer_init: OuterInit, seeds: Factors, a: int, b: int) -> tuple[jax.Array, jax.Array]:
    """What `draw` gave for one of `DRAWN`, from `seed`."""
    shape = seeds["A_aux"].shape[0], seeds["B_aux"].shape[1]
    keys = jax.random.wrap_key_data(seeds["outer_keys"], impl=GENERATOR)
    return draw(outer_init, keys, jax.ShapeDtypeStruct(shape, jnp.float32), a, b)


def from_data(outer_init: OuterInit, kernel: jax.Array, seen: Factors, a: int, b: int) -> Factors:
    """The factors of ``"gradient"`` and ``"activation"``; arguments as in `Method.from_data`."""
    if outer_init == "gradient":
        left, right = seen["left"], seen["right"]
    else:
        left, _, _ = top_singular(seen["moment"], a)
        _, _, right = top_singular(kernel.T @ seen["moment"] @ kernel, b)
    return {"A_aux": left[:, :a], "B_aux": right[:b]}


def widest(outer_init: OuterInit, n_in: int, n_out: int, side: int) -> int:
    """The most columns or rows on a side; singular vectors end with the kernel's shorter side."""
    return min(n_in, n_out) if outer_init in ("svd", "gradient") else side
