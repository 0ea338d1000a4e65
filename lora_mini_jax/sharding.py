"""Where arrays live on many devices: a mesh, and the shardings of parameters, adapter and batch.

A mesh has the axes ``data`` (batches alone), ``fsdp`` (batches, and a share of every kernel) and
``tensor`` (a share of every kernel). Kernels are split by their two sides, inputs and outputs, and
every leaf of an adapter is split as the side of the kernel that it runs along. Nothing else knows
the names of the axes; ``jax.jit`` moves what it must.

Example, after ``import jax`` and with ``params``, ``targets`` and ``adapter`` at hand::

    mesh = sharding.make_mesh("data=2,fsdp=4")
    params = jax.device_put(params, sharding.of_params(mesh, params, targets))
    adapter = jax.device_put(adapter, sharding.of_adapter(mesh, adapter))
    batch = jax.device_put(batch, sharding.of_batch(mesh))
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.algebra.along import runs_along
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors
from lora_mini_jax.selection import listing
from lora_mini_jax.tree import Target, check_fit, flatten, unflatten

AXES = DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
ROWS_ALONE = f"{DATA}=-1"
"""The mesh where nobody says: every device has all kernels, and rows of its own."""
Sides = tuple[str | None, str | None]
"""The mesh axes that a kernel's inputs and its outputs are split over."""
Rules = Mapping[str, Sides]
"""Sides by a regular expression that is searched in the kernel's path; the first that fits."""

RULES: Rules = {
    # What ends a block takes its input as the block's first kernels left their output.
    r"(^|/)(o_proj|down_proj|output/dense|c_proj|o|wo|out)/kernel$": (TENSOR, FSDP),
    r"(^|/)embedding$": (TENSOR, FSDP),
}
"""For the models of this package, and others that use the same names. Every other kernel is split
along ``fsdp`` by its inputs and ``tensor`` by its outputs; biases, norms and other parameters that
are no kernels stay whole."""
_OTHERS: Sides = (FSDP, TENSOR)


def make_mesh(sizes: str = ROWS_ALONE, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh from axis sizes such as ``"data=2,fsdp=2,tensor=2"``.

    Args:
        sizes: of the axes ``data``, ``fsdp`` and ``tensor``; one that is left out is 1, and one
            may be -1: what the others leave of the devices. By default rows alone are split.
        devices: all of ``jax.devices()`` by default.

    Raises:
        UserError: an unknown axis, a size that is no whole number from 1, or sizes that do not
            multiply to the number of devices.

    Example:
        >>> make_mesh("data=-1").axis_names
        ('data', 'fsdp', 'tensor')
    """
    chosen = jax.devices() if devices is None else list(devices)
    found = re.findall(r"(?:^|,)\s*(\w+)\s*=\s*(-?\d+)\s*(?=,|$)", sizes)
    given = {name: int(size) for name, size in found}
    if sizes.count(",") + 1 != len(given) or not set(given) <= set(AXES):
        raise UserError(f"mesh {sizes!r}: give sizes for some of {', '.join(AXES)}, such as "
                        "data=2,fsdp=4")  # fmt: skip
    known = math.prod(size for size in given.values() if size != -1)
    free = [name for name, size in given.items() if size == -1]
    if len(free) == 1 and known > 0:
        given[free[0]] = len(chosen) // known
    shape = [given.get(name, 1) for name in AXES]
    if min(shape) < 1 or math.prod(shape) != len(chosen):
        raise UserError(
            f"mesh {sizes!r} does not fit the number of devices, {len(chosen)}: give sizes from 1 "
            "that multiply to it; one may be -1, for all that remain"
        )
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=chosen)


def of_params(
    mesh: Mesh, params: Mapping[str, Any], targets: Iterable[Target], rules: Rules | None = None
) -> dict[str, Any]:
    """The sharding of every parameter, as a tree like ``params``; of a quantised kernel that of
    each of its arrays.

    Args:
        mesh: as from `make_mesh`.
        params: arrays or their shapes.
        targets: all kernels, from ``linen.targets`` or ``nnx.targets``.
        rules: of your own model; they go before `RULES`. A side that its mesh axis does not divide
            stays whole.

    Raises:
        UserError: targets that are not of these parameters; a rule of yours that matches none.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((8, 32)), "bias": jnp.ones(32)}}
        >>> up = Target("up/kernel", (8, 32))
        >>> tuple(of_params(make_mesh("data=-1"), params, [up])["up"]["kernel"].spec)
        ('fsdp', 'tensor')
    """
    targets = tuple(targets)
    check_fit(params, targets)
    paths = [target.path for target in targets]
    if dead := [p for p in rules or {} if not any(re.search(p, path) for path in paths)]:
        raise UserError(f"{', '.join(map(repr, dead))} matches no kernel; "
                        f"{listing(targets)}")  # fmt: skip
    whole, flat = NamedSharding(mesh, PartitionSpec()), flatten(params)
    places = {path: jax.tree.map(lambda _: whole, leaf) for path, leaf in flat.items()}
    for target in targets:
        # The values of a quantised kernel, and its scales: each as far as it can be split.
        of = partial(_of_kernel, mesh, target, _sides(target, rules))
        places[target.path] = jax.tree.map(lambda leaf, of=of: of(leaf.shape), flat[target.path])
    return unflatten(places)


def of_adapter(mesh: Mesh, adapter: Adapter, rules: Rules | None = None) -> Adapter:
    """The sharding of every leaf of an adapter, as an adapter whose leaves are shardings.

    An axis of a leaf that runs along the kernel's inputs or outputs is split as they are; an inner
    one, such as the rank, is whole. Arguments as for `of_params`.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    sites = {site.target.path: site for site in adapter.sites}

    def of(leaves: Mapping[str, Factors]) -> Any:
        return {path: {name: _of_leaf(mesh, sites[path], name, leaf.shape, rules)
                       for name, leaf in own.items()} for path, own in leaves.items()}  # fmt: skip

    return replace(adapter, trainable=of(adapter.trainable), frozen=of(adapter.frozen), key=whole)


