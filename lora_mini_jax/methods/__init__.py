"""The methods by name. A new one is its own file and one line here."""

from dataclasses import fields
from typing import Any, get_type_hints

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
    values = dict(record)
    cls = method_class(values.pop("method", ""))
    unknown = sorted(set(values) - set(cls.field_names()))
    if unknown:
        raise UserError(
            f"{cls.name} has no option {', '.join(unknown)}: choose from "
            f"{', '.join(cls.field_names())}"
        )
    hints = get_type_hints(cls)
    for field in fields(cls):
        if hints[field.name] is float and isinstance(values.get(field.name), int):
            values[field.name] = float(values[field.name])
    return cls(**values)
