"""What tells the states of one run from those of another."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from lora_mini_jax.adapters.sites import methods_of
from lora_mini_jax.processes import on_host
from lora_mini_jax.training.train import TrainState


def identity(state: TrainState) -> dict[str, Any]:
    """What an adapter is drawn from and what updates it, as JSON: the random key, the methods with
    their settings, and digests of the kernels and of the optimiser's state. A few hundred bytes."""
    sites = state.adapter.sites
    methods = methods_of(sites)
    kernels = [(s.target.path, s.target.shape, methods.index(s.method), s.owner) for s in sites]
    return {
        "key": on_host(state.adapter.key).tolist(),
        "methods": [method.to_dict() for method in methods],
        "kernels": _digest(kernels),
        "optimiser": _digest([(x.shape, str(x.dtype)) for x in jax.tree.leaves(state.opt_state)]),
    }


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs in what was saved; empty where both are of the same run.

    Example:
        >>> differences({"key": [0, 1], "kernels": "ab"}, {"key": [0, 2], "kernels": "ab"})
        ['the key is [0, 1], not [0, 2]']
    """
    said = {
        "methods": f"the methods are {saved.get('methods')}, not {here.get('methods')}",
        "kernels": "other kernels are adapted",
        "optimiser": "the optimiser's state has other arrays",
    }
    wrong = [name for name in here if saved.get(name) != here[name]]
    return [said.get(n, f"the {n} is {saved.get(n)}, not {here[n]}") for n in wrong]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
