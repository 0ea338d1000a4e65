"""Which kernels a model also reads itself, past the layers whose calls an adapter adds to.

A model may take a table from its variables, ``x @ embed.embedding.T``, where nobody sees that it is
a product. An adapter of that table would be in the lookup alone, and merging it would be another
function. So while targets are found every known layer gives something that depends on its input
and not on its kernel; what the model's result still depends on, it reads elsewhere.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from lora_mini_jax.call.views import View
from lora_mini_jax.tree import traced


def without_kernel(y: jax.Array, view: View) -> jax.Array:
    """Something in the place of a layer's output: as if the kernel were not in it."""
    return jnp.zeros(y.shape, y.dtype) + view.inputs.sum().astype(y.dtype)


def read_by(function: Callable[..., Any], params: Mapping[str, Any], *args: Any) -> set[str]:
    """Trace ``function(params, *args)``, and tell which parameters its result depends on.

    Args:
        function: as for `traced`.
        params: parameters, or their shapes, by path.
        *args: what else it takes.

    Returns:
        The paths of those. What a ``while_loop`` alone takes is not among them: whether it uses
        that is not known.

    Example:
        >>> sorted(read_by(lambda p: p["a"] + 0 * p["b"].sum(), {"a": jnp.ones(2), "b": jnp.ones(3),
        ...                                                      "c": jnp.ones(4)}))
        ['a', 'b']
    """
    program = traced(function, params, *args, by=lambda call, leaves: jax.make_jaxpr(call)(leaves))
    live, _ = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars), instantiate=True)
    steps = [eqn.invars for eqn in live.eqns if eqn.primitive.name != "while"]
    used = {id(var) for vars in (live.outvars, *steps) for var in vars}
    # JAX flattens a dict in the order of its keys; a quantised kernel is several arrays.
    names = [path for path in sorted(params) for _ in jax.tree.leaves(params[path])]
    return {path for path, var in zip(names, live.invars, strict=False) if id(var) in used}
