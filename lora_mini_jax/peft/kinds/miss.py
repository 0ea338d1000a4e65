"""PEFT's MiSS, in all its modes; of kernels that are stored (in, out) it has none."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lora_mini_jax.method import Method
from lora_mini_jax.methods import MiSS
from lora_mini_jax.peft.kinds.kind import Kind, Leaf


class MissKind(Kind):
    """``MISS``, where the mode is a way to initialise."""

    peft_type = "MISS"
    leaves: ClassVar = {MiSS: {"D": Leaf("miss_block")}}
    settings = ("r", "mini_r", "init_weights", "miss_dropout")
    required = ("r",)
    only_bias = "MiSS_only"

    def to_config(self, method: Any) -> dict[str, Any]:
        mode = True if method.mode == "miss" else method.mode
        own = {"r": method.rank, "mini_r": method.mini_rank, "init_weights": mode}
        return {**own, "miss_dropout": method.dropout}

    def of_config(self, config: Mapping[str, Any], module: str) -> Method:
        mode = config.get("init_weights", True)
        mode, mini = "miss" if isinstance(mode, bool) else mode, config.get("mini_r", 1)
        return MiSS(config["r"], mode, mini, dropout=config.get("miss_dropout", 0.0))