def of_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its rows over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def of_rows(params: Any) -> NamedSharding | None:
    """`of_batch` on the mesh that parameters are on; None where they are on none."""
    own = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return of_batch(own.mesh) if isinstance(own, NamedSharding) else None


def row_parts(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into.

    Example:
        >>> row_parts(make_mesh("data=-1")) == jax.device_count()
        True
    """
    return mesh.shape[DATA] * mesh.shape[FSDP]


def check_rows(mesh: Mesh, batch_size: int) -> None:
    """Raise `UserError` unless batches of so many rows can be split over the mesh."""
    parts = row_parts(mesh)
    if batch_size % parts:
        raise UserError(
            f"a batch of {batch_size} rows cannot be split over data={mesh.shape[DATA]} and "
            f"fsdp={mesh.shape[FSDP]}: give a multiple of {parts}"
        )


def put_on_mesh(mesh: Mesh, tree: Any) -> Any:
    """The tree on the mesh: leaves that are not there yet, such as an optimiser's counters, are
    put on every device."""
    whole = NamedSharding(mesh, PartitionSpec())

    def settle(leaf: jax.Array) -> jax.Array:
        there = leaf.sharding.device_set == whole.device_set
        return leaf if there else jax.device_put(leaf, whole)

    return jax.tree.map(settle, tree)


def _sides(target: Target, rules: Rules | None) -> Sides:
    """What the rules say of a kernel."""
    if target.kind == "array":
        return None, None
    patterns = chain((rules or {}).items(), RULES.items())
    return next((sides for pattern, sides in patterns if re.search(pattern, target.path)), _OTHERS)


def _of_kernel(mesh: Mesh, target: Target, sides: Sides, shape: tuple[int, ...]) -> NamedSharding:
    spec: list[str | None] = [None] * len(shape)
    for axes, side in zip((target.ins, target.outs), sides, strict=True):
        if axes:  # the first of several is the slowest, so that the flat side is split alike
            at = target.stack + axes[0]
            spec[at] = _dividing(mesh, side, shape[at])
    return NamedSharding(mesh, PartitionSpec(*spec))


def _of_leaf(
    mesh: Mesh, site: Site, name: str, shape: tuple[int, ...], rules: Rules | None
) -> NamedSharding:
    if 0 in shape:  # nothing to split; XLA would leave it whole
        return NamedSharding(mesh, PartitionSpec())
    target = site.target
    along = dict(zip(("in", "out"), _sides(target, rules), strict=True))
    lead = len(target.lead)
    axes = runs_along(site.method, target.n_in, target.n_out)[name]
    split = [_dividing(mesh, along.get(axis), size)
             for axis, size in zip(axes, shape[lead:], strict=True)]  # fmt: skip
    return NamedSharding(mesh, PartitionSpec(*[None] * lead, *split))


def _dividing(mesh: Mesh, axis: str | None, size: int) -> str | None:
    """The mesh axis, where it divides the size; it is not named where it does nothing."""
    return axis if axis and size % mesh.shape[axis] == 0 else None
