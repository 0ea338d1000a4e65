"""Decompositions of matrices, of one at a time.

A program with many batched LAPACK calls can hang on a CPU of few cores, with every thread idle
(jaxlib 0.10.2; twenty QR decompositions of two matrices each, on two cores). So what ``vmap`` puts
together, such as the kernels of stacked layers, is taken apart again, and done one by one.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from lora_mini_jax.tree import float32


@sequential_vmap
def qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``Q (n, k)`` and ``R (k, m)`` of a matrix ``(n, m)``, k the smaller; unique, as the diagonal
    of R is not negative."""
    q, r = jnp.linalg.qr(matrix)
    signs = jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)
    return q * signs, signs[:, None] * r


@sequential_vmap
def _svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return tuple(jnp.linalg.svd(matrix, full_matrices=False))


@sequential_vmap
def inverse(matrix: jax.Array) -> jax.Array:
    """Of a square matrix."""
    return jnp.linalg.inv(matrix)


def orthonormal(matrix: jax.Array) -> jax.Array:
    """Orthonormal columns spanning those of ``matrix``."""
    return qr(matrix)[0]


def top_singular(kernel: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ``k`` largest singular triples in float32: ``(in, k)``, ``(k,)``, ``(k, out)``.

    Each left vector's largest entry is positive: a decomposition leaves the signs open, and two
    machines would otherwise draw different factors from the same kernel.
    """
    u, s, vt = _svd(float32(kernel))
    u, s, vt = u[:, :k], s[:k], vt[:k]
    largest = jnp.argmax(jnp.abs(u), axis=0, keepdims=True)
    signs = jnp.where(jnp.take_along_axis(u, largest, axis=0) < 0, -1.0, 1.0)
    return u * signs, s, vt * signs.T
