"""The methods by name. A new one is its own file and one line here."""

from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Method
from lora_mini_jax.methods.lora import LoRA
from lora_mini_jax.methods.lora_mini import LoRAMini

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LoRA,
        LoRAMini,
    )
}


def method_class(name: str) -> type[Method]:
    """The class a method's name stands for; an unknown name is a `UserError` listing them all."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}: choose one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def from_dict(record: dict[str, Any]) -> Method:
    """The inverse of `Method.to_dict`. A missing field takes its default.

    Raises:
        UserError: an unknown method or field, or a value of the wrong type.

    Example:
        >>> from_dict({"method": "lora", "rank": 4})
        LoRA(rank=4, alpha=16.0)
    """
    settings = dict(record)
    return method_class(settings.pop("method", ""))().with_settings(settings)
