"""PEFT's AdaLoRA, ours under other names.

PEFT writes one that was pruned without the triplets that are out, and ``rank_pattern`` says which
those are; its scale stays ``alpha`` by the rank at the start. Here they come back as zeros: the
same function, and were it trained on, none of them has a gradient, and pruning takes them first.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Method
from lora_mini_jax.methods.adalora import AdaLoRA
from lora_mini_jax.peft.kinds.kind import Arrays, Kind, Leaf, plain, swap

_OURS = {
    "init_r": "rank", "target_r": "target_rank", "tinit": "tinit", "tfinal": "tfinal",
    "deltaT": "delta_t", "beta1": "beta1", "beta2": "beta2", "total_step": "total_steps",
    "orth_reg_weight": "orth_reg_weight", "lora_alpha": "alpha", "lora_dropout": "dropout",
}  # fmt: skip


_RANK_AXIS = {"lora_A": 0, "lora_E": 0, "lora_B": 1}


class AdaLoraKind(Kind):
    """``ADALORA``."""

    peft_type = "ADALORA"
    leaves: ClassVar = {
        AdaLoRA: {
            "A": Leaf("lora_A", swap, swap),
            "B": Leaf("lora_B", swap, swap),
            "E": Leaf("lora_E", lambda e: e[..., None], lambda e: e[..., 0]),
        }
    }
    settings = (*_OURS, "rank_pattern", "init_lora_weights", "fan_in_fan_out")
    required = ("init_r", "lora_alpha", "total_step")
    ignored = ("r",)

    def to_config(self, method: Any) -> dict[str, Any]:
        own = {theirs: plain(getattr(method, ours)) for theirs, ours in _OURS.items()}
        return own | {"target_r": method.goal}

    def of_config(self, config: Mapping[str, Any], module: str) -> Method:
        given = {ours: config[theirs] for theirs, ours in _OURS.items() if theirs in config}
        return AdaLoRA(**AdaLoRA.checked({"target_rank": 8, **given}))  # PEFT's default

    def restored(self, config: Mapping[str, Any], module: str, tensors: Arrays) -> Arrays:
        pattern = config.get("rank_pattern") or {}
        masks = [mask for name, mask in pattern.items() if name.split(".lora_E")[0] == module]
        if not masks:
            return tensors
        rank, kept = config["init_r"], masks[0]
        if not isinstance(kept, list) or set(map(type, kept)) != {bool} or len(kept) != rank:
            raise UserError(f"rank_pattern of {module} is {kept!r:.60}, no list of {rank} times "
                            "true or false: fetch it again")  # fmt: skip
        return {**tensors, **{name: _spread(tensors[name], axis, np.array(kept), module)
                              for name, axis in _RANK_AXIS.items() if name in tensors}}  # fmt: skip


def _spread(tensor: np.ndarray, axis: int, kept: np.ndarray, module: str) -> np.ndarray:
    """The tensor with zeros where a triplet was pruned."""
    if tensor.ndim != 2 or tensor.shape[axis] != kept.sum():
        raise UserError(f"{module} has a tensor {tensor.shape}, but rank_pattern leaves "
                        f"{kept.sum()} of {kept.size} triplets: fetch it again")  # fmt: skip
    whole = np.zeros((kept.size, tensor.shape[1 - axis]), np.float32)
    whole[kept] = tensor if axis == 0 else tensor.T
    return whole if axis == 0 else whole.T
