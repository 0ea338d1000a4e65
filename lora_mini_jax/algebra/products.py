"""Activations times a chain of thin matrices: each product in the order that costs least.

What multiplies the activations is a choice: ``x @ A @ B`` may be ``x @ (A @ B)``. The gradients
have choices of their own, and autodiff repeats those of the forward pass. `through` makes them one
by one, from the shapes:

- The chain is cut where it is narrowest. What is on one side of the cut is multiplied first, but
  for what the gradient of a trained matrix needs: the backward pass of ``x @ A_aux @ A`` with
  ``A_aux`` frozen keeps ``x @ A_aux``, not the wider ``x``, and reaches ``x`` through the narrow
  ``A_aux @ A``.
- The gradient of a trained matrix is formed in that matrix's own shape, never in that of a product
  it is part of, so devices that share a batch exchange no more than the trained parameters.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lora_mini_jax.hardware import device

Array = jax.Array
MANY = 2**20
"""How many rows are reckoned with where `jax.export` leaves their number open."""
TURNED_FROM = 4
"""The shortest side with which `matmul` turns products round. Compiling such a product for CPUs
ends the process, by a check within XLA, where ``vmap`` makes a batch of it and a side is 2 or 3."""


@jax.custom_jvp
def through(x: Array, chain: Sequence[Array]) -> Array:
    """``x @ M_1 @ M_2 @ ... @ M_n``; a vector stands for a diagonal matrix.

    Args:
        x: ``(..., in)``.
        chain: matrices ``(in, k_1)``, ``(k_1, k_2)``, ..., ``(k_n-1, out)`` of ``x``'s dtype, with
            vectors ``(k,)`` after a matrix of as many columns; a matrix comes first.

    Returns:
        ``(..., out)``; derivatives of every order and mode are defined.

    Example:
        >>> through(jnp.ones((5, 4)), [jnp.ones((4, 2)), jnp.ones(2), jnp.ones((2, 3))])[0]
        Array([8., 8., 8.], dtype=float32)
    """
    return reduce(_cheapest, halves(chain), x)


def _through_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """The value, and its change with ``x`` and with the matrices that change."""
    (x, chain), (change, changes) = primals, tangents
    cut = len(halves(chain)[0])
    for half in (slice(None, cut), slice(cut, None)):
        x, change = _half_jvp(x, change, chain[half], changes[half])
    return x, jnp.zeros_like(x) if _still(change) else change


through.defjvp(_through_jvp, symbolic_zeros=True)


def _half_jvp(x: Array, change: Any, chain: Sequence[Array], changes: Sequence[Any]) -> Any:
    """`through`, with its change, over one side of the cut.

    What a matrix's change is multiplied by is ``value``, the input through the matrices before it,
    one by one: that is what its gradient needs. So the input goes one by one up to the last matrix
    that changes, and by the cheapest way from there; a side without one is free throughout.
    """
    moved = [] if _still(change) else [_cheapest(change, chain)]
    moving = [i for i, each in enumerate(changes) if not _still(each)]
    value = x
    for i in range(max(moving, default=-1) + 1):
        if i in moving:
            moved.append(_cheapest(_times(value, changes[i]), chain[i + 1 :]))
        if i < moving[-1]:
            value = _times(value, chain[i])
    value = _cheapest(value, chain[max(moving, default=0) :])
    return value, reduce(jnp.add, moved) if moved else change


def _still(change: Any) -> bool:
    """Whether autodiff says that something does not change."""
    return isinstance(change, SymbolicZero)


def halves(chain: Sequence[Array]) -> tuple[Sequence[Array], Sequence[Array]]:
    """The chain on either side of its narrowest place; a diagonal stays with what is before it."""
    widths = [each.shape[-1] for each in chain[:-1]]
    if not widths:
        return chain, chain[:0]
    cut = len(widths) - widths[::-1].index(min(widths))
    return chain[:cut], chain[cut:]


def _cheapest(x: Array, chain: Sequence[Array]) -> Array:
    """``x`` through the chain, one by one or all of them multiplied first."""
    matrices = [each.shape for each in chain if each.ndim == 2]
    if len(matrices) > 1:
        rows = math.prod(x.shape[:-1])
        rows = rows if isinstance(rows, int) else MANY
        n_in, n_out = matrices[0][0], matrices[-1][1]
        in_turn = rows * sum(k * m for k, m in matrices)
        at_once = n_in * sum(k * m for k, m in matrices[1:]) + rows * n_in * n_out
        if at_once < in_turn:
            chain = [reduce(_times, chain[1:], chain[0])]
    return reduce(_times, chain, x)


def matmul(x: Array, narrow: Array, **how: Any) -> Array:
    """``x @ narrow`` for a matrix (or a batch) with fewer columns than rows.

    On CPUs its gradient is formed as ``g^T x`` and turned round, not as ``x^T g``, for which XLA
    would turn round the whole of ``x``; without the barrier it sees through that. ``how`` is as for
    ``jnp.matmul``.
    """
    rows = x.shape[-2] if x.ndim > 1 else 1
    small = min(*narrow.shape[-2:], rows if isinstance(rows, int) else MANY) < TURNED_FROM
    if device().platform != "cpu" or small:
        return jnp.matmul(x, narrow, **how)
    turned = jax.lax.optimization_barrier(jnp.swapaxes(narrow, -1, -2))
    return jnp.matmul(x, jnp.swapaxes(turned, -1, -2), **how)


def _times(x: Array, each: Array) -> Array:
    """``x`` times a matrix, or times a diagonal."""
    if each.ndim == 1:
        return x * each
    return matmul(x, each) if each.shape[0] > each.shape[1] else x @ each
