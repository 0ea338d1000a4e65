"""Which rule a layer has, and what it says of one call of it."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from lora_mini_jax.call.views import Rule, Rules, View
from lora_mini_jax.errors import UserError
from lora_mini_jax.tree import Target


def with_own(rules: Rules, own: Rules | None) -> Rules:
    """The built-in ``rules`` of a library with the user's ``own``, which come before them.

    Raises:
        UserError: something else in the place of the user's.
    """
    own = {} if own is None else own
    if not isinstance(own, Mapping) or not all(map(callable, own.values())):
        raise UserError("rules are {layer: rule}, as {MyDense: lora_mini_jax.linen.dense}, and "
                        f"this is a {type(own).__name__} of other things")  # fmt: skip
    return {**rules, **own}


def check_served(own: Rules, served: Collection[type]) -> None:
    """Raise `UserError` for rules of the user that found no kernel in a call."""
    dead = [key for key, rule in own.items() if not any(_lookup({key: rule}, c) for c in served)]
    if dead:
        names = (key if isinstance(key, str) else key.__qualname__ for key in dead)
        raise UserError(
            f"the rules for {', '.join(names)} found no kernel: the call has no such layer, or its "
            "parameter is not called as their View says, leaf='kernel' where it says nothing"
        )


def view_of(context: Any, args: tuple, kw: dict, rules: Rules) -> tuple[str, View] | None:
    """The path of the kernel this call uses, and its view; None for a call of no known layer."""
    module = context.module
    _, rule = rule_of(type(module), rules)
    if rule is None or module.scope is None:
        return None
    if not hasattr(type(module), context.method_name):
        return None  # the outer shell of a lifted layer, nn.vmap(nn.Dense); the layer is inside
    # Of the method that runs: a subclass may take other arguments than the layer it calls.
    view = view_by(rule, context.orig_method, module, context.method_name, args, kw)
    if view is None or not module.has_variable("params", view.leaf):
        return None
    return "/".join((*module.path, view.leaf)), view


def view_by(
    rule: Rule, function: Callable, module: Any, method: str, args: tuple, kw: dict
) -> View | None:
    """What a rule says of a call of a bound method, with the arguments in their order there."""
    bound = inspect.signature(function).bind(*args, **kw)
    bound.apply_defaults()
    view = rule(module, method, bound.args)
    body = function.func if isinstance(function, partial) else getattr(function, "__func__", None)
    if view is None or view.batch or body not in _PLAIN:
        return view
    return replace(view, plain=True, bias=_bias(module))


_PLAIN = {inspect.unwrap(layer.__call__)
          for layer in (nn.Dense, nn.DenseGeneral, nnx.Linear, nnx.LinearGeneral)}  # fmt: skip


def _bias(module: Any) -> jax.Array | None:
    if isinstance(module, nn.Module):
        return module.get_variable("params", "bias")
    return None if module.bias is None else module.bias[...]


def rule_of(cls: type, rules: Rules) -> tuple[type, Rule | None]:
    """The class of a layer's method resolution order that has a rule, and the rule; None for a
    layer that has none."""
    found = ((c, _lookup(rules, c)) for c in cls.__mro__)
    return next(((c, rule) for c, rule in found if rule), (cls, None))


def _lookup(rules: Rules, cls: type) -> Rule | None:
    return rules.get(cls) or rules.get(f"{cls.__module__}.{cls.__qualname__}")


def target_of(path: str, shape: tuple[int, ...], seen: tuple[int, ...], view: View) -> Target:
    """The target that a call shows.

    Args:
        path: of the kernel.
        shape: as the parameters hold it, stacked axes included.
        seen: as the layer has it in the call.
        view: how the call uses it.

    Raises:
        UserError: a kernel stacked along another axis than 0.
    """
    stack = len(shape) - len(seen)
    if shape[stack:] != seen:
        raise UserError(
            f"{path} {shape} is used as {seen}: only kernels stacked along axis 0 can be adapted "
            "(in Linen: variable_axes={'params': 0})"
        )
    return Target(path, shape, stack, view.batch, view.ins, view.outs, view.kind)
