"""What stands beside the kernels for the length of one call.

The factors of a kernel are put next to it in the parameters, so that ``scan``, ``remat`` and
``vmap`` slice them along; a dense update is added to the kernel itself.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from lora_mini_jax.adapters.adapter import Adapter, check_adapter
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.algebra.draws import as_key, fold_path, split_key
from lora_mini_jax.call.views import View
from lora_mini_jax.errors import UserError
from lora_mini_jax.layers import brief
from lora_mini_jax.tree import check_fit, dense, flatten, unflatten

Array = jax.Array
SUFFIX = "_factors"
DROPOUT = "dropout_key"


@partial(jax.tree_util.register_dataclass, data_fields=("factors",), meta_fields=("path", "call"))
@dataclass(frozen=True)
class _Beside:
    """What stands beside a parameter for the length of a call: its factors, perhaps none.

    ``path`` and ``call`` are part of the tree's structure, and so of the key under which ``nn.jit``
    keeps a traced layer. Without them a layer traced in another call, or at another place in the
    model, would be taken from there, un-adapted or with another place's adapter.
    """

    factors: dict[str, Array]
    path: str
    call: object


def marked(
    params: Mapping[str, Any], factors: Mapping[str, dict[str, Array]], call: object
) -> dict[str, Any]:
    """The parameters with a `_Beside` next to each, for the call that this object stands for."""
    flat = flatten(params)
    beside = {path + SUFFIX: _Beside(factors.get(path, {}), path, call) for path in flat}
    return unflatten({**flat, **beside})


def of_layer(module: Any, view: View, call: object) -> tuple[Array, Mapping[str, Array]] | None:
    """The kernel of a Linen layer in a call with `marked` parameters, and its factors; None in
    another model, applied in the midst of the call with parameters of its own."""
    beside = module.get_variable("params", view.leaf + SUFFIX)
    if not isinstance(beside, _Beside) or beside.call is not call:
        return None
    return dense(module.get_variable("params", view.leaf)), beside.factors


def prepared(
    params: Mapping[str, Any], adapter: Adapter, dropout_key: Array | None
) -> tuple[dict[str, Any], dict[str, dict[str, Array]]]:
    """The parameters as one call uses them, dense updates added, and every kernel's factors."""
    check_fit(params, [site.target for site in adapter.sites])
    factors = _used(adapter)
    own = {path: factors[path] | _dropout(site, dropout_key)
           for path, site in called_sites(adapter).items()}  # fmt: skip
    return _shifted(params, adapter, factors), own


def called_sites(adapter: Adapter) -> dict[str, Site]:
    """The sites that a layer's call adds something to, by path; an array is only replaced."""
    check_adapter(adapter)
    return {site.target.path: site for site in adapter.sites if site.target.kind != "array"}


def check_used(sites: Mapping[str, Site], used: Collection[str]) -> None:
    """Raise `UserError` unless the call used every adapted kernel."""
    if len(used) < len(sites):
        unused = [path for path in sites if path not in used]
        raise UserError(
            f"this call used {len(used)} of {len(sites)} adapted kernels; never used: "
            f"{brief(unused)}. Adapt only kernels that targets() lists for this call"
        )


def _used(adapter: Adapter) -> dict[str, dict[str, Array]]:
    """The factors without those that only training needs: they need not ride through a scan."""
    return adapter.without_scratch(adapter.factors())


def _shifted(params: Mapping[str, Any], adapter: Adapter, factors: Any) -> dict[str, Any]:
    """The parameters with every dense update added, in the parameters' own dtypes."""
    flat = flatten(params)
    for site in adapter.sites:
        path = site.target.path
        shift = site.method.shift(factors[path])
        if shift is not None:
            flat[path] = (dense(flat[path]) + site.target.unmatrix(shift)).astype(flat[path].dtype)
    return unflatten(flat)


def _dropout(site: Site, key: Array | None) -> dict[str, Array]:
    """The random stream of one kernel's dropout, a key for every stacked layer; data of keys, so
    that ``scan`` and ``vmap`` can slice it like any other leaf."""
    if key is None or not site.method.dropout:
        return {}
    own = fold_path(as_key(key), site.target.path)
    stack = site.target.shape[: site.target.stack]
    return {DROPOUT: jax.random.key_data(split_key(own, stack))}
