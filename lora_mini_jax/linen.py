"""The front door for Flax Linen: adapt any module's call, without touching the module.

`adapt` enters an ``nn.intercept_methods`` interceptor inside the call and puts each kernel's
factors beside the kernel for that call, so ``scan``, ``remat`` and ``vmap`` slice them along. A
`View` says how one call of a layer uses its kernel; layers that are not in the table below are
brought in with ``rules={MyLayer: my_rule}``.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.adapter import Adapter, as_key, fold_path
from lora_mini_jax.errors import UserError
from lora_mini_jax.plan import Site
from lora_mini_jax.tree import Target, check_fit, flatten, listing, over_lead, unflatten
from lora_mini_jax.views import (
    RULES,
    Rule,
    Rules,
    View,
    dense,
    dense_general,
    einsum,
    embed,
    transposed_dense,
    view_of,
)

__all__ = [
    "Rule",
    "View",
    "adapt",
    "dense",
    "dense_general",
    "einsum",
    "embed",
    "targets",
    "transposed_dense",
]

Array = jax.Array
SUFFIX = "_factors"
DROPOUT = "dropout_key"


def targets(
    model: nn.Module,
    params: Mapping[str, Any],
    *inputs: Any,
    rules: Rules | None = None,
    **kwargs: Any,
) -> tuple[Target, ...]:
    """Every kernel that this call of the model uses, and how each is a matrix.

    Traces ``model.apply({"params": params}, *inputs, **kwargs)`` without computing anything; arrays
    may be ``jax.ShapeDtypeStruct``. Nothing is guessed from shapes.

    Args:
        model: any Linen module.
        params: its parameters.
        *inputs, **kwargs: as for ``model.apply``.
        rules: layers of your own, ``{MyDense: linen.dense}``, beside the built-in ones.

    Raises:
        UserError: a kernel stacked by ``nn.scan`` or ``nn.vmap`` along another axis than 0, or
            parameters that are boxed with their partitioning.

    Example:
        >>> model, x = nn.Dense(4), jax.numpy.ones((1, 8))
        >>> [t.path for t in targets(model, model.init(jax.random.key(0), x)["params"], x)]
        ['kernel']
    """
    flat, found = flatten(params), {}
    if boxed := [path for path, leaf in flat.items() if not hasattr(leaf, "shape")]:
        raise UserError(
            f"{boxed[0]} is a {type(flat[boxed[0]]).__name__}, not an array: unbox the parameters "
            "first, flax.linen.meta.unbox(params)"
        )

    def record(module: nn.Module, path: str, view: View) -> None:
        shape = tuple(flat[path].shape)
        seen = tuple(module.get_variable("params", view.leaf).shape)
        stack = len(shape) - len(seen)
        if shape[stack:] != seen:
            raise UserError(
                f"{path} {shape} is used as {seen}: only kernels stacked along axis 0 can be "
                "adapted; use variable_axes={'params': 0}"
            )
        target = Target(path, shape, stack, view.batch, view.ins, view.outs, view.kind)
        found.setdefault(path, target)

    def interceptor(next_call: Callable, args: tuple, kw: dict, context: Any) -> Any:
        call = view_of(context, args, kw, all_rules)
        if call and call[0] in flat:
            record(context.module, *call)
        return next_call(*args, **kw)

    all_rules = {**RULES, **(rules or {})}
    with nn.intercept_methods(interceptor):
        jax.eval_shape(
            lambda p, *x: model.apply({"params": _marked(p, {})}, *x, **kwargs), params, *inputs
        )
    return tuple(found[path] for path in flat if path in found)


def adapt(model: nn.Module, rules: Rules | None = None) -> Callable[..., Any]:
    """The model's ``apply`` with an adapter: ``apply(params, adapter, *inputs, **kwargs)``.

    Computes ``x @ W + delta(x)`` in each adapted layer: thin products, never a dense update. Pure:
    use it inside your own ``jit``, ``grad`` or ``vmap``, with ``params`` as an argument.

    Args:
        model: any Linen module, unchanged.
        rules: layers of your own, as for `targets`.

    Returns:
        ``apply(params, adapter, *inputs, variables=None, dropout_key=None, **kwargs)``;
        ``variables`` holds other collections (``batch_stats``); a ``dropout_key`` turns on the
        dropout of methods that have one, every kernel and stacked layer with its own stream;
        ``kwargs`` go to ``model.apply`` (``rngs``, ``mutable``).

    Raises:
        UserError: from ``apply``: an adapted kernel that the call never used, or that ``params``
            does not have.

    Example:
        >>> from lora_mini_jax import LoRA, init
        >>> model, x = nn.Dense(4), jax.numpy.ones((1, 8))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> adapter = init(params, LoRA(rank=2), targets(model, params, x))
        >>> adapt(model)(params, adapter, x).shape
        (1, 4)
    """
    all_rules = {**RULES, **(rules or {})}

    def apply(
        params: Mapping[str, Any],
        adapter: Adapter,
        *inputs: Any,
        variables: Mapping[str, Any] | None = None,
        dropout_key: Array | None = None,
        **kwargs: Any,
    ) -> Any:
        sites = {s.target.path: s for s in adapter.sites if s.target.kind != "array"}
        used: Counter[str] = Counter()

        def interceptor(next_call: Callable, args: tuple, kw: dict, context: Any) -> Any:
            call = view_of(context, args, kw, all_rules)
            if call is None or call[0] not in sites:
                return next_call(*args, **kw)
            path, view = call
            before = used[path]
            y = next_call(*args, **kw)
            if used[path] > before:
                return y  # a subclass that called its parent: the parent's call was adapted
            used[path] += 1
            return y + _delta(context.module, sites[path], view, y.dtype, before)

        check_fit(params, [site.target for site in adapter.sites])
        factors = _used(adapter)
        shifted = _shifted(params, adapter, factors)
        beside = {path: factors[path] | _dropout(site, dropout_key) for path, site in sites.items()}
        with nn.intercept_methods(interceptor):
            marked = {**(variables or {}), "params": _marked(shifted, beside)}
            out = model.apply(marked, *inputs, **kwargs)
        if len(used) < len(sites):
            unused = [site.target for path, site in sites.items() if path not in used]
            raise UserError(
                f"this call used {len(used)} of {len(sites)} adapted kernels; never used: "
                f"{listing(unused)}. Adapt only kernels that linen.targets lists for this call"
            )
        return out

    return apply


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


def _marked(params: Mapping[str, Any], factors: Mapping[str, dict[str, Array]]) -> dict[str, Any]:
    """The parameters with a `_Beside` next to each."""
    flat, call = flatten(params), object()
    beside = {path + SUFFIX: _Beside(factors.get(path, {}), path, call) for path in flat}
    return unflatten({**flat, **beside})


def _used(adapter: Adapter) -> dict[str, dict[str, Array]]:
    """The factors without those that only training needs: they need not ride through a scan."""
    found = adapter.factors()
    for site in adapter.sites:
        own = found[site.target.path]
        found[site.target.path] = {n: x for n, x in own.items() if n not in site.method.scratch}
    return found


def _shifted(params: Mapping[str, Any], adapter: Adapter, factors: Any) -> dict[str, Any]:
    """The parameters with every dense update added, in the parameters' own dtypes."""
    flat = flatten(params)
    for site in adapter.sites:
        path = site.target.path
        shift = site.method.shift(factors[path])
        if shift is not None:
            flat[path] = (flat[path] + site.target.unmatrix(shift)).astype(flat[path].dtype)
    return unflatten(flat)


