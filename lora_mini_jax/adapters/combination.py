"""Several adapters made into one: sums, concatenation, TIES, DARE, and the best fit of a rank.

The same results as PEFT's ``add_weighted_adapter``, for every method: what is a product of thin
matrices is combined as such, and any update at all as a dense matrix that the SVD then fits.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_mini_jax.adapters.adapter import Adapter, check_adapter, check_calibrated
from lora_mini_jax.adapters.folding import fold
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.algebra.decompositions import top_singular
from lora_mini_jax.algebra.draws import as_key, fold_path, split_key
from lora_mini_jax.errors import UserError
from lora_mini_jax.layers import brief
from lora_mini_jax.method import Factors
from lora_mini_jax.methods import LoRA
from lora_mini_jax.methods.full import Full
from lora_mini_jax.settings.checks import require_choice, require_number, require_whole
from lora_mini_jax.tree import Target, check_fit, flatten, float32, over_lead

How = Literal["linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune", "svd",
              "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]  # fmt: skip
Majority = Literal["total", "frequency"]


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    params: Mapping[str, Any],
    how: How = "svd",
    *,
    rank: int | None = None,
    density: float = 0.5,
    majority: Majority = "total",
    seed: int = 0,
) -> Adapter:
    """One LoRA adapter out of several, which may be of different methods.

    A kernel that only some of them adapt is combined from those.

    Args:
        adapters: of the same base.
        weights: one for each; negative ones take a task away.
        params: the base's parameters.
        how: in PEFT's words. ``"cat"``: the exact weighted sum, the ranks add up. ``"svd"``: its
            best fit of a lower rank. ``"linear"``: the factors are summed, not the updates, which
            has cross terms; needs equal ranks, as the next do. ``"magnitude_prune"``: the largest
            entries of each factor, then ``linear``. ``"ties"`` (arXiv 2306.01708): of these, those
            of the majority's sign, averaged. ``"dare_linear"``, ``"dare_ties"`` (arXiv 2311.03099):
            random entries, scaled up, in place of the largest. With ``_svd`` the same is done to
            the dense updates, which are then fitted.
        rank: of the result where the SVD makes it; by default the highest of the adapters'.
        density: the share of entries that pruning keeps.
        majority: ``"total"`` or ``"frequency"``: whether large entries count for more in the vote.
        seed: of DARE's draws.

    Raises:
        UserError: factors that come from data and have not been made yet; numbers that do not fit,
            ranks that differ, kernels trained whole
            (``modules_to_save``), or a method that is no product of thin matrices with a ``how``
            that needs one.

    Example:
        >>> from lora_mini_jax import init
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}}
        >>> targets = [Target("up/kernel", (8, 32))]
        >>> one, other = init(params, LoRA(rank=2), targets), init(params, LoRA(rank=3), targets)
        >>> combine([one, other], [0.5, 0.5], params, "cat").trainable["up/kernel"]["A"].shape
        (8, 5)
    """
    require_choice("how", how, How)
    require_choice("majority", majority, Majority)
    require_number("density", density)
    finite = all(map(math.isfinite, weights))
    if density > 1 or len(adapters) != len(weights) or not adapters or not finite:
        raise UserError(
            f"{len(adapters)} adapters with weights {list(weights)} at density {density}: give one "
            "finite weight for each of at least one adapter, and a density above 0, at most 1"
        )
    for adapter in adapters:
        check_adapter(adapter)
        check_calibrated(adapter)
    mix = partial(_mixed, how.removesuffix("_svd"), density, majority)
    check_fit(params, [site.target for adapter in adapters for site in adapter.sites])
    flat = flatten(params)
    key, sites, trainable = as_key(seed), [], {}
    for path, own in _by_path(adapters, weights).items():
        target, stream = own[0][0].target, fold_path(key, path)
        if how.endswith("svd"):
            found = _fitted(own, target.matrix(flat[path]), mix, stream, rank)
        else:
            found = _factorwise(own, how, mix, stream)
        width = found["A"].shape[-1]
        trainable[path] = found
        sites.append(Site(target, LoRA(width, alpha=float(width))))
    _check_ranks(sites, how)
    return Adapter(trainable, {path: {} for path in trainable}, jax.random.key_data(key),
                   tuple(sites))  # fmt: skip


Own = list[tuple[Site, Factors, float]]
"""What the adapters have at one kernel: its site, leaves and weight."""


def _by_path(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Own]:
    found: dict[str, Own] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        factors = adapter.factors()
        for site in adapter.sites:
            path = site.target.path
            if isinstance(site.method, Full):
                raise UserError(f"{path} is trained whole, which cannot be combined: leave it out")
            found.setdefault(path, []).append((site, factors[path], weight))
    return found


def _fitted(own: Own, kernel: jax.Array, mix: Any, key: jax.Array, rank: int | None) -> Factors:
    """The combined dense updates as the LoRA that is nearest to them."""
    target = own[0][0].target
    ranks = [getattr(site.method, "rank", None) for site, _, _ in own]
    known = [each for each in ranks if each is not None]
    if rank is None and not known:
        raise UserError(f"{target.path}: {own[0][0].method.name} has no rank: give rank")
    width = min(max(known) if rank is None else rank, target.n_in, target.n_out)
    require_whole("rank", width)
    updates = jnp.stack([_update(site, kernel, factors) for site, factors, _ in own])
    weights = jnp.asarray([weight for *_, weight in own])

    def fit(key: jax.Array, *updates: jax.Array) -> Factors:
        left, values, right = top_singular(mix(key, jnp.stack(updates), weights), width)
        return {"A": left, "B": values[:, None] * right}

    lead = target.lead
    return over_lead(fit, len(lead))(split_key(key, lead), *updates)


def _update(site: Site, kernel: jax.Array, factors: Factors) -> jax.Array:
    """A kernel's dense update, stacked axes included."""
    merge = over_lead(site.method.merge, len(site.target.lead))
    return merge(kernel, factors) - float32(kernel)


