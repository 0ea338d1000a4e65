"""The settings with which a method trains about so many parameters."""

from collections.abc import Iterable

from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Method
from lora_mini_jax.tree import Target


def within(method: Method, targets: Iterable[Target], budget: int) -> tuple[Site, ...]:
    """Sites with the largest size of the method that trains at most ``budget`` parameters in all.

    Every kernel gets the same size, cut where a kernel is smaller (`Method.sized`): for most
    methods that is the rank; for LoRA-Mini it is ``a`` and ``b``, and a rank in proportion. Sizes
    that do not fit some kernel, a rank that must divide it for one, are passed over. A budget above
    what the largest size trains gives the largest.

    Args:
        method: with all other settings as they are to be.
        targets: the kernels, as `select` gives them.
        budget: trained parameters over all of them.

    Raises:
        UserError: a method without a size, or a budget below what its smallest size trains.

    Example:
        >>> from lora_mini_jax.methods import LoRAMini
        >>> (site,) = within(LoRAMini(), [Target("up/kernel", (256, 512))], 300)
        >>> site.method.rank, site.method.a, site.method.b, site.n_trainable
        (4, 37, 37, 296)
    """
    targets = tuple(targets)
    most = max((max(t.n_in, t.n_out) for t in targets), default=0)
    best: tuple[Site, ...] = ()
    smallest = None
    for size in range(1, most + 1):
        sites = _sites(method, targets, size)
        if sites is None:
            continue
        trained = sum(site.n_trainable for site in sites)
        smallest = trained if smallest is None else smallest
        if trained > budget:
            break
        best = sites
    if not best:
        least = "no size fits these kernels" if smallest is None else f"at least {smallest:,}"
        raise UserError(
            f"{method.name} cannot train as few as {budget:,} parameters on {len(targets)} "
            f"kernels: {least}. Raise the budget, or adapt fewer kernels"
        )
    return best


def _sites(method: Method, targets: tuple[Target, ...], size: int) -> tuple[Site, ...] | None:
    """The sites at one size, or None where it does not fit."""
    shapes = {(target.n_in, target.n_out) for target in targets}
    methods = {shape: method.sized(size, *shape) for shape in shapes}
    if any(own.problems(*shape) for shape, own in methods.items()):
        return None
    return tuple(Site(target, methods[target.n_in, target.n_out]) for target in targets)
