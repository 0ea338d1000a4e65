"""What full fine-tuning trains beside an adapter, as PEFT keeps it: modules and biases."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.transform import merge
from lora_mini_jax.errors import UserError
from lora_mini_jax.peft.advice import BIASES
from lora_mini_jax.peft.biases import chosen
from lora_mini_jax.peft.names import Place
from lora_mini_jax.peft.targeting import modules_to_save
from lora_mini_jax.peft.tensors import PREFIX
from lora_mini_jax.tree import dense, flatten, float32, unflatten


def kept_whole(
    adapter: Adapter,
    params: Mapping[str, Any],
    found: Mapping[str, Place],
    adapted: Collection[str],
    only_bias: str,
    keeps_layout: bool,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the part of the config.

    Args:
        adapter: its sites those of full fine-tuning alone.
        params: the base's parameters.
        found: the place of each.
        adapted: the modules with an adapter.
        only_bias: `Kind.only_bias`.
        keeps_layout: whether linear kernels are stored (in, out).

    Raises:
        UserError: parts of what PEFT keeps whole or not at all.
    """
    everything = [name for place in found.values() for name in place.tensors]
    trained = {name for site in adapter.sites for name in found[site.target.path].tensors}
    bias = chosen(trained, adapted, everything, only_bias)
    modules = {name.rpartition(".")[0] for name in trained - bias.tensors}
    saved = modules_to_save(modules, adapted, everything) or None
    arrays = {}
    for name, value in _values(adapter, params, found, modules, keeps_layout).items():
        module, _, leaf = name.rpartition(".")
        if module in modules or name in bias.tensors:
            inner = ".base_layer" if module in adapted else ""
            arrays[f"{PREFIX}{module}{inner}.{leaf}"] = value
    return arrays, {"modules_to_save": saved, "bias": bias.setting}


def _values(
    adapter: Adapter,
    params: Mapping[str, Any],
    found: Mapping[str, Place],
    modules: set[str],
    keeps_layout: bool,
) -> dict[str, np.ndarray]:
    """What is trained, and what else is in these modules, by tensor."""
    flat = flatten(params)
    trained = {site.target.path: float32(flat[site.target.path]) for site in adapter.sites}
    values = flatten(merge(unflatten(trained), adapter)) if trained else {}
    whole = {}
    for path, place in found.items():
        if path not in values and modules.isdisjoint(place.modules):
            continue
        if path not in values and len(place.shape) > 1:
            raise UserError(
                f"PEFT saves modules whole, and {path} is in one of which another parameter is "
                f"trained: add it to modules_to_save; {BIASES}"
            )
        for name, tensor in place.split(values.get(path, dense(flat[path]))).items():
            whole[name] = place.to_torch(tensor, keeps_layout)
    return whole