def _dropout(site: Site, key: Array | None) -> dict[str, Array]:
    """The random stream of one kernel's dropout, a key for every stacked layer; data of keys, so
    that ``scan`` and ``vmap`` can slice it like any other leaf."""
    if key is None or not site.method.dropout:
        return {}
    own = fold_path(as_key(key), site.target.path)
    stack = site.target.shape[: site.target.stack]
    return {DROPOUT: jax.random.key_data(jax.random.split(own, stack) if stack else own)}


def _dropped(x: Array, rate: float, key: Array) -> Array:
    """``x`` with a share of its entries zeroed and the others scaled up by as much."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _delta(module: nn.Module, site: Site, view: View, dtype: Any, call: int) -> Array:
    """The adapter's contribution to the ``call``-th call of a layer, in the shape and dtype of the
    layer's output. Rows that are looked up know no dropout, as in PEFT."""
    factors = dict(module.get_variable("params", view.leaf + SUFFIX).factors)
    stream = factors.pop(DROPOUT, None)
    inner = replace(site.target, shape=site.target.shape[site.target.stack :], stack=0)
    kernel = inner.matrix(module.get_variable("params", view.leaf))
    if view.use == "rows":
        return site.method.rows(view.inputs, kernel, factors).astype(dtype)
    x, delta = view.inputs.astype(dtype), site.method.delta
    if stream is not None:
        x = _dropped(x, site.method.dropout, jax.random.fold_in(as_key(stream), call))
    if view.use == "transposed":
        thing = jax.ShapeDtypeStruct((*x.shape[:-1], inner.n_in), dtype)
        transpose = jax.linear_transpose(lambda rows: delta(rows, kernel, factors), thing)
        return view.outputs(transpose(x)[0])
    lead = len(view.batch)
    return view.outputs(over_lead(delta, lead)(x, kernel, factors)).astype(dtype)
