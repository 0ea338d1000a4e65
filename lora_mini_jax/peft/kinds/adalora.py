"""PEFT's AdaLoRA before pruning, ours under other names."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lora_mini_jax.method import Method
from lora_mini_jax.methods.adalora import AdaLoRA
from lora_mini_jax.peft.kinds.kind import Kind, Leaf, plain, swap

_OURS = {
    "init_r": "rank", "target_r": "target_rank", "tinit": "tinit", "tfinal": "tfinal",
    "deltaT": "delta_t", "beta1": "beta1", "beta2": "beta2", "total_step": "total_steps",
    "orth_reg_weight": "orth_reg_weight", "lora_alpha": "alpha", "lora_dropout": "dropout",
}  # fmt: skip


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
    settings = (*_OURS, "init_lora_weights", "fan_in_fan_out")
    required = ("init_r", "lora_alpha", "total_step")
    ignored = ("r",)

    def to_config(self, method: Any) -> dict[str, Any]:
        own = {theirs: plain(getattr(method, ours)) for theirs, ours in _OURS.items()}
        return own | {"target_r": method.goal}

    def of_config(self, config: Mapping[str, Any], module: str) -> Method:
        given = {ours: config[theirs] for theirs, ours in _OURS.items() if theirs in config}
        return AdaLoRA(**AdaLoRA.checked({"target_rank": 8, **given}))  # PEFT's default
