"""The front door for Flax Linen: adapt any module's call, without touching the module.

`adapt` enters an ``nn.intercept_methods`` interceptor inside the call and puts each kernel's
factors beside the kernel for that call, so ``scan``, ``remat`` and ``vmap`` slice them along. A
`View` says how one call of a layer uses its kernel; layers that are not in the table below are
brought in with ``rules={MyLayer: my_rule}``.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.adapter import SUFFIX, Adapter, Site, check_kernels
from lora_mini_jax.errors import UserError
from lora_mini_jax.tree import Target, flatten, listing, over_lead, unflatten

Array = jax.Array


@dataclass(frozen=True)
class View:
    """How one call of a layer uses its kernel, as a matrix product.

    Attributes:
        inputs: the input with its contracted axes flattened into the last, ``(*batch, ..., in)``;
            for ``use="rows"`` the integer ids.
        outputs: puts ``(*batch, ..., out)`` into the shape of the layer's own output.
        batch, ins, outs: the kernel's axes, as in `Target`.
        leaf: the parameter's name.
        use: ``"product"`` for ``x @ W``, ``"transposed"`` for ``x @ W.T``, ``"rows"`` for ``W[x]``.
        kind: what `Target.kind` becomes.
    """

    inputs: Array
    outputs: Callable[[Array], Array] = lambda y: y
    batch: tuple[int, ...] = ()
    ins: tuple[int, ...] = (0,)
    outs: tuple[int, ...] = (1,)
    leaf: str = "kernel"
    use: str = "product"
    kind: str = "linear"


Rule = Callable[[nn.Module, str, tuple], View | None]
"""``rule(module, method_name, args)``: the view of this call, or None to leave it alone."""


def dense(module: nn.Module, method: str, args: tuple) -> View | None:
    """The rule of ``nn.Dense``: kernel ``(in, out)``."""
    return View(args[0]) if method == "__call__" else None


def transposed_dense(module: nn.Module, method: str, args: tuple) -> View | None:
    """The rule of a layer that stores ``(out, in)``, as GPT-2's Conv1D in transformers does."""
    return View(args[0], ins=(1,), outs=(0,)) if method == "__call__" else None


def dense_general(module: Any, method: str, args: tuple) -> View | None:
    """The rule of ``nn.DenseGeneral``: kernel ``(*batch, *in, *features)``."""
    if method != "__call__":
        return None
    x = args[0]
    features, axis, batch = map(_tuple, (module.features, module.axis, module.batch_dims))
    n, m = len(batch), len(axis)
    axis = sorted(a % x.ndim for a in axis)  # as Flax does, whatever order they are given in
    x = jnp.moveaxis(x, axis, range(x.ndim - m, x.ndim))
    x = x.reshape(*x.shape[: x.ndim - m], -1)
    return View(
        x,
        lambda y: y.reshape(*y.shape[:-1], *features),
        batch=tuple(range(n)),
        ins=tuple(range(n, n + m)),
        outs=tuple(range(n + m, n + m + len(features))),
    )


def einsum(module: Any, method: str, args: tuple) -> View | None:
    """The rule of ``nn.Einsum``: which axes contract is read off the string.

    ``"btd,dnh->btnh"``: d contracts, n and h are the output. ``"btnh,nhk->btnk"``: n is in all
    three, so each n has a matrix of its own (a batch axis).
    """
    if method != "__call__":
        return None
    x, spec = args[0], (args[1] if len(args) > 1 and args[1] else module.einsum_str)
    left, right = spec.replace(" ", "").split("->")
    xs, ks = left.split(",")
    batch = "".join(c for c in ks if c in xs and c in right)
    ins = "".join(c for c in ks if c in xs and c not in right)
    outs = "".join(c for c in ks if c not in xs and c in right)
    free = "".join(c for c in xs.replace("...", "") if c not in ks)
    if len(batch + ins + outs) != len(ks) or any(c not in right for c in free):
        return None  # a sum over one operand alone: not a matrix product
    free = ("..." if "..." in xs else "") + free
    shape = module.shape
    moved = jnp.einsum(f"{xs}->{batch}{free}{ins}", x)
    return View(
        moved.reshape(*moved.shape[: moved.ndim - len(ins)], -1),
        lambda y: jnp.einsum(
            f"{batch}{free}{outs}->{right}",
            y.reshape(*y.shape[:-1], *(shape[ks.index(c)] for c in outs)),
        ),
        batch=tuple(map(ks.index, batch)),
        ins=tuple(map(ks.index, ins)),
        outs=tuple(map(ks.index, outs)),
    )


