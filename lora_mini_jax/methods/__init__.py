"""The methods by name. A new one is its own file and one line here.

Example:
    >>> sorted(METHODS)[:3]
    ['adalora', 'diffora', 'dora']
"""

from typing import Any, get_type_hints

from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Method
from lora_mini_jax.methods.adalora import AdaLoRA
from lora_mini_jax.methods.diffora import DiffoRA
from lora_mini_jax.methods.dora import DoRA
from lora_mini_jax.methods.full import Full
from lora_mini_jax.methods.lora import LoRA, LoRAFA
from lora_mini_jax.methods.lora_mini import LoRAMini
from lora_mini_jax.methods.lora_xs import LoRAXS
from lora_mini_jax.methods.mini_diag import LoRAMiniDiag
from lora_mini_jax.methods.miss import MiSS
from lora_mini_jax.methods.pissa import OLoRA, PiSSA
from lora_mini_jax.methods.relora import ReLoRA
from lora_mini_jax.methods.switch_lora import SwitchLoRA
from lora_mini_jax.methods.vera import VeRA
from lora_mini_jax.settings.spec import split_spec

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LoRAMini,
        LoRAMiniDiag,
        LoRA,
        LoRAFA,
        DoRA,
        PiSSA,
        OLoRA,
        LoRAXS,
        VeRA,
        MiSS,
        SwitchLoRA,
        ReLoRA,
        AdaLoRA,
        DiffoRA,
        Full,
    )
}


def method_class(name: str) -> type[Method]:
    """The class a method's name stands for; an unknown name is a `UserError` listing them all."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}: choose one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def from_dict(record: dict[str, Any], *, with_data: bool = False) -> Method:
    """The inverse of `Method.to_dict`. A missing field takes its default; a method within a method
    may be a dict or a spec. ``with_data`` means the defaults where there is data to train on.

    Raises:
        UserError: an unknown method or field, or a value of the wrong type.

    Example:
        >>> from_dict({"method": "lora", "rank": 4})
        LoRA(dropout=0.0, rank=4, alpha=16.0, rslora=False)
    """
    settings = dict(record)
    cls = method_class(settings.pop("method", ""))
    hints = get_type_hints(cls)
    for name, value in settings.items():
        if hints.get(name) is Method and isinstance(value, str | dict):
            inner = of_spec(value) if isinstance(value, str) else value
            settings[name] = from_dict(inner, with_data=with_data)
    return cls(**cls.checked((cls.with_data(settings) if with_data else {}) | settings))


def from_spec(text: str) -> Method:
    """A method from its name and settings in words, see `split_spec`.

    Raises:
        UserError: as `from_dict`.

    Example:
        >>> from_spec("lora:rank=4").n_trainable(64, 32)
        384
    """
    return from_dict(of_spec(text))


def of_spec(text: str) -> dict[str, Any]:
    """The record that a method's name and settings in words stand for."""
    name, settings = split_spec(text)
    return {**settings, "method": name}
