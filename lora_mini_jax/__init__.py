"""Parameter-efficient training for JAX and Flax: LoRA-Mini, LoRA and friends.

model, params              any Linen module and its parameters
targets = select(linen.targets(model, params, x), "q_proj|v_proj")
adapter = init(params, LoRAMini(rank=4), targets, key)
apply   = linen.adapt(model)         # apply(params, adapter, x)
merged  = merge(params, adapter)     # plain parameters again
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora_mini_jax.adapter import Adapter, count, init, join, merge, split, unmerge
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Method
from lora_mini_jax.methods.lora import LoRA
from lora_mini_jax.methods.lora_mini import LoRAMini
from lora_mini_jax.optim import freeze, trainable_mask
from lora_mini_jax.storage import load, save
from lora_mini_jax.train import TrainState, make_train_step
from lora_mini_jax.tree import Target, select

if TYPE_CHECKING:
    from lora_mini_jax import linen, models

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "LoRA",
    "LoRAMini",
    "Method",
    "Target",
    "TrainState",
    "UserError",
    "count",
    "freeze",
    "init",
    "join",
    "linen",
    "load",
    "make_train_step",
    "merge",
    "models",
    "save",
    "select",
    "split",
    "trainable_mask",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    # Flax costs as much to import as the rest together: it waits for its first use.
    if name in ("linen", "models"):
        return importlib.import_module(f"lora_mini_jax.{name}")
    raise AttributeError(f"module 'lora_mini_jax' has no attribute {name!r}")
