"""Exact counts of a traced program's matrix products."""

import math
from typing import Any

import jax

from lora_mini_jax.hardware import has_kernels, without_kernels


def step_flops(step: Any, traced: Any, *args: Any) -> int:
    """`dot_flops` of a jitted function, as on any device: a device's kernels hide their products.

    Args:
        step: the jitted function.
        traced: ``step.trace(*args)``, which is enough where there are no kernels.
        args: what it was traced with.
    """
    if not has_kernels():
        return dot_flops(traced.jaxpr)
    with without_kernels():  # a function of its own: JAX remembers how it traced the step
        return dot_flops(jax.make_jaxpr(lambda *args: step.__wrapped__(*args))(*args))


def dot_flops(jaxpr: Any) -> int:
    """Multiplications and additions in the matrix products of a jaxpr and of those it calls.

    A scan counts as often as it runs, a conditional as its costliest branch; element-wise work and
    convolutions are not counted. A product in a while loop, whose turns cannot be known, is a
    ValueError.

    Example:
        >>> x = jax.numpy.ones((2, 3))
        >>> dot_flops(jax.make_jaxpr(lambda x: x @ x.T)(x))
        24
    """
    total = 0
    for eqn in jaxpr.eqns:
        leaves = jax.tree.leaves(eqn.params, is_leaf=lambda leaf: hasattr(leaf, "eqns"))
        inner = [dot_flops(leaf) for leaf in leaves if hasattr(leaf, "eqns")]
        match eqn.primitive.name:
            case "dot_general":
                contracted = eqn.params["dimension_numbers"][0][0]
                depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
                total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
            case "scan":
                total += eqn.params["length"] * sum(inner)
            case "cond":
                total += max(inner)
            case "while" if any(inner):
                raise ValueError("a matrix product in a while loop cannot be counted")
            case _:
                total += sum(inner)
    return total
