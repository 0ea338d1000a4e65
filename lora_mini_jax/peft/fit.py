"""Tensors from a file put in their places, and everything that does not fit in one error."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.adapters.adapter import Adapter, draw
from lora_mini_jax.adapters.sites import Site, check_sites
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.methods.full import Full
from lora_mini_jax.peft.extra import extra
from lora_mini_jax.peft.kinds.kind import Kind, Leaf
from lora_mini_jax.peft.names import Names, Place
from lora_mini_jax.peft.tables import obstacle
from lora_mini_jax.peft.tensors import Tensors, is_copy
from lora_mini_jax.processes import on_host
from lora_mini_jax.tree import flatten, float32


@dataclass(frozen=True)
class Plan:
    """What a file says: its kind, and of modules the method of each, whether it must be there,
    whether its tensors are saved whole, and in which layout."""

    source: str
    kind: Kind
    method: Callable[[str], Method]
    adapts: Callable[[str], bool] = lambda module: False
    saves: Callable[[str], bool] = lambda tensor: False
    keeps_layout: bool = False


def build(
    tensors: Tensors,
    given: Plan,
    params: Mapping[str, Any],
    found: Mapping[str, Place],
    names: Names,
) -> Adapter:
    """The adapter, once everything fits; what does not is one error."""
    sites, wrong = _adapted(tensors, given, found)
    base = flatten(params)
    dense, misfits = _saved(tensors, given, found, base)
    wrong = tensors.wrong + wrong + misfits + extra(tensors, found, names, base)
    wrong += [f"{path} {why}" for path in [*(s.target.path for s in sites), *dense]
              if (why := obstacle(found[path], names, params, path in dense))]  # fmt: skip
    if not sites and not wrong:
        wrong.append("it adapts none of the kernels")
    if wrong:
        raise UserError(f"{given.source} does not fit: {'; '.join(wrong)}")
    sites += [Site(found[path].target, Full()) for path in dense]
    try:
        check_sites(sites, new=False)
    except UserError as error:
        raise UserError(f"{given.source}: {error}") from None
    drawn = draw(params, tuple(sites), 0)
    trainable, frozen = {}, dict(drawn.frozen)
    for site in sites:
        path, place = site.target.path, found[site.target.path]
        if path in dense:
            trainable[path] = {"dense": jnp.asarray(dense[path])}
            continue
        trainable[path] = _leaves(tensors, given.kind.leaves[type(site.method)], place)
        parts = given.kind.scatter(tensors.shared, place.target.lead, *place.shape).items()
        frozen[path] = frozen[path] | {n: jnp.asarray(part, jnp.float32) for n, part in parts}
    return replace(drawn.with_trainable(trainable), frozen=frozen)


def _adapted(
    tensors: Tensors, given: Plan, found: Mapping[str, Place]
) -> tuple[list[Site], list[str]]:
    """The sites of a file, and what is wrong with their tensors."""
    sites, wrong = [], []
    for path, place in found.items():
        if place.target.kind == "array":
            continue
        own = [m for m in place.modules if m in tensors.adapted or given.adapts(m)]
        methods = {given.method(module) for module in own}
        if not own:
            continue
        if len(methods) > 1 or len(own) < len(place.modules):
            how = "different ranks or alphas" if len(methods) > 1 else "which some have no adapter"
            wrong.append(f"{path} stacks layers of {how}, which need a model that keeps its layers "
                         "apart (scan_layers=False)")  # fmt: skip
            continue
        (method,) = methods
        for module in place.modules:
            wrong += _misfits(tensors, module, given.kind, method, place)
        sites.append(Site(place.target, method))
    return sites, wrong


def _misfits(tensors: Tensors, module: str, kind: Kind, method: Method, place: Place) -> list[str]:
    """What is wrong with one module's tensors."""
    own, wrong = tensors.adapted.get(module, {}), []
    shapes = _shapes(kind, method, *place.shape)
    for leaf, shape in shapes.items():
        if leaf not in own:
            wrong.append(f"{module}.{leaf} is missing")
        elif own[leaf].shape != shape:
            wrong.append(f"{module}.{leaf} is {own[leaf].shape}, not {shape}")
    wrong += [f"{module}.{leaf} is extra" for leaf in own if leaf not in shapes]
    for name, (rows, columns) in kind.least_shapes(method, *place.shape).items():
        shape = tensors.shared.get(name, np.zeros((0, 0))).shape
        if len(shape) != 2 or shape[0] < rows or shape[1] < columns:
            wrong.append(f"{name} is {shape}, too small for {module}")
    return wrong


@cache
def _shapes(kind: Kind, method: Method, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    """The shapes of PEFT's tensors for one kernel ``(in, out)``, by PEFT's names."""
    kernel = jax.ShapeDtypeStruct((n_in, n_out), jnp.float32)
    trainable, frozen = jax.eval_shape(method.init, jax.random.key(0), kernel)
    own = {**frozen, **trainable}
    return {leaf.name: jax.eval_shape(leaf.there, own[name]).shape
            for name, leaf in kind.leaves[type(method)].items()}  # fmt: skip


def _saved(
    tensors: Tensors, given: Plan, found: Mapping[str, Place], base: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What full fine-tuning adds to the base, by path; a mere copy of the base is passed over."""
    dense, wrong = {}, []
    for path, place in found.items():
        due = [name for name in place.tensors if given.saves(name)]
        if not due and not any(name in tensors.whole for name in place.tensors):
            continue
        old, new = place.split(float32(on_host(base[path]))), {}
        for name in place.tensors:
            if name not in tensors.whole:
                wrong += [f"{name} is missing"] if due else []
                continue
            tensor = place.from_torch(tensors.whole[name], given.keeps_layout)
            if tensor is None:
                wrong.append(f"{name} is {tensors.whole[name].shape}, which does not fit {path}")
            else:
                new[name] = np.asarray(tensor, np.float32)
                if not due and not is_copy(tensor, old[name], base[path].dtype):
                    wrong.append(
                        f"{name} is another than the base's, yet neither a trained bias nor in "
                        "modules_to_save"
                    )
        if due and place.target.kind == "array" and len(place.shape) > 1:
            wrong.append(f"{path} is saved whole but is no kernel among the targets: give them all")
        if due and len(new) == len(place.tensors):
            dense[path] = place.join(new) - place.join(old)
    return dense, wrong


def _leaves(tensors: Tensors, leaves: Mapping[str, Leaf], place: Place) -> Factors:
    """The trained leaves of one kernel, its layers stacked again."""
    found = {}
    for name, leaf in leaves.items():
        stacked = np.stack([tensors.adapted[m][leaf.name] for m in place.modules])
        each = leaf.back(stacked.astype(np.float32))
        found[name] = jnp.asarray(each.reshape(*place.target.lead, *each.shape[1:]))
    return found
