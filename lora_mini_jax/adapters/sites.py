"""Which method adapts which kernel, checked before anything is computed."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.layers import brief
from lora_mini_jax.method import Method
from lora_mini_jax.methods.full import Full
from lora_mini_jax.selection import listing, matches
from lora_mini_jax.tree import Target


@dataclass(frozen=True)
class Site:
    """One adapted kernel: which it is, and by which method.

    Attributes:
        target: the kernel.
        method: what adapts it.
        owner: the path of the kernel whose leaves this one uses too; empty for leaves of its own.
    """

    target: Target
    method: Method
    owner: str = ""

    @property
    def n_trainable(self) -> int:
        """Trained parameters here, over all stacked layers; 0 where another kernel owns them."""
        if self.owner:
            return 0
        each = self.method.n_trainable(self.target.n_in, self.target.n_out)
        return math.prod(self.target.lead) * each


def plan_sites(
    method: Method,
    targets: Iterable[Target],
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    modules_to_save: Iterable[Target] = (),
) -> tuple[Site, ...]:
    """The sites of an adapter.

    Args:
        method: the method for every target that no override names.
        targets: the kernels, as `select` gives them.
        overrides: ``{regular expression: {field: value}}``, other hyper-parameters for some
            kernels: ``{"mlp": {"rank": 4, "alpha": 8.0}}``. Of several that set a field the last
            wins.
        modules_to_save: parameters trained whole beside the method: a head, norms, biases.

    Raises:
        UserError: targets that are none, a pattern that matches none of the targets, a field the
            method does not have, or kernels it cannot adapt: all of them in one message.
    """
    if not isinstance(method, Method):
        given = type(method).__name__ if isinstance(method, Mapping) else repr(method)[:60]
        raise UserError(f"{given} is no method: give one with its settings, after the parameters, "
                        "init(params, LoRA(rank=8), targets)")  # fmt: skip
    targets, modules_to_save, overrides = tuple(targets), tuple(modules_to_save), overrides or {}
    for given in (*targets, *modules_to_save):
        if not isinstance(given, Target):
            raise UserError(f"{given!r} is no target: choose some of linen.targets(model, params, "
                            "x) by select(targets, names), and modules_to_save by "
                            "select(parameters(params, targets), names)")  # fmt: skip
    if not isinstance(overrides, Mapping):
        raise UserError(f"overrides are {overrides!r}: give them as {{'mlp': {{'rank': 4}}}}")
    for pattern, settings in overrides.items():
        if not isinstance(settings, Mapping):
            raise UserError(f"override {pattern!r} is {settings!r}: give the settings that differ "
                            "by name, {'rank': 4}")  # fmt: skip
        if not any(matches(t, pattern) for t in targets):
            raise UserError(f"override {pattern!r} matches no kernel; {listing(targets)}")
    sites = []
    for target in targets:
        changed: dict[str, Any] = {}
        for pattern, settings in overrides.items():
            changed |= settings if matches(target, pattern) else {}
        try:
            sites.append(Site(target, method.with_settings(changed) if changed else method))
        except UserError as error:
            raise UserError(f"overrides of {target.path}, {changed}: {error}") from None
    sites += [Site(target, Full()) for target in modules_to_save]
    check_sites(sites)
    return tuple(sites)


def check_sites(sites: Iterable[Site], new: bool = True) -> None:
    """Raise one `UserError` that lists every kernel its method cannot adapt, or two claim.

    Where the leaves are not ``new`` but come from a file, ranks that only gain nothing are let be.
    """
    sites = tuple(sites)
    claims = Counter(site.target.path for site in sites)
    if twice := [path for path, n in claims.items() if n > 1]:
        raise UserError(f"{', '.join(twice)}: more than once among targets and modules_to_save; "
                        "give each once")  # fmt: skip
    found = []
    owning = {site.target.path for site in sites if not site.owner}
    found += [
        f"{site.target.path}: uses the leaves of {site.owner}, which has none"
        for site in sites
        if site.owner and site.owner not in owning
    ]
    for site in sites:
        target, method = site.target, site.method
        if target.kind == "array" and not method.adapts_any_array:
            problems = [f"no kernel, so {method.name} cannot adapt it"]
        elif target.read and not method.adapts_any_array:
            problems = ["the model uses it past this layer too, where the update would be missing: "
                        "train it whole (modules_to_save), or let the model call the layer there, "
                        "as nn.Embed.attend"]  # fmt: skip
        elif target.kind == "embed" and method.needs_data:
            problems = ["factors of a table are not made from data: take outer_init orthogonal"]
        elif method.any_rank and not new:
            problems = []
        else:
            problems = method.problems(target.n_in, target.n_out)
        found += [f"{target.path} ({target.n_in} x {target.n_out}): {p}" for p in problems]
    if found:
        raise UserError(
            f"{brief(found, '; ')}. Lower the setting, leave these kernels out (--exclude-modules; "
            "in Python the exclude of select), or give them settings of their own (--overrides; in "
            "Python the overrides of init)"
        )


def methods_of(sites: Iterable[Site]) -> list[Method]:
    """The methods of some sites, each once, in their order."""
    return list(dict.fromkeys(site.method for site in sites))


def by_method(sites: Iterable[Site]) -> dict[Method, list[str]]:
    """The paths of the kernels with leaves of their own, by their method."""
    groups: dict[Method, list[str]] = {}
    for site in sites:
        if not site.owner:
            groups.setdefault(site.method, []).append(site.target.path)
    return groups
