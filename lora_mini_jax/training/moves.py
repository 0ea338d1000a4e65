"""What methods do of their own while training: hold entries, add a penalty, take a step."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.sites import by_method
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.tree import over_lead


def penalty(adapter: Adapter) -> jax.Array | float:
    """What the methods add to the loss: for each, the mean over its kernels. float32 ``()``."""
    total: jax.Array | float = 0.0
    for method, paths in by_method(adapter.sites).items():
        if type(method).penalty is Method.penalty:
            continue
        factors = adapter.factors()
        lead = {site.target.path: len(site.target.lead) for site in adapter.sites}
        each = [over_lead(method.penalty, lead[path])(factors[path]) for path in paths]
        total += jnp.concatenate([jnp.ravel(values) for values in each]).mean()
    return total


def held(adapter: Adapter) -> Any:
    """A tree of masks like ``adapter.trainable``, True on entries that the next update must leave
    alone; None where no method holds anything, so that nothing is computed for it."""
    masks = {
        path: method.held(adapter.frozen[path])
        for method, paths in by_method(adapter.sites).items()
        for path in paths
    }
    return _full(masks, adapter.trainable) if any(masks.values()) else None


def step(adapter: Adapter, grads: Any, t: jax.Array, key: jax.Array) -> tuple[Adapter, Any]:
    """Every method's own step after update ``t``: the adapter after it, and a tree of masks like
    ``trainable`` where the optimiser is to start afresh (None where nowhere)."""
    trainable, frozen, reset = dict(adapter.trainable), dict(adapter.frozen), {}
    for method, paths in by_method(adapter.sites).items():
        own = {path: {**frozen[path], **trainable[path]} for path in paths}
        stepped = method.step(key, t, own, {path: grads[path] for path in paths})
        for path in paths:
            trainable[path] = _changed(trainable[path], stepped.trainable.get(path, {}))
            frozen[path] = _changed(frozen[path], stepped.frozen.get(path, {}))
        reset |= stepped.reset
    after = replace(adapter, trainable=trainable, frozen=frozen)
    return after, _full(reset, trainable) if reset else None


def _changed(before: Factors, new: Factors) -> Factors:
    """The leaves after a step, in the dtypes that they had: another would compile again, and not
    be what a checkpoint expects."""
    return before | {name: leaf.astype(before[name].dtype) for name, leaf in new.items()}


def _full(masks: dict[str, Factors], trainable: dict[str, Factors]) -> dict[str, Factors]:
    """Masks for some leaves as a whole tree in the leaves' own shapes."""
    return {
        path: {
            name: jnp.broadcast_to(masks.get(path, {}).get(name, False), leaf.shape)
            for name, leaf in leaves.items()
        }
        for path, leaves in trainable.items()
    }
