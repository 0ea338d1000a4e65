"""Which kernels a model also reads itself, past the layers whose calls an adapter adds to.

A model may take a table from its variables, ``x @ embed.embedding.T``, where nobody sees that it is
a product. An adapter of that table would be in the lookup alone, and merging it would be another
function. So while targets are found every known layer gives something that depends on its input
and not on its kernel; what the model's result still depends on, it reads elsewhere.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.call.views import View
from lora_mini_jax.tree import traced


def without_kernel(y: Any, view: View) -> Any:
    """Something in the place of a layer's output: as if the kernel were not in it."""
    given = view.inputs.sum()
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf) + given.astype(leaf.dtype), y)


def read_by(function: Callable[..., Any], params: Mapping[str, Any], *args: Any) -> set[str]:
    """Trace ``function(params, *args)``, and tell which parameters its result depends on.

    Args:
        function: as for `traced`.
        params: parameters, or their shapes, by path.
        *args: what else it takes.

    Returns:
        The paths of those.

    Example:
        >>> sorted(read_by(lambda p: p["a"] + 0 * p["b"].sum(), {"a": jnp.ones(2), "b": jnp.ones(3),
        ...                                                      "c": jnp.ones(4)}))
        ['a', 'b']
    """
    program = traced(function, params, *args, by=lambda call, leaves: jax.make_jaxpr(call)(leaves))
    used = _used(program, [True] * len(program.jaxpr.outvars))
    # JAX flattens a dict in the order of its keys; a quantised kernel is several arrays, and what
    # is no array is not traced.
    names = [path for path in sorted(params) for leaf in jax.tree.leaves(params[path])
             if hasattr(leaf, "shape")]  # fmt: skip
    return {path for path, one in zip(names, used, strict=False) if one}


def _used(program: Any, outputs: Sequence[bool]) -> list[bool]:
    """Which inputs of a jaxpr these outputs depend on. What is done for its effect, as to print, is
    of no account."""
    jaxpr = getattr(program, "jaxpr", program)
    live = {id(var) for var, used in zip(jaxpr.outvars, outputs, strict=True) if used}
    for step in reversed(jaxpr.eqns):
        wanted = [id(var) in live for var in step.outvars]
        if any(wanted):
            needed = zip(step.invars, _needed(step, wanted), strict=True)
            live |= {id(var) for var, used in needed if used}
    return [id(var) in live for var in jaxpr.invars]


def _needed(step: Any, wanted: list[bool]) -> list[bool]:
    """Which inputs of a step these outputs of it depend on."""
    given, kind = step.params, step.primitive.name
    if kind == "scan":
        consts, carried = given["num_consts"], given["num_carry"]
        ys = wanted[carried:]
        carry, ins = _turned(
            lambda carry: _used(given["jaxpr"], [*carry, *ys]), wanted[:carried], consts
        )
        return [*ins[:consts], *carry, *ins[consts + carried :]]
    if kind == "while":
        first, consts = given["cond_nconsts"], given["body_nconsts"]
        asked = _used(given["cond_jaxpr"], [True])
        carry = [a or b for a, b in zip(wanted, asked[first:], strict=True)]
        carry, ins = _turned(lambda carry: _used(given["body_jaxpr"], carry), carry, consts)
        return [*asked[:first], *ins[:consts], *carry]
    if kind == "cond":
        each = [_used(branch, wanted) for branch in given["branches"]]
        return [True, *(any(ways) for ways in zip(*each, strict=True))]
    for name in ("jaxpr", "call_jaxpr"):  # a function within: jit, remat, custom derivatives
        inner = getattr(given.get(name), "jaxpr", given.get(name))
        if inner is not None and len(inner.invars) == len(step.invars):
            return _used(inner, wanted)
    return [True] * len(step.invars)


def _turned(
    body: Callable[[list[bool]], list[bool]], carry: list[bool], consts: int
) -> tuple[list[bool], list[bool]]:
    """What is carried round a loop and matters in any turn, and which inputs of the body do."""
    while True:
        ins = body(carry)
        more = [a or b for a, b in zip(carry, ins[consts:], strict=False)]
        if more == carry:
            return carry, ins
        carry = more
