"""What an adapter adds to the output of a layer."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.algebra.draws import as_key
from lora_mini_jax.algebra.joint import multiplied
from lora_mini_jax.call.beside import DROPOUT
from lora_mini_jax.call.views import View
from lora_mini_jax.hardware import device, takes_joint_products
from lora_mini_jax.tree import over_lead

Array = jax.Array


@contextmanager
def multiplying(
    module: Any, site: Site, view: View, factors: Mapping[str, Array], done: Callable[[], None]
) -> Generator[None]:
    """Let a layer multiply by its kernel and the adapter at once, where the device, the method and
    the shapes allow it; ``done`` is called when it did. All else of the layer is its own: its
    dtypes, its bias."""
    matrix = view.use == "product" and (view.batch, view.ins, view.outs) == ((), (0,), (1,))
    free = all(getattr(module, name, 0) is None for name in ("dot_general", "dot_general_cls"))
    chain = None
    if matrix and free and DROPOUT not in factors and takes_joint_products():
        chain = site.method.joint(dict(factors), site.target.n_in, site.target.n_out)
    if chain is None:
        yield
        return

    def dot_general(x: Array, kernel: Array, dims: Any, *args: Any, **kw: Any) -> Array:
        y = multiplied(x, kernel, chain) if dims == (((x.ndim - 1,), (0,)), ((), ())) else None
        if y is None:
            return jax.lax.dot_general(x, kernel, dims, *args, **kw)
        done()
        return y

    object.__setattr__(module, "dot_general", dot_general)  # past Flax's guard of its attributes
    try:
        yield
    finally:
        object.__setattr__(module, "dot_general", None)


def with_delta(
    y: Array, site: Site, view: View, kernel: Array, factors: Mapping[str, Array], call: int
) -> Array:
    """The output of the ``call``-th call of a layer with the adapter's contribution; kernel and
    factors are the layer's own, without stacked axes. Rows that are looked up know no dropout, as
    in PEFT."""
    total = _adapted(y, site, view, kernel, dict(factors), call)
    return _one_array(total) if device().platform == "cpu" else total


@jax.custom_jvp
def _one_array(total: Array) -> Array:
    """The sum; and where a gradient is taken, as one array that the backward pass reads.

    XLA for CPUs repeats a cheap sum wherever it is used, and so keeps both terms until the last of
    these places. It repeats nothing that comes out of a conditional; and which branch is taken it
    cannot see behind the barrier, nor does it look again once the barrier is gone.
    """
    return total


@_one_array.defjvp
def _one_array_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    never = jax.lax.optimization_barrier(jnp.zeros((), bool))
    return jax.lax.cond(never, jnp.negative, lambda total: total, *primals), *tangents


def _adapted(
    y: Array, site: Site, view: View, kernel: Array, factors: dict[str, Array], call: int
) -> Array:
    stream = factors.pop(DROPOUT, None)
    inner = replace(site.target, shape=site.target.shape[site.target.stack :], stack=0)
    method, kernel, x = site.method, inner.matrix(kernel), view.inputs
    if view.use == "rows":
        ids = x.astype(jnp.int32)
        ids = jnp.where(ids < 0, ids + inner.n_in, ids)  # counted from the end, as arrays have it
        return y + method.rows(ids, kernel, factors).astype(y.dtype)
    x = x.astype(y.dtype)
    if stream is not None:
        x = _dropped(x, method.dropout, jax.random.fold_in(as_key(stream), call))
    if view.use == "transposed":
        thing = jax.ShapeDtypeStruct((*x.shape[:-1], inner.n_in), y.dtype)
        transpose = jax.linear_transpose(lambda x: method.delta(x, kernel, factors), thing)
        return y + view.outputs(transpose(x)[0])
    lead = len(view.batch)
    if view.plain and stream is None:

        def product() -> Array:
            own = y if view.bias is None else y - view.bias.astype(y.dtype)
            return own.reshape(-1, inner.n_out)

        delta = method.delta_beside(product, _rows(x), kernel, factors)
    else:
        delta = over_lead(method.delta, lead)(_rows(x, lead), kernel, factors)
    return y + view.outputs(delta.reshape(*x.shape[:-1], delta.shape[-1])).astype(y.dtype)


def _rows(x: Array, lead: int = 0) -> Array:
    """As one matrix of rows, after so many axes: XLA turns whole activations round where a gradient
    sums over two."""
    return x.reshape(*x.shape[:lead], -1, x.shape[-1])


def _dropped(x: Array, rate: float, key: Array) -> Array:
    """``x`` with a share of its entries zeroed and the others scaled up by as much."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
