"""Parameters and adapter as one: merged into plain kernels, or joined in one tree; and back."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from lora_mini_jax.adapters.adapter import Adapter, check_adapter, check_calibrated
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.tree import check_fit, flatten, kernels_of, over_lead, unflatten

SUFFIX = "_adapter"
"""Beside ``kernel``, a joined tree holds ``kernel_adapter: {"trainable": ..., "frozen": ...}``."""


def merge(params: Mapping[str, Any], adapter: Adapter, dtype: Any = None) -> dict[str, Any]:
    """Parameters of the plain model that computes the same: the adapter folded into the kernels.

    Computed in float32 whatever the kernels' dtype, then cast back to it: a bfloat16 kernel can
    lose a small update, so keep float32 parameters, merge at the very end, or give a ``dtype``.

    Args:
        params: the base parameters; only read.
        adapter: their adapter.
        dtype: of the merged kernels; None is that of each.

    Raises:
        UserError: an adapted kernel that ``params`` does not have, or in another shape; something
            else in the adapter's place; factors that come from data and have not been made yet; a
            dtype of no floating numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from lora_mini_jax import LoRA, Target, init
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}}
        >>> adapter = init(params, LoRA(rank=2), [Target("up/kernel", (8, 32))])
        >>> merge(params, adapter)["up"]["kernel"].shape
        (8, 32)
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"dtype {dtype!r} is none of floating numbers: give bfloat16, float32 or "
                        "the like")  # fmt: skip
    return _change(params, adapter, lambda method: method.merge, dtype)


def unmerge(merged: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The inverse of `merge` with the same adapter: takes the update out again (in float32).
    Where a merged kernel does not tell what it was, as DoRA's after a turn of more than a right
    angle, the result is another kernel; its class says when.

    Raises:
        UserError: as `merge`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lora_mini_jax import LoRA, Target, init
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}}
        >>> adapter = init(params, LoRA(rank=2), [Target("up/kernel", (8, 32))])
        >>> bool((unmerge(merge(params, adapter), adapter)["up"]["kernel"] == 1).all())
        True
    """
    return _change(merged, adapter, lambda method: method.unmerge)


def join(params: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """One tree: beside every adapted ``kernel`` its ``kernel_adapter`` subtree.

    For people who keep one tree, with `optim.freeze`; `split` takes it apart.

    Raises:
        UserError: as `merge`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lora_mini_jax import LoRA, Target, init
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}}
        >>> tree = join(params, init(params, LoRA(rank=2), [Target("up/kernel", (8, 32))]))
        >>> list(tree["up"]), list(tree["up"]["kernel_adapter"]["trainable"])
        (['kernel', 'kernel_adapter'], ['A', 'B'])
    """
    check_adapter(adapter)
    check_fit(params, [site.target for site in adapter.sites])
    flat = flatten(params)
    for site in adapter.sites:
        path = site.target.path
        for group, leaves in (("trainable", adapter.trainable), ("frozen", adapter.frozen)):
            for name, leaf in leaves.get(path, {}).items():
                flat[f"{path}{SUFFIX}/{group}/{name}"] = leaf
    return unflatten(flat, params)


def split(tree: Mapping[str, Any], adapter: Adapter) -> tuple[dict[str, Any], Adapter]:
    """The inverse of `join`: ``(params, adapter)``; ``adapter`` gives sites and key.

    Example:
        >>> import jax.numpy as jnp
        >>> from lora_mini_jax import LoRA, Target, init
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}}
        >>> adapter = init(params, LoRA(rank=2), [Target("up/kernel", (8, 32))])
        >>> plain, same = split(join(params, adapter), adapter)
        >>> list(plain["up"]), list(same.trainable["up/kernel"])
        (['kernel'], ['A', 'B'])
    """
    params: dict[str, Any] = {}
    own = [site.target.path for site in adapter.sites if not site.owner]
    parts: dict[str, dict[str, Factors]] = {
        group: {path: {} for path in own} for group in ("trainable", "frozen")
    }
    for path, leaf in flatten(tree).items():
        for group, part in parts.items():
            kernel, mark, name = path.rpartition(f"{SUFFIX}/{group}/")
            if mark and kernel in part:
                part[kernel][name] = leaf
                break
        else:
            params[path] = leaf
    return unflatten(params, tree), replace(adapter, **parts)


def _change(
    params: Mapping[str, Any],
    adapter: Adapter,
    choose: Callable[[Method], Callable],
    dtype: Any = None,
) -> dict[str, Any]:
    check_adapter(adapter)
    check_calibrated(adapter)
    kernels, flat = kernels_of(params, [s.target for s in adapter.sites]), flatten(params)
    factors = adapter.factors()
    for site in adapter.sites:
        target, path = site.target, site.target.path
        change = over_lead(choose(site.method), len(target.lead))
        changed = change(target.matrix(kernels[path]), factors[path])
        kept = flat[path].dtype if dtype is None else dtype
        flat[path] = target.unmatrix(changed).astype(kept)
    return unflatten(flat, params)
