"""The front door for Flax Linen: adapt any module's call, without touching the module.

`adapt` enters an ``nn.intercept_methods`` interceptor inside the call and puts each kernel's
factors beside the kernel for that call, so ``scan``, ``remat`` and ``vmap`` slice them along. A
`View` says how one call of a layer uses its kernel; layers that are not in the table below are
brought in with ``rules={MyLayer: my_rule}``.

Example:
    >>> class MyDense(nn.Module):               # a layer of your own, with its kernel in "w"
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return x @ self.param("w", nn.initializers.ones, (x.shape[-1], 4))
    >>> rules = {MyDense: lambda module, method, args: View(args[0], leaf="w")}
    >>> model, x = MyDense(), jax.numpy.ones((1, 8))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> [target.path for target in targets(model, params, x, rules=rules)]
    ['w']
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import CollectionFilter, in_filter, subtract_filters
from jax.sharding import NamedSharding, PartitionSpec

from lora_mini_jax import hardware
from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.call import beside, output, reads
from lora_mini_jax.call.lookup import check_served, rule_of, target_of, view_of, with_own
from lora_mini_jax.call.views import (
    RULES,
    Rule,
    Rules,
    View,
    dense,
    dense_general,
    einsum,
    embed,
    transposed_dense,
)
from lora_mini_jax.errors import UserError
from lora_mini_jax.tree import Target, check_leaves, flatten, unflatten

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


def targets(
    model: nn.Module,
    params: Mapping[str, Any],
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    rules: Rules | None = None,
    **kwargs: Any,
) -> tuple[Target, ...]:
    """Every kernel that this call of the model uses, and how each is a matrix.

    Traces ``model.apply({"params": params, **variables}, *inputs, **kwargs)`` without computing
    anything; arrays may be ``jax.ShapeDtypeStruct``. Nothing is guessed from shapes.

    Args:
        model: any Linen module.
        params: its parameters.
        *inputs, **kwargs: as for ``model.apply``.
        variables: other collections that the model has, such as ``batch_stats``.
        rules: layers of your own, ``{MyDense: linen.dense}``, beside the built-in ones.

    Raises:
        UserError: a kernel stacked by ``nn.scan`` or ``nn.vmap`` along another axis than 0;
            parameters that are no arrays, or boxed with their partitioning; one of your rules that
            found no kernel.

    Example:
        >>> model, x = nn.Dense(4), jax.numpy.ones((1, 8))
        >>> [t.path for t in targets(model, model.init(jax.random.key(0), x)["params"], x)]
        ['kernel']
    """
    _check_module(model)
    all_rules, this, served = with_own(RULES, rules), object(), set[type]()
    flat, found, calls = flatten(params), {}, Counter[str]()
    check_leaves(flat)

    def record(module: nn.Module, path: str, view: View) -> None:
        seen = tuple(module.get_variable("params", view.leaf).shape)
        found.setdefault(path, target_of(path, tuple(flat[path].shape), seen, view))

    def interceptor(next_call: Callable, args: tuple, kw: dict, context: Any) -> Any:
        used = view_of(context, args, kw, all_rules)
        if not used or not beside.of_layer(context.module, used[1], this):
            return next_call(*args, **kw)
        before = calls[used[0]]
        y = next_call(*args, **kw)
        if calls[used[0]] > before:  # it called its parent, which is what is adapted
            return y
        calls[used[0]] += 1
        record(context.module, *used)
        served.add(rule_of(type(context.module), all_rules)[0])
        return reads.without_kernel(y, used[1])

    def call(flat: Mapping[str, Any], variables: Any, *inputs: Any) -> Any:
        marked = beside.marked(unflatten(flat), {}, this)
        out = model.apply({**variables, "params": marked}, *inputs, **kwargs)
        # What is given back as it was is not read.
        return out if kwargs.get("mutable", False) is False else out[0]

    with nn.intercept_methods(interceptor):
        read = reads.read_by(call, flat, variables or {}, *inputs)
    check_served(rules or {}, served)
    return tuple(replace(found[path], read=path in read) for path in flat if path in found)


def adapt(
    model: nn.Module,
    rules: Rules | None = None,
    *,
    whole: bool = True,
    rows: NamedSharding | None = None,
) -> Callable[..., Any]:
    """The model's ``apply`` with an adapter: ``apply(params, adapter, *inputs, **kwargs)``.

    Computes ``x @ W + delta(x)`` in each adapted layer: thin products, never a dense update. Pure:
    use it inside your own ``jit``, ``grad`` or ``vmap``, with ``params`` as an argument.

    Args:
        model: any Linen module, unchanged.
        rules: layers of your own, as for `targets`.
        whole: whether every call has to use every adapted kernel, so that one that is never used
            does not go unseen. False for calls that use a part of the model, such as a decoder's
            step without its encoder; kernels of one method that depend on each other still do.
        rows: how the inputs' rows are split on a mesh, from ``sharding.of_batch``. What every
            module gives out then stays split so, and kernels are gathered; left to itself, XLA may
            follow the kernels, hold all rows on every device and add up whole activations.

    Returns:
        ``apply(params, adapter, *inputs, variables=None, dropout_key=None, **kwargs)``;
        ``variables`` holds other collections (``batch_stats``); a ``dropout_key`` turns on the
        dropout of methods that have one, every kernel and stacked layer with its own stream;
        ``kwargs`` go to ``model.apply`` (``rngs``, ``mutable``; a ``mutable`` that takes in
        ``params`` gives them back as they were given).

    Raises:
        UserError: from ``apply``: an adapted kernel that the call never used, where ``whole``, or
            that ``params`` does not have.

    Example:
        >>> from lora_mini_jax import LoRA, init
        >>> model, x = nn.Dense(4), jax.numpy.ones((1, 8))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> adapter = init(params, LoRA(rank=2), targets(model, params, x))
        >>> adapt(model)(params, adapter, x).shape
        (1, 4)
    """
    _check_module(model)
    all_rules = with_own(RULES, rules)

    def apply(
        params: Mapping[str, Any],
        adapter: Adapter,
        *inputs: Any,
        variables: Mapping[str, Any] | None = None,
        dropout_key: Array | None = None,
        mutable: CollectionFilter = False,
        **kwargs: Any,
    ) -> Any:
        sites = beside.called_sites(adapter)
        used, this = Counter[str](), object()
        arrays = (leaf for leaf in jax.tree.leaves((inputs, kwargs)) if getattr(leaf, "ndim", 0))
        number = next(arrays).shape[0] if rows else 0

        def interceptor(next_call: Callable, args: tuple, kw: dict, context: Any) -> Any:
            y = adapted(next_call, args, kw, context)
            return _split(y, rows, number) if rows else y

        def adapted(next_call: Callable, args: tuple, kw: dict, context: Any) -> Any:
            call = view_of(context, args, kw, all_rules)
            if call is None or call[0] not in sites:
                return next_call(*args, **kw)
            path, view = call
            layer = beside.of_layer(context.module, view, this)
            if layer is None:
                return next_call(*args, **kw)
            before, (kernel, own) = used[path], layer
            given = context.module, sites[path], view, own, partial(used.update, [path])
            with output.multiplying(*given):
                y = next_call(*args, **kw)
            if used[path] > before:
                return y  # in one product; or a subclass called its parent, which was adapted
            used[path] += 1
            return output.with_delta(y, sites[path], view, kernel, own, before)

        joined = beside.marked(*beside.prepared(params, adapter, dropout_key), this)
        with hardware.on_mesh(rows), nn.intercept_methods(interceptor):
            given = {**(variables or {}), "params": joined}
            if in_filter(mutable, "params"):  # what stands beside them is not to come out
                changing = subtract_filters(mutable, "params")
                y, changed = model.apply(given, *inputs, mutable=changing, **kwargs)
                out = y, {**changed, "params": params}
            else:
                out = model.apply(given, *inputs, mutable=mutable, **kwargs)
        if whole:
            beside.check_used(sites, used)
        return out

    return apply


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"a {type(model).__name__} is no Linen module: give one; for an NNX module "
                        "take lora_mini_jax.nnx")  # fmt: skip


def _split(outputs: Any, rows: NamedSharding, number: int) -> Any:
    """The arrays among a module's outputs that have this number of rows, split by rows."""

    def split(leaf: Any) -> Any:
        if getattr(leaf, "ndim", 0) < 2 or leaf.shape[0] != number:
            return leaf
        free = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        where = NamedSharding(rows.mesh, PartitionSpec(rows.spec[0], *free))
        return jax.lax.with_sharding_constraint(leaf, where)

    return jax.tree.map(split, outputs)
