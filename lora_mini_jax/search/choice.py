"""From DiffoRA's gates to an ordinary adapter: which kernels are kept, and what the others get.

A choice goes by scores, a number for each kernel, and keeps the highest in every layer. `openings`
are the scores that a search has learned; others can be given.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.errors import UserError
from lora_mini_jax.layers import place
from lora_mini_jax.methods.diffora import GATE, DiffoRA, Sharing
from lora_mini_jax.settings.checks import require_choice, require_number

Scores = Mapping[str, float]
"""What a kernel's adapter is worth, by the kernel's path."""


def gated(sites: Iterable[Site]) -> dict[str, DiffoRA]:
    """The kernels that have a gate: their methods by path."""
    return {site.target.path: site.method for site in sites if isinstance(site.method, DiffoRA)}


def common_method(sites: Iterable[Site]) -> DiffoRA | None:
    """The DiffoRA of all the sites, whatever their inner methods; None where no kernel has a gate.

    Raises:
        UserError: sites that differ in more than the inner method, or in that where one softmax
            goes over them; kernels stacked by ``nn.scan`` or ``nn.vmap``.
    """
    sites = tuple(sites)
    methods = gated(sites)
    if not methods:
        return None
    first, *others = dict.fromkeys(methods.values())
    if any(replace(other, inner=first.inner, dropout=0.0) != first for other in others):
        raise UserError(
            "overrides may change the inner method alone: a search has one rho, relaxation and "
            "sharing for all kernels"
        )
    if others and first.relaxation == "softmax":
        raise UserError(
            "a softmax over a layer needs one inner method in all of it: leave out the overrides, "
            "or take --relaxation sigmoid"
        )
    if stacked := [s.target.path for s in sites if s.target.path in methods and s.target.stack]:
        raise UserError(
            f"{stacked[0]} is a stack of layers, adapted as one: DiffoRA chooses layer by layer, "
            "use a model that keeps its layers apart (no nn.scan, no nn.vmap)"
        )
    return first


def openings(adapter: Adapter) -> dict[str, float]:
    """How wide each gate is open, by path; over the matrices of a kernel with many, the mean."""
    factors = adapter.factors()
    return {
        path: float(jnp.mean(method.opening(factors[path])))
        for path, method in gated(adapter.sites).items()
    }


def discretise(
    adapter: Adapter, rho: float, sharing: Sharing = "none", scores: Scores | None = None
) -> tuple[dict[str, Any], Adapter]:
    """Keep the kernels of the highest scores in every layer, as an adapter of the inner method.

    Of the ``N`` kernels of a layer ``max(1, round(rho N))`` are kept, with their leaves; the gate's
    factor is dropped, and training on makes up for it (ours: the paper does not say). The others
    get nothing, or share: the one with the highest score in a group lends its leaves to the others.

    Args:
        adapter: an adapter by DiffoRA, unstacked; sites of other methods stay as they are.
        rho: the share to keep, above 0, at most 1.
        sharing: as for `DiffoRA`.
        scores: by path; by default the `openings` of the gates.

    Returns:
        The matrix, JSON-ready: ``rows`` (layers), ``columns`` (modules), and for each row a list of
        ``gates`` (the scores) and one of ``chosen`` (booleans), None where a layer has no such
        module. And the adapter, which trains, merges and saves like any other.

    Raises:
        UserError: see `common_method`; no gates, or a setting or scores that are not as said.
    """
    methods = gated(adapter.sites)
    if common_method(adapter.sites) is None:
        raise UserError("no kernel has a gate: give an adapter by DiffoRA")
    require_number("rho", rho)
    require_choice("sharing", sharing, Sharing)
    scores = openings(adapter) if scores is None else scores
    if rho > 1 or set(scores) != set(methods):
        raise UserError(f"rho {rho} and scores of {', '.join(scores)}: rho is at most 1, and every "
                        f"kernel with a gate has a score: {', '.join(methods)}")  # fmt: skip
    chosen = _highest(scores, rho)
    owners = dict.fromkeys(chosen, "") | _shared(adapter.sites, chosen, scores, sharing)
    sites = []
    for site in adapter.sites:
        path = site.target.path
        if not isinstance(site.method, DiffoRA):
            sites.append(site)
        elif path in owners:
            sites.append(Site(site.target, site.method.inner, owners[path]))
    own = [site.target.path for site in sites if not site.owner]
    trainable = {
        path: {name: leaf for name, leaf in adapter.trainable[path].items() if name != GATE}
        for path in own
    }
    frozen = {path: adapter.frozen[path] for path in own}
    kept = replace(adapter, trainable=trainable, frozen=frozen, sites=tuple(sites))
    return _matrix(scores, chosen), kept


def _highest(scores: Scores, rho: float) -> set[str]:
    """The paths that are kept; of equal scores the first."""
    layers: dict[str, list[str]] = {}
    for path in scores:
        layers.setdefault(place(path)[0], []).append(path)
    kept = set()
    for paths in layers.values():
        ranked = sorted(paths, key=lambda path: -scores[path])
        kept |= set(ranked[: max(1, round(rho * len(paths)))])
    return kept


def _shared(
    sites: Iterable[Site], chosen: set[str], scores: Scores, sharing: Sharing
) -> dict[str, str]:
    """Whose leaves each kernel uses that was not chosen, empty for its own."""
    if sharing == "none":
        return {}
    groups: dict[Any, list[str]] = {}
    for site in sites:
        target, path = site.target, site.target.path
        if path in scores and path not in chosen:
            row, column = place(path)
            where = row if sharing == "layer" else column
            shape = target.lead, target.n_in, target.n_out
            groups.setdefault((where, shape, site.method), []).append(path)
    owners = {}
    for paths in groups.values():
        best = max(paths, key=lambda path: scores[path])
        owners |= {path: "" if path == best else best for path in paths}
    return owners


def _matrix(scores: Scores, chosen: set[str]) -> dict[str, Any]:
    """Scores and choice as layers by modules."""
    at = {place(path): path for path in scores}
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*at, strict=True))
    paths = [[at.get((row, column)) for column in columns] for row in rows]
    return {
        "rows": rows,
        "columns": columns,
        "gates": [[None if path is None else scores[path] for path in row] for row in paths],
        "chosen": [[None if path is None else path in chosen for path in row] for row in paths],
    }
