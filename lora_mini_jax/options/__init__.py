"""The options of every command: typed, checked before any work, readable from a JSON file."""

from lora_mini_jax.options.adapter import BASE, AdapterOptions, MethodOptions, one_or_names
from lora_mini_jax.options.commands import (
    Demo,
    Export,
    Generate,
    Inspect,
    Merge,
    Methods,
    Predict,
)
from lora_mini_jax.options.compare import Compare
from lora_mini_jax.options.config_file import defaults, defaults_from, differences, to_json
from lora_mini_jax.options.finetune import Finetune
from lora_mini_jax.options.plan import PlanStep
from lora_mini_jax.options.pretrain import Pretrain
from lora_mini_jax.options.training import Training

__all__ = [
    "BASE",
    "AdapterOptions",
    "Compare",
    "Demo",
    "Export",
    "Finetune",
    "Generate",
    "Inspect",
    "Merge",
    "MethodOptions",
    "Methods",
    "PlanStep",
    "Predict",
    "Pretrain",
    "Training",
    "defaults",
    "defaults_from",
    "differences",
    "one_or_names",
    "to_json",
]
