"""The options of every command: typed, checked before any work, readable from a JSON file."""

from lora_mini_jax.options.adapter import BASE, AdapterOptions
from lora_mini_jax.options.commands import Demo, Generate, Inspect, Merge
from lora_mini_jax.options.config_file import differences, from_file, to_json
from lora_mini_jax.options.finetune import Compare, Finetune

__all__ = [
    "BASE",
    "AdapterOptions",
    "Compare",
    "Demo",
    "Finetune",
    "Generate",
    "Inspect",
    "Merge",
    "differences",
    "from_file",
    "to_json",
]
