"""The front door for Flax NNX: adapt any model's call, without changing the model.

NNX has no interceptor. `adapt` takes the model apart once; every call puts it together again from
the parameters it is given, inside the traced function, and there replaces the layers by ones whose
calls are adapted. Factors are variables of the layer, of the kernel's own kind, so ``nnx.scan`` and
``nnx.vmap`` slice them along with it. Adapters, methods and checkpoints are those of Linen.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
from flax import nnx

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.algebra.draws import as_key
from lora_mini_jax.call import beside, lookup, output, reads, states, views
from lora_mini_jax.call.streams import refuse_to_draw, reseed
from lora_mini_jax.call.views import Rules, View, dense, embed, transposed_dense
from lora_mini_jax.call.watched import watch
from lora_mini_jax.tree import Target, unflatten

__all__ = [
    "adapt",
    "dense",
    "dense_general",
    "einsum",
    "embed",
    "parameters",
    "targets",
    "transposed_dense",
    "update",
]


def dense_general(module: Any, method: str, args: tuple) -> View | None:
    """The rule of ``nnx.LinearGeneral``: kernel ``(*batch, *in, *out)``.

    Example:
        >>> layer = nnx.LinearGeneral(8, (4, 2), rngs=nnx.Rngs(0))
        >>> dense_general(layer, "__call__", (jax.numpy.ones((3, 8)),)).outs
        (1, 2)
    """
    linen = SimpleNamespace(
        features=module.out_features, axis=module.axis, batch_dims=tuple(module.batch_axis)
    )
    return views.dense_general(linen, method, args)


def einsum(module: Any, method: str, args: tuple, leaf: str = "kernel") -> View | None:
    """The rule of ``nnx.Einsum``: which axes contract is read off the string. For a layer like it
    that calls its kernel ``w``: ``functools.partial(einsum, leaf="w")``.

    Example:
        >>> layer = nnx.Einsum("bd,dk->bk", (8, 4), rngs=nnx.Rngs(0))
        >>> einsum(layer, "__call__", (jax.numpy.ones((3, 8)), None)).outs
        (1,)
    """
    linen = SimpleNamespace(einsum_str=module.einsum_str, shape=getattr(module, leaf).shape)
    view = views.einsum(linen, method, args)
    return view and replace(view, leaf=leaf)


RULES: Rules = {
    nnx.Linear: dense,
    nnx.LinearGeneral: dense_general,
    nnx.Einsum: einsum,
    nnx.Embed: embed,
    # By name, so that Tunix need not be imported; each of its families has a class of its own.
    **{
        f"tunix.models.{family}.model.Einsum": partial(einsum, leaf="w")
        for family in ("llama3", "qwen2", "qwen3", "gemma", "gemma3")
    },
}


def parameters(model: nnx.Module) -> dict[str, Any]:
    """The model's ``nnx.Param`` arrays as nested dicts with string keys: what is called ``params``
    everywhere else. Indices of lists become strings too: ``"heads/0/kernel"``.

    Example:
        >>> parameters(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)))["kernel"].shape
        (2, 3)
    """
    _, state, _ = states.split(model)
    return unflatten({name: variable.get_value() for name, variable in states.named(state)})


def update(model: nnx.Module, params: Mapping[str, Any]) -> None:
    """Write parameters, merged ones say, into a model in place.

    Raises:
        UserError: parameters that are missing, that the model has not, or of other shapes.

    Example:
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> update(model, jax.tree.map(jax.numpy.zeros_like, parameters(model)))
        >>> float(model.kernel.sum())
        0.0
    """
    nnx.update(model, states.filled(states.split(model)[1], params))


def targets(
    model: nnx.Module,
    *inputs: Any,
    rules: Rules | None = None,
    method: str = "__call__",
    **kwargs: Any,
) -> tuple[Target, ...]:
    """Every kernel that this call of the model uses, and how each is a matrix.

    Traces ``model(*inputs, **kwargs)``, or another ``method`` of the model, without computing
    anything; nothing is guessed from shapes.

    Args:
        model: any NNX module.
        *inputs, **kwargs: of a call; arrays may be ``jax.ShapeDtypeStruct``.
        rules: layers of your own, ``{MyLinear: lmj.nnx.dense}``, beside the built-in ones.
        method: the name of the method that is called.

    Raises:
        UserError: a kernel stacked by ``nnx.vmap`` along another axis than 0; one of your rules
            that found no kernel.

    Example:
        >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        >>> [t.path for t in targets(model, jax.numpy.ones((1, 8)))]
        ['kernel']
    """
    graph, state, rest = states.split(model)
    all_rules, served = lookup.with_own(RULES, rules), set[type]()
    flat = {name: variable.get_value() for name, variable in states.named(state)}
    found: dict[str, Target] = {}

    def record(module: Any, path: str, view: View, y: Any) -> Any:
        if path in flat:
            served.add(lookup.rule_of(type(module), all_rules)[0])
            seen = tuple(getattr(module, view.leaf).shape)
            found.setdefault(path, lookup.target_of(path, tuple(flat[path].shape), seen, view))
        return reads.without_kernel(y, view) if path in flat else y

    def call(flat: Mapping[str, Any], *inputs: Any) -> Any:
        own = states.filled(state, unflatten(flat))
        fresh = nnx.merge(graph, own, states.copied(rest))
        watch(fresh, own, all_rules, record)
        return getattr(fresh, method)(*inputs, **kwargs)

    read = reads.read_by(call, flat, *inputs)
    lookup.check_served(rules or {}, served)
    return tuple(replace(found[path], read=path in read) for path in flat if path in found)


def adapt(model: nnx.Module, rules: Rules | None = None) -> Callable[..., Any]:
    """The model's call as a pure function: ``apply(params, adapter, *inputs, **kwargs)``.

    Args:
        model: any NNX module; it is taken apart here, and is neither changed nor kept. A call is in
            the mode that the model is in now: call ``model.train()`` or ``model.eval()`` before,
            and for both adapt it twice.
        rules: layers of your own, as for `targets`.

    Returns:
        ``apply(params, adapter, *inputs, variables=None, mutable=False, dropout_key=None,
        method="__call__", **kwargs)``. ``params`` are as `parameters` gives them. ``dropout_key``
        turns on the dropout of methods that have one, and is what the model's own random streams,
        those of its dropout layers, begin with in this call. ``variables`` is the state that is not
        parameters, ``nnx.split(model, nnx.Param, ...)[2]``: batch statistics, caches, random
        streams; without it that of ``model`` at this moment. What a call does to it is lost, or
        with ``mutable`` returned: ``(outputs, variables)``. The rest is as in `linen.adapt`.

    Raises:
        UserError: from ``apply``: an adapted kernel that the call never used, or that ``params``
            does not have; a model that draws random numbers without ``dropout_key``, ``variables``
            or ``mutable``, for it would draw the same in every call.

    Example:
        >>> from lora_mini_jax import LoRA, init
        >>> model, x = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), jax.numpy.ones((1, 8))
        >>> params = parameters(model)
        >>> adapter = init(params, LoRA(rank=2), targets(model, x))
        >>> adapt(model)(params, adapter, x).shape
        (1, 4)
    """
    graph, state, rest = states.split(model)
    shapes = jax.eval_shape(lambda state: state, state)
    all_rules = lookup.with_own(RULES, rules)

    def apply(
        params: Mapping[str, Any],
        adapter: Adapter,
        *inputs: Any,
        variables: nnx.State | None = None,
        mutable: bool = False,
        dropout_key: jax.Array | None = None,
        method: str = "__call__",
        **kwargs: Any,
    ) -> Any:
        sites = beside.called_sites(adapter)
        shifted, factors = beside.prepared(params, adapter, dropout_key)
        used: Counter[str] = Counter()

        def add(module: Any, path: str, view: View, y: jax.Array) -> jax.Array:
            if path not in sites:
                return y
            kernel = getattr(module, view.leaf)[...]
            leaves = getattr(module, view.leaf + beside.SUFFIX)
            own = {name: leaf[...] for name, leaf in leaves.items()}
            used[path] += 1
            return output.with_delta(y, sites[path], view, kernel, own, used[path] - 1)

        others = states.copied(rest if variables is None else variables)
        fresh = nnx.merge(graph, states.filled(shapes, shifted), others)
        watch(fresh, shapes, all_rules, add, factors)
        if dropout_key is not None:
            reseed(fresh, as_key(dropout_key))
        elif variables is None and not mutable:
            refuse_to_draw(fresh)
        y = getattr(fresh, method)(*inputs, **kwargs)
        beside.check_used(sites, used)
        return (y, nnx.split(fresh, nnx.Param, ...)[2]) if mutable else y

    return apply
