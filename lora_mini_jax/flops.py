"""Exact counts of a traced program's matrix products."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def dots(jaxpr: Any, times: int = 1) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Every ``dot_general`` in a jaxpr and the programs inside it, a scan's body with its length.

    Yields:
        ``(shape of the result, FLOPs of one product, how often it runs)``; a product of
        ``(n, k)`` and ``(k, m)`` is ``2 n k m`` FLOPs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.ones((2, 3))
        >>> list(dots(jax.make_jaxpr(lambda x: x @ x.T)(x)))
        [((2, 2), 24, 1)]
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for equation in inner.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.outvars[0].aval.shape
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            yield shape, 2 * math.prod(shape) * depth, times
        runs = (
            times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        )
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, ClosedJaxpr | Jaxpr):
                    yield from dots(part, runs)


def dot_flops(jaxpr: Any) -> int:
    """FLOPs of all products of a jaxpr."""
    return sum(flops * times for _, flops, times in dots(jaxpr))