def _factorwise(own: Own, how: How, mix: Any, key: jax.Array) -> Factors:
    """Combined factor by factor; each carries the root of its update's weight and scale."""
    target = own[0][0].target
    pieces = [(*_thin(site, factors, target, how), weight) for site, factors, weight in own]
    ranks = [left.shape[-1] for left, *_ in pieces]
    lead = target.lead
    if how == "cat":
        lefts = [weight * scale * left for left, _, scale, weight in pieces]
        rights = [right for _, right, *_ in pieces]
        return {"A": jnp.concatenate(lefts, -1), "B": jnp.concatenate(rights, -2)}
    if len(set(ranks)) > 1:
        raise UserError(
            f"{target.path}: how={how!r} needs equal ranks, not {ranks}: use cat or svd"
        )
    roots = jnp.asarray([abs(weight * scale) ** 0.5 for *_, scale, weight in pieces])
    signs = jnp.asarray([1.0 if weight * scale >= 0 else -1.0 for *_, scale, weight in pieces])

    def each(key: jax.Array, *factors: jax.Array) -> Factors:
        lefts, rights = (jnp.stack(factors[i::2]) for i in (0, 1))
        first, second = jax.random.split(key)
        return {"A": mix(first, lefts, signs * roots), "B": mix(second, rights, roots)}

    flat = [factor for left, right, *_ in pieces for factor in (left, right)]
    return over_lead(each, len(lead))(split_key(key, lead), *flat)


def _check_ranks(sites: Sequence[Site], how: How) -> None:
    """Whether every rank is one that a new LoRA may have: only the SVD can choose it."""
    found = [f"{at.path} ({at.n_in} x {at.n_out}): {problem}" for at, method in
             ((site.target, site.method) for site in sites)
             for problem in method.problems(at.n_in, at.n_out)]  # fmt: skip
    if found:
        why = "adds the adapters' ranks up" if how == "cat" else "keeps the adapters' rank"
        raise UserError(f"{brief(found, '; ')}. how={how!r} {why}: use svd, which fits a lower one")


def _thin(
    site: Site, factors: Factors, target: Target, how: How
) -> tuple[jax.Array, jax.Array, float]:
    """``(left, right, scale)`` of an update; LoRA's own factors with its own scale, for what is
    done to entries depends on how the scale is shared between them."""
    if type(site.method) is LoRA:
        return factors["A"], factors["B"], site.method.scale
    try:
        _, folded = fold(site.method, factors, target)
    except UserError:
        other = "svd" if how in ("cat", "linear") else f"{how}_svd"
        raise UserError(
            f"{target.path}: the update of {site.method.name}, {site.method}, is no product of "
            f"thin matrices, which how={how!r} needs: use {other}"
        ) from None
    return folded["A"], folded["B"], 1.0


def _mixed(
    how: str, density: float, majority: Majority, key: jax.Array, tasks: jax.Array, weights: Any
) -> jax.Array:
    """Several matrices ``(tasks, n, m)`` as one ``(n, m)``."""
    if how.startswith("dare"):
        kept = jax.random.bernoulli(key, density, tasks.shape)
        tasks = jnp.where(kept, tasks / density, 0)
    elif how in ("ties", "magnitude_prune"):
        tasks = jax.vmap(partial(_largest, density=density))(tasks)
    weighted = tasks * weights[:, None, None]
    if not how.endswith("ties"):
        return weighted.sum(0)
    votes = tasks if majority == "total" else jnp.sign(tasks)
    agrees = jnp.sign(tasks) == jnp.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / jnp.maximum(agrees.sum(0), 1)


def _largest(matrix: jax.Array, density: float) -> jax.Array:
    """The share ``density`` of the entries, the largest, and 0 for the others."""
    flat = matrix.reshape(-1)
    _, kept = jax.lax.top_k(jnp.abs(flat), int(density * flat.size))
    return jnp.zeros_like(flat).at[kept].set(flat[kept]).reshape(matrix.shape)
