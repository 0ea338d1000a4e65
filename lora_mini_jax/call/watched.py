"""How the layers of an NNX model are made to say when they are called: by a subclass of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from inspect import isfunction
from typing import Any

import jax
from flax import nnx

from lora_mini_jax.call import beside, lookup
from lora_mini_jax.call.views import Rule, Rules, View


@dataclass(frozen=True, eq=False)
class _Watch:
    """What a watched layer does after its own call. Compared by identity, and part of the layer's
    static structure: a transformation never takes a layer traced in one call for another's."""

    module: str
    known: type
    rule: Rule
    act: Callable[[Any, str, View, Any], Any]

    def __call__(self, module: Any, method: str, args: tuple, kw: dict, y: Any) -> Any:
        plain = getattr(self.known, method).__get__(module)
        view = lookup.view_by(self.rule, plain, module, method, args, kw)
        if view is None:
            return y
        return self.act(module, f"{self.module}/{view.leaf}".removeprefix("/"), view, y)


def watch(
    model: nnx.Module,
    state: nnx.State,
    rules: Rules,
    act: Callable[[Any, str, View, Any], Any],
    factors: Mapping[str, Mapping[str, jax.Array]] | None = None,
) -> None:
    """Make the layers that have a rule call ``act``, and put the factors beside the kernels."""
    for path, variable in nnx.to_flat_state(state):
        layer: Any = model
        for part in path[:-1]:
            layer = getattr(layer, part) if isinstance(part, str) else layer[part]
        known, rule = lookup.rule_of(type(layer), rules)
        if rule is None:
            continue
        if not hasattr(layer, "adapter_watch"):
            layer.__class__ = _watched(type(layer), known)
            layer.adapter_watch = _Watch(name_of(path[:-1]), known, rule, act)
        own = (factors or {}).get(name_of(path), {})
        beside_it = {name: type(variable)(leaf) for name, leaf in own.items()}
        setattr(layer, str(path[-1]) + beside.SUFFIX, nnx.Dict(beside_it))


@cache
def _watched(layer: type, known: type) -> type:
    """A subclass of a layer in which the calls of ``known``, the class with the rule, are watched.

    A layer of the user's that builds on ``known`` comes before the watched calls, and finds them
    with ``super()``: what it does to the result of its parent is done to the adapter's part too.
    """

    def watching(name: str) -> Callable:
        plain = getattr(known, name)

        @wraps(plain)
        def method(self: Any, *args: Any, **kw: Any) -> Any:
            return self.adapter_watch(self, name, args, kw, plain(self, *args, **kw))

        return method

    if layer is not known:
        return type(layer)(layer.__name__, (layer, _watched(known, known)), {})
    calls = {name: watching(name) for name in _methods(known)}
    return type(known)(known.__name__, (known,), calls)


def _methods(layer: type) -> set[str]:
    """The calls of a layer that may use its kernel: whatever its author made public."""
    own = (c for c in layer.__mro__ if c not in nnx.Module.__mro__)
    public = {name for c in own for name, value in vars(c).items() if isfunction(value)}
    return {name for name in public if name == "__call__" or not name.startswith("_")}


def name_of(path: tuple) -> str:
    """The path of a variable, as a kernel's is written."""
    return "/".join(map(str, path))
