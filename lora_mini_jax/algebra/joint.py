"""``x @ W`` and a chain of thin matrices beside it as one product, where a device has a kernel for
it: the output is written once, and so is the gradient in ``x``.

Value and gradients are those of ``x @ W + through(x, chain)``. `multiplied` returns None where the
caller has to compute these two products itself: on any device but a Hopper GPU, in float32, for
shapes that do not fill the kernel's tiles, and unless the joint product was asked for
(`hardware.takes_joint_products`).
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from lora_mini_jax.algebra.hopper import fits, product_plus_thin, wide
from lora_mini_jax.algebra.products import halves, through
from lora_mini_jax.hardware import multiprocessors, takes_joint_products

Array = jax.Array
KEPT = "joint_product"
"""What the output is called where a policy of `jax.checkpoint` chooses what is kept."""
Chain = Sequence[Any]


def multiplied(x: Array, kernel: Array, chain: Sequence[Array]) -> Array | None:
    """``x @ kernel + through(x, chain)`` in one product; None where two are needed.

    Args:
        x: ``(..., in)``.
        kernel: ``(in, out)`` of ``x``'s dtype.
        chain: as for `through`, of any dtype.

    Returns:
        ``(..., out)``; derivatives are those of reverse mode alone.
    """
    left, right = halves([each.astype(x.dtype) for each in chain])
    rank = right[0].shape[0]
    rows = x.reshape(-1, x.shape[-1])
    whole = fits(*rows.shape, kernel.shape[1], rank, x.dtype)
    if not whole or x.dtype != kernel.dtype or not takes_joint_products():
        return None
    y = _joint(rows, kernel, *_widened(left, right, wide(rank) - rank))
    return checkpoint_name(y.reshape(*x.shape[:-1], -1), KEPT)


@jax.custom_vjp
def _joint(x: Array, kernel: Array, left: Chain, right: Chain) -> Array:
    """The chain comes as what narrows ``x`` and what widens it again."""
    return _sum(x, kernel, through(x, left), _product(right))


def _forward(x: Any, kernel: Any, left: Any, right: Any) -> tuple[Array, Any]:
    """The value, and what the backward pass needs: ``x`` itself only for a trained kernel, or for
    a trained matrix that ``x`` meets first."""
    moving, still = _apart(left)
    h, narrowed = jax.vjp(lambda moving: through(x.value, _filled(moving, still)), moving)
    y = _sum(x.value, kernel.value, h, _product(_filled(*_apart(right))))
    kept = x.value if kernel.perturbed else None
    return y, (kept, kernel.value, h, narrowed, _filled(moving, still), _apart(right))


def _backward(kept: Any, g: Any) -> tuple[Any, ...]:
    """The gradients in all that is trained: ``x``'s in one product too."""
    x, kernel, h, narrowed, left, (moving, still) = kept
    if isinstance(g, SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    _, widened = jax.vjp(lambda h, moving: through(h, _filled(moving, still)), h, moving)
    into_h, of_right = widened(g)
    (of_left,) = narrowed(into_h)
    into_x = _sum(g, kernel, into_h, _product(left), turned=True)
    return into_x, None if x is None else x.T @ g, of_left, of_right


_joint.defvjp(_forward, _backward, symbolic_zeros=True)


def _sum(x: Array, w: Array, h: Array, b: Array, turned: bool = False) -> Array:
    return product_plus_thin(x, w, h, b, turned=turned, blocks=multiprocessors())


def _product(matrices: Sequence[Array]) -> Array:
    """Of one side of the chain; a vector stands for a diagonal matrix."""
    first, *rest = matrices
    return reduce(lambda a, b: a * b if b.ndim == 1 else a @ b, rest, first)


def _widened(left: Chain, right: Chain, more: int) -> tuple[Chain, Chain]:
    """Both sides with so many more zero columns and rows where they meet: a kernel's rank."""
    last = max(i for i, each in enumerate(left) if each.ndim == 2)
    ends = [jnp.pad(each, [(0, 0)] * (each.ndim - 1) + [(0, more)]) for each in left[last:]]
    return [*left[:last], *ends], [jnp.pad(right[0], ((0, more), (0, 0))), *right[1:]]


def _apart(chain: Sequence[Any]) -> tuple[Chain, Chain]:
    """What is differentiated in, and all else; each with None in the other's places."""
    moving = [each.value if each.perturbed else None for each in chain]
    return moving, [None if each.perturbed else each.value for each in chain]


def _filled(moving: Chain, still: Chain) -> list[Array]:
    """The inverse of `_apart`."""
    pairs = zip(moving, still, strict=True)
    return [still if moving is None else moving for moving, still in pairs]
