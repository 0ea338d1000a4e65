"""PEFT's LoRA, which is DoRA too, with ranks and alphas of their own for some modules."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from lora_mini_jax.method import Method
from lora_mini_jax.methods import LoRA, LoRAFA
from lora_mini_jax.methods.dora import DoRA
from lora_mini_jax.peft.kinds.kind import Arrays, Kind, Leaf, plain, swap

_FACTORS = {
    side: Leaf(f"lora_{side}", swap, swap, f"lora_{side}.weight", f"lora_embedding_{side}")
    for side in "AB"
}


class LoraKind(Kind):
    """``LORA``. Its embedding tables have tensors of their own names."""

    peft_type = "LORA"
    leaves: ClassVar = {
        LoRA: _FACTORS,
        LoRAFA: _FACTORS,
        DoRA: {**_FACTORS, "magnitude": Leaf("lora_magnitude_vector")},
    }
    settings = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
                "alpha_pattern", "init_lora_weights", "fan_in_fan_out")  # fmt: skip
    required = ("r", "lora_alpha")
    patterns: ClassVar = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    adapts_tables = True

    def to_config(self, method: Any) -> dict[str, Any]:
        own = {"r": method.rank, "lora_alpha": plain(method.alpha), "lora_dropout": method.dropout}
        rslora, dora = getattr(method, "rslora", False), isinstance(method, DoRA)
        return {**own, "use_rslora": rslora, "use_dora": dora}

    def of_config(self, config: Mapping[str, Any], module: str) -> Method:
        rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        rslora, dropout = config.get("use_rslora", False), config.get("lora_dropout", 0.0)
        return _method(rank, alpha, rslora, bool(config.get("use_dora")), dropout)


def of_tensors(tensors: Arrays, alpha: float, rslora: bool) -> Method:
    """The method of which a module has these tensors, by PEFT's names of leaves."""
    # One is enough: that the other is missing, or of another rank, is found later.
    ranks = [tensors[leaf].shape[axis] for leaf, axis in (("lora_A", 0), ("lora_B", -1))
             if leaf in tensors and tensors[leaf].ndim == 2]  # fmt: skip
    return _method(ranks[0] if ranks else 1, alpha, rslora, "lora_magnitude_vector" in tensors)


def _method(rank: int, alpha: float, rslora: bool, dora: bool, dropout: float = 0.0) -> LoRA | DoRA:
    if dora:
        # Our DoRA has no rslora: a larger alpha is the same.
        return DoRA(rank, float(alpha * rank**0.5 if rslora else alpha), dropout=dropout)
    return LoRA(rank, float(alpha), rslora, dropout=dropout)


def _by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """What a pattern says of a module, as PEFT reads it: the first expression that fits its end."""
    fits = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fits, default)
