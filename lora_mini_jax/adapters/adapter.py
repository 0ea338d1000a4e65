"""The adapter of a whole model: its leaves by kernel path, and what can be done with them.

`Adapter` is a pytree. Its ``trainable`` leaves are all an optimiser ever sees; ``frozen`` ones ride
along; which method adapts which kernel is static. The model's own parameters stay a separate tree,
never changed and never an argument of ``grad``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lora_mini_jax.adapters.sites import Site, by_method, plan_sites
from lora_mini_jax.algebra.draws import as_key, fold_path, split_key
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.tree import Target, check_real, kernels_of, over_lead


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("trainable", "frozen", "key"),
    meta_fields=("sites",),
)
@dataclass(frozen=True)
class Adapter:
    """The leaves of an adapter. Make one with `init`.

    Attributes:
        trainable: ``{path: {name: float32 array}}``, what is trained.
        frozen: ``{path: {name: array}}``, what is not: outer factors and the like.
        key: the data of the random key it was drawn with (uint32), kept so that the frozen leaves
            can be drawn again.
        sites: the adapted kernels and their methods, static under ``jit``.

    Example:
        >>> from lora_mini_jax.methods import LoRAMini
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}}
        >>> adapter = init(params, LoRAMini(rank=2, a=4, b=4), [Target("up/kernel", (8, 32))])
        >>> jax.tree.map(jnp.shape, adapter.trainable)
        {'up/kernel': {'A': (4, 2), 'B': (2, 4)}}
        >>> adapter
        Adapter(1 kernel: lora-mini; 16 numbers trained, 160 frozen)
    """

    trainable: dict[str, Factors]
    frozen: dict[str, Factors]
    key: jax.Array
    sites: tuple[Site, ...]

    def __repr__(self) -> str:
        # Without arrays: a notebook shows this for a cell that ends with an adapter.
        trained, frozen = (sum(getattr(leaf, "size", 0) for leaf in jax.tree.leaves(tree))
                           for tree in (self.trainable, self.frozen))  # fmt: skip
        return (
            f"Adapter({kernels_text(self.sites)}; {trained:,} numbers trained, {frozen:,} frozen)"
        )

    def factors(self) -> dict[str, Factors]:
        """Every kernel's leaves, trainable and frozen together, as a call uses them: shared ones
        under each of the paths that share them, related ones related."""
        own: dict[str, Factors] = {}
        for site in self.sites:
            path = site.owner or site.target.path
            own[site.target.path] = {**self.frozen.get(path, {}), **self.trainable.get(path, {})}
        stacked = {site.target.path for site in self.sites if site.target.stack}
        for method, group in by_method(self.sites).items():
            own.update(method.relate({path: own[path] for path in group}, stacked))
        return own

    def with_trainable(self, trainable: dict[str, Factors]) -> "Adapter":
        """The same adapter with other trained leaves."""
        return replace(self, trainable=trainable)

    def kept(self) -> dict[str, Factors]:
        """The frozen leaves that drawing again would not give (`Method.stored`), by path; shared
        ones with their owner alone."""
        return {
            site.target.path: {n: self.frozen[site.target.path][n] for n in sorted(names)}
            for site in self.sites
            if (names := site.method.stored) and not site.owner
        }

    def with_kept(self, kept: Mapping[str, Factors]) -> "Adapter":
        """The same adapter with others in the place of the leaves that `kept` gives."""
        changed = {path: self.frozen[path] | leaves for path, leaves in kept.items()}
        return replace(self, frozen=self.frozen | changed)

    def without_scratch(self, leaves: Mapping[str, Factors]) -> dict[str, Factors]:
        """Leaves by path, but for those that only training needs (`Method.scratch`)."""
        scratch = {site.target.path: site.method.scratch for site in self.sites}
        return {
            path: {name: leaf for name, leaf in own.items() if name not in scratch[path]}
            for path, own in leaves.items()
        }


def init(
    params: Mapping[str, Any],
    method: Method,
    targets: Iterable[Target],
    key: jax.Array | int = 0,
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    modules_to_save: Iterable[Target] = (),
) -> Adapter:
    """Draw an adapter for the given kernels.

    Every kernel has a random stream of its own, made from ``key`` and its path, so adding or
    removing targets changes no other kernel's factors; stacked layers are drawn one by one.

    Args:
        params: the model's parameters, a nested mapping; only read.
        method: `LoRA`, `LoRAMini`, ...
        targets: the kernels to adapt: ``select(linen.targets(model, params, x), "q_proj|v_proj")``.
        key: a JAX random key, or an integer seed.
        overrides: other hyper-parameters for some kernels, see `plan_sites`.
        modules_to_save: parameters trained whole beside the method (a head, norms, biases), saved
            and merged with the adapter: ``select(parameters(params, targets), "norm")``.

    Raises:
        UserError: see `plan_sites`; no target, or one that ``params`` does not have, or has in
            another shape or in numbers that are not real.

    Example:
        >>> targets = [Target("up/kernel", (8, 32))]
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}}
        >>> from lora_mini_jax.methods import LoRA
        >>> count(init(params, LoRA(rank=2), targets))
        80
    """
    sites = plan_sites(method, targets, overrides, modules_to_save)
    if not sites:
        raise UserError("no kernel to adapt was given: the model has none of a known layer, or "
                        "`rules` have to say which they are")  # fmt: skip
    return draw(params, sites, key)


def draw(
    params: Mapping[str, Any],
    sites: tuple[Site, ...],
    key: jax.Array | int,
    places: "Adapter | None" = None,
) -> Adapter:
    """`init` for sites already planned; pure, so it works under ``jit`` and ``eval_shape``.

    With ``places``, an adapter whose leaves are shardings, every leaf is drawn where it belongs:
    none is ever whole on one device.
    """
    key = as_key(key)
    kernels = kernels_of(params, [site.target for site in sites])
    check_real(kernels)
    trainable, frozen = {}, {}
    for site in sites:
        if site.owner:
            continue
        path = site.target.path
        own = key if site.method.shares_draw else fold_path(key, path)
        drawing = jax.jit(
            _draw_one,
            static_argnums=(0, 1),
            out_shardings=(places.trainable[path], places.frozen[path]) if places else None,
        )
        trainable[path], frozen[path] = drawing(
            site.method, site.target.anywhere, own, kernels[path]
        )
    return Adapter(trainable, frozen, jax.random.key_data(key), sites)


def kernels_text(sites: Iterable[Site]) -> str:
    """How many kernels each method adapts, in words."""
    return ", ".join(f"{len(paths)} kernel{'s'[: len(paths) != 1]}: {method.name}"
                     for method, paths in by_method(sites).items())  # fmt: skip


def check_adapter(adapter: Any) -> None:
    """Raise `UserError` for anything else in an adapter's place."""
    if not isinstance(adapter, Adapter):
        raise UserError(f"a {type(adapter).__name__} is no adapter: give params and adapter in "
                        "this order; of a state or a bank, its adapter")  # fmt: skip


