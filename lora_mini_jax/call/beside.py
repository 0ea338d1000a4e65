"""What stands beside the kernels for the length of one call, and what it adds to a layer's output.

The factors of a kernel are put next to it in the parameters, so that ``scan``, ``remat`` and
``vmap`` slice them along; a dense update is added to the kernel itself.
"""

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.adapters.adapter import Adapter, check_adapter
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.algebra.draws import as_key, fold_path, split_key
from lora_mini_jax.algebra.joint import multiplied
from lora_mini_jax.call.views import View
from lora_mini_jax.errors import UserError
from lora_mini_jax.hardware import device, takes_joint_products
from lora_mini_jax.selection import listing
from lora_mini_jax.tree import check_fit, dense, flatten, over_lead, unflatten

Array = jax.Array
SUFFIX = "_factors"
DROPOUT = "dropout_key"


@partial(jax.tree_util.register_dataclass, data_fields=("factors",), meta_fields=("path", "call"))
@dataclass(frozen=True)
class _Beside:
    """What stands beside a parameter for the length of a call: its factors, perhaps none.

    ``path`` and ``call`` are part of the tree's structure, and so of the key under which ``nn.jit``
    keeps a traced layer. Without them a layer traced in another call, or at another place in the
    model, would be taken from there, un-adapted or with another place's adapter.
    """

    factors: dict[str, Array]
    path: str
    call: object


def marked(
    params: Mapping[str, Any], factors: Mapping[str, dict[str, Array]], call: object
) -> dict[str, Any]:
    """The parameters with a `_Beside` next to each, for the call that this object stands for."""
    flat = flatten(params)
    beside = {path + SUFFIX: _Beside(factors.get(path, {}), path, call) for path in flat}
    return unflatten({**flat, **beside})


def of_layer(module: Any, view: View, call: object) -> tuple[Array, Mapping[str, Array]] | None:
    """The kernel of a Linen layer in a call with `marked` parameters, and its factors; None in
    another model, applied in the midst of the call with parameters of its own."""
    beside = module.get_variable("params", view.leaf + SUFFIX)
    if not isinstance(beside, _Beside) or beside.call is not call:
        return None
    return dense(module.get_variable("params", view.leaf)), beside.factors


def prepared(
    params: Mapping[str, Any], adapter: Adapter, dropout_key: Array | None
) -> tuple[dict[str, Any], dict[str, dict[str, Array]]]:
    """The parameters as one call uses them, dense updates added, and every kernel's factors."""
    check_fit(params, [site.target for site in adapter.sites])
    factors = _used(adapter)
    own = {path: factors[path] | _dropout(site, dropout_key)
           for path, site in called_sites(adapter).items()}  # fmt: skip
    return _shifted(params, adapter, factors), own


def called_sites(adapter: Adapter) -> dict[str, Site]:
    """The sites that a layer's call adds something to, by path; an array is only replaced."""
    check_adapter(adapter)
    return {site.target.path: site for site in adapter.sites if site.target.kind != "array"}


def check_used(sites: Mapping[str, Site], used: Collection[str]) -> None:
    """Raise `UserError` unless the call used every adapted kernel."""
    if len(used) < len(sites):
        unused = [site.target for path, site in sites.items() if path not in used]
        raise UserError(
            f"this call used {len(used)} of {len(sites)} adapted kernels; never used: "
            f"{listing(unused)}. Adapt only kernels that targets() lists for this call"
        )


def _used(adapter: Adapter) -> dict[str, dict[str, Array]]:
    """The factors without those that only training needs: they need not ride through a scan."""
    return adapter.without_scratch(adapter.factors())


def _shifted(params: Mapping[str, Any], adapter: Adapter, factors: Any) -> dict[str, Any]:
    """The parameters with every dense update added, in the parameters' own dtypes."""
    flat = flatten(params)
    for site in adapter.sites:
        path = site.target.path
        shift = site.method.shift(factors[path])
        if shift is not None:
            flat[path] = (dense(flat[path]) + site.target.unmatrix(shift)).astype(flat[path].dtype)
    return unflatten(flat)


def _dropout(site: Site, key: Array | None) -> dict[str, Array]:
    """The random stream of one kernel's dropout, a key for every stacked layer; data of keys, so
    that ``scan`` and ``vmap`` can slice it like any other leaf."""
    if key is None or not site.method.dropout:
        return {}
    own = fold_path(as_key(key), site.target.path)
    stack = site.target.shape[: site.target.stack]
    return {DROPOUT: jax.random.key_data(split_key(own, stack))}


def _dropped(x: Array, rate: float, key: Array) -> Array:
    """``x`` with a share of its entries zeroed and the others scaled up by as much."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


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
        product = y if view.bias is None else y - view.bias.astype(y.dtype)
        product = product.reshape(-1, inner.n_out)
        delta = method.delta_beside(product, _rows(x), kernel, factors)
    else:
        delta = over_lead(method.delta, lead)(_rows(x, lead), kernel, factors)
    return y + view.outputs(delta.reshape(*x.shape[:-1], delta.shape[-1])).astype(y.dtype)


def _rows(x: Array, lead: int = 0) -> Array:
    """As one matrix of rows, after so many axes: XLA turns whole activations round where a gradient
    sums over two."""
    return x.reshape(*x.shape[:lead], -1, x.shape[-1])
