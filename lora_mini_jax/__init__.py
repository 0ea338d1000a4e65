"""Parameter-efficient training for JAX and Flax: LoRA-Mini, LoRA and friends.

model, params              any Linen module and its parameters
targets = select(linen.targets(model, params, x), "q_proj|v_proj")
adapter = init(params, LoRAMini(rank=4), targets, key)
apply   = linen.adapt(model)         # apply(params, adapter, x)
adapter = calibrate(adapter, params, loss_fn, batches)    # for factors that come from data
step    = make_train_step(loss_fn, tx)                    # TrainState to TrainState
merged  = merge(params, adapter)     # plain parameters again; save and load keep adapters
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_mini_jax import checkpoint as checkpoint
    from lora_mini_jax import data as data
    from lora_mini_jax import hardware as hardware
    from lora_mini_jax import linen, methods, models, nnx, peft
    from lora_mini_jax import quantized as quantized
    from lora_mini_jax import sharding as sharding
    from lora_mini_jax.adapters.adapter import Adapter, count, init
    from lora_mini_jax.adapters.banks import bank, mixed
    from lora_mini_jax.adapters.combination import combine
    from lora_mini_jax.adapters.transform import join, merge, split, unmerge
    from lora_mini_jax.errors import UserError
    from lora_mini_jax.generation.generate import generate
    from lora_mini_jax.method import Method
    from lora_mini_jax.methods import LoRA, LoRAMini
    from lora_mini_jax.saved.storage import load, save
    from lora_mini_jax.selection import select
    from lora_mini_jax.training.calibration import calibrate
    from lora_mini_jax.training.optim import freeze, trainable_mask
    from lora_mini_jax.training.train import TrainState, make_train_step
    from lora_mini_jax.tree import Target, parameters

__version__ = "0.1.0"

# Where each public name lives. They are imported at their first use, so that the command line can
# print its help without waiting for JAX.
_HOMES = {
    "adapters.adapter": ("Adapter", "count", "init"),
    "adapters.banks": ("bank", "mixed"),
    "adapters.combination": ("combine",),
    "adapters.transform": ("join", "merge", "split", "unmerge"),
    "errors": ("UserError",),
    "generation.generate": ("generate",),
    "method": ("Method",),
    "methods": ("LoRA", "LoRAMini"),
    "saved.storage": ("load", "save"),
    "selection": ("select",),
    "training.calibration": ("calibrate",),
    "training.optim": ("freeze", "trainable_mask"),
    "training.train": ("TrainState", "make_train_step"),
    "tree": ("Target", "parameters"),
}
_MODULES = ("checkpoint", "data", "hardware", "linen", "methods", "models", "nnx", "peft",
            "quantized", "sharding")  # fmt: skip

__all__ = [
    "Adapter",
    "LoRA",
    "LoRAMini",
    "Method",
    "Target",
    "TrainState",
    "UserError",
    "bank",
    "calibrate",
    "combine",
    "count",
    "freeze",
    "generate",
    "init",
    "join",
    "linen",
    "load",
    "make_train_step",
    "merge",
    "methods",
    "mixed",
    "models",
    "nnx",
    "parameters",
    "peft",
    "save",
    "select",
    "split",
    "trainable_mask",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lora_mini_jax.{name}")
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"lora_mini_jax.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'lora_mini_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