def check_calibrated(adapter: Adapter) -> None:
    """Factors that are still 0 would train nothing, silently. Only shapes are known under tracing;
    then there is nothing to check."""
    for site in adapter.sites:
        leaves = jax.tree.leaves(adapter.frozen.get(site.target.path, {}))
        known = not any(isinstance(leaf, Tracer) for leaf in leaves)
        if site.method.needs_data and known and not all(leaf.any() for leaf in leaves):
            raise UserError(
                f"the frozen factors of {site.method.name} on {site.target.path} come from data: "
                "call lora_mini_jax.calibrate(adapter, params, loss_fn, batches) first"
            )


def count(adapter: Adapter) -> int:
    """How many parameters are trained.

    Example:
        >>> from lora_mini_jax.methods import LoRA
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}}
        >>> count(init(params, LoRA(rank=1), [Target("up/kernel", (8, 32))]))
        40
    """
    check_adapter(adapter)
    return sum(leaf.size for leaf in jax.tree.leaves(adapter.trainable))


def _draw_one(
    method: Method, target: Target, key: jax.Array, kernel: Any
) -> tuple[Factors, Factors]:
    """The leaves of one site, a matrix at a time. Compiled always, so that drawing them again gives
    the same bits: what XLA fuses rounds differently from the same operations one by one. And a
    quantised kernel of which a method wants the shape alone is not dequantised."""
    kernels, lead = target.matrix(kernel), target.lead
    keys = jnp.broadcast_to(key, lead) if method.shares_draw else split_key(key, lead)
    return over_lead(method.init, len(lead))(keys, kernels)
