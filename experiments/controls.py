"""What DiffoRA's search has to beat at as many trained parameters: choices that cost next to
nothing, and a lower rank on all kernels.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.sites import Site, check_sites
from lora_mini_jax.algebra.draws import as_key
from lora_mini_jax.errors import UserError
from lora_mini_jax.search.choice import gated
from lora_mini_jax.training.train import LossFn


def random_choice(adapter: Adapter, seed: int) -> dict[str, float]:
    """Scores for `choice.discretise` by which it chooses at random."""
    draw = np.random.default_rng(seed).random
    return {path: float(draw()) for path in gated(adapter.sites)}


def by_gradient_norm(
    loss_fn: LossFn, params: Any, adapter: Adapter, batches: Iterable[Any]
) -> dict[str, float]:
    """Scores for `choice.discretise`: the norm of the gradient in each kernel's leaves.

    Args:
        loss_fn: ``loss_fn(params, adapter, batch, key)``, a scalar.
        params: the base parameters.
        adapter: an adapter by DiffoRA, as `init` draws it.
        batches: what ``loss_fn`` takes; the gradient is added up over them.
    """

    @jax.jit
    def gradient(trainable: Any, params: Any, batch: Any) -> Any:
        def loss(trainable: Any) -> jax.Array:
            return loss_fn(params, adapter.with_trainable(trainable), batch, as_key(0))

        return jax.grad(loss)(trainable)

    total = optax.tree.zeros_like(adapter.trainable)
    for batch in batches:
        total = optax.tree.add(total, gradient(adapter.trainable, params, batch))
    return {path: float(optax.tree.norm(total[path])) for path in gated(adapter.sites)}


def at_budget(sites: Iterable[Site], budget: int) -> tuple[Site, ...]:
    """The same kernels at ranks by which they train ``budget`` parameters, or just below that.

    The highest rank that all can have, and one more for the first kernels where that still fits.
    ``alpha / rank`` stays what it is, so that a change of rank is not one of learning rate.

    Raises:
        UserError: a method without a rank, or a budget that rank 1 exceeds.

    Example:
        >>> from lora_mini_jax import LoRA, Target
        >>> sites = [Site(Target(f"{name}/kernel", (8, 8)), LoRA(rank=4)) for name in "qv"]
        >>> [site.method.rank for site in at_budget(sites, 80)]
        [3, 2]
    """
    sites = tuple(sites)
    if fixed := [s.method.name for s in sites if "rank" not in s.method.field_names()]:
        raise UserError(f"{fixed[0]} has no rank to change: take lora, lora-mini or another")
    least = sum(_at_rank(site, 1).n_trainable for site in sites)
    if budget < least:
        raise UserError(f"{budget} parameters are too few: rank 1 on these kernels has {least}")
    rank = 1
    while sum(_at_rank(site, rank + 1).n_trainable for site in sites) <= budget:
        rank += 1
    found = [_at_rank(site, rank) for site in sites]
    left = budget - sum(site.n_trainable for site in found)
    for i, site in enumerate(found):
        more = _at_rank(site, rank + 1)
        if (extra := more.n_trainable - site.n_trainable) <= left:
            found[i], left = more, left - extra
    check_sites(found)
    return tuple(found)


def _at_rank(site: Site, rank: int) -> Site:
    now = site.method.to_dict()
    alpha = {"alpha": now["alpha"] * rank / now["rank"]} if "alpha" in now else {}
    return replace(site, method=site.method.with_settings({"rank": rank, **alpha}))