def embed(module: nn.Module, method: str, args: tuple) -> View | None:
    """The rule of ``nn.Embed``: rows when looking up, the transpose in ``attend``."""
    use = {"__call__": "rows", "attend": "transposed"}.get(method)
    return View(args[0], leaf="embedding", use=use, kind="embed") if use else None


Rules = Mapping[Any, Rule]
"""Rules by layer: a class, or its full name as a string."""

RULES: Rules = {
    nn.Dense: dense,
    nn.DenseGeneral: dense_general,
    nn.Einsum: einsum,
    nn.Embed: embed,
    # By name, so that transformers need not be imported.
    "transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D": transposed_dense,
}


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
        >>> model, x = nn.Dense(4), jnp.ones((1, 8))
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
        call = _view(context, args, kw, all_rules)
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
        ``apply(params, adapter, *inputs, variables=None, **kwargs)``; ``variables`` holds other
        collections (``batch_stats``); ``kwargs`` go to ``model.apply`` (``rngs``, ``mutable``).

    Raises:
        UserError: from ``apply``: an adapted kernel that the call never used, or that ``params``
            does not have.

    Example:
        >>> from lora_mini_jax import LoRA, init
        >>> model, x = nn.Dense(4), jnp.ones((1, 8))
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
        **kwargs: Any,
    ) -> Any:
        sites = {site.target.path: site for site in adapter.sites}
        used: Counter[str] = Counter()

        def interceptor(next_call: Callable, args: tuple, kw: dict, context: Any) -> Any:
            call = _view(context, args, kw, all_rules)
            if call is None or call[0] not in sites:
                return next_call(*args, **kw)
            path, view = call
            before = used[path]
            y = next_call(*args, **kw)
            if used[path] > before:
                return y  # a subclass that called its parent: the parent's call was adapted
            used[path] += 1
            return y + _delta(context.module, sites[path], view, y.dtype)

        check_kernels(params, adapter.sites)
        factors = {site.target.path: adapter.factors(site.target.path) for site in adapter.sites}
        with nn.intercept_methods(interceptor):
            marked = {**(variables or {}), "params": _marked(params, factors)}
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


def _view(context: Any, args: tuple, kw: dict, rules: Rules) -> tuple[str, View] | None:
    """The path of the kernel this call uses, and its view; None for a call of no known layer."""
    module = context.module
    rule = next((r for r in (_lookup(rules, c) for c in type(module).__mro__) if r), None)
    if rule is None or module.scope is None:
        return None
    method = getattr(type(module), context.method_name, None)
    if method is None:
        return None  # the outer shell of a lifted layer, nn.vmap(nn.Dense); the layer is inside
    bound = inspect.signature(method).bind(module, *args, **kw)
    bound.apply_defaults()
    view = rule(module, context.method_name, bound.args[1:])
    if view is None or not module.has_variable("params", view.leaf):
        return None
    return "/".join((*module.path, view.leaf)), view


def _lookup(rules: Rules, cls: type) -> Rule | None:
    return rules.get(cls) or rules.get(f"{cls.__module__}.{cls.__qualname__}")


def _delta(module: nn.Module, site: Site, view: View, dtype: Any) -> Array:
    """The adapter's contribution to one call, in the shape and dtype of the layer's output."""
    factors = module.get_variable("params", view.leaf + SUFFIX).factors
    inner = replace(site.target, shape=site.target.shape[site.target.stack :], stack=0)
    kernel = inner.matrix(module.get_variable("params", view.leaf))
    if view.use == "rows":
        return site.method.rows(view.inputs, kernel, factors).astype(dtype)
    x, delta = view.inputs.astype(dtype), site.method.delta
    if view.use == "transposed":
        thing = jax.ShapeDtypeStruct((*x.shape[:-1], inner.n_in), dtype)
        transpose = jax.linear_transpose(lambda rows: delta(rows, kernel, factors), thing)
        return view.outputs(transpose(x)[0])
    lead = len(view.batch)
    return view.outputs(over_lead(delta, lead)(x, kernel, factors)).astype(dtype)


def _tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
