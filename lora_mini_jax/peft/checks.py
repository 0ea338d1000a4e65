"""What a setting of ``adapter_config.json`` may be; files come from strangers."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_mini_jax.peft.biases import is_setting


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, OverflowError):
        return False


def _is_piece(value: Any) -> bool:
    """Whether this is a regular expression that may stand behind another."""
    return _is_regex(value) and _is_regex(f".{value}")


def _each(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a value fits, or all values of a list do."""
    return all(map(fits, value if isinstance(value, list) else [value]))


_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("target_modules", "exclude_modules"), lambda v: _each(v, _is_regex),
     "neither a regular expression nor a list of names"),
    (("modules_to_save",), lambda v: isinstance(v, list) and _each(v, _is_piece),
     "no list of names"),
    (("layers_to_transform",), lambda v: _each(v, lambda layer: type(layer) is int),
     "neither a whole number nor a list of them"),
    (("layers_pattern",), lambda v: _each(v, _is_piece), "neither a name nor a list of names"),
    (("use_rslora", "use_dora", "fan_in_fan_out"), lambda v: isinstance(v, bool),
     "neither true nor false"),
    (("bias",), is_setting, "neither none nor all nor lora_only or the like"),
    (("rank_pattern", "alpha_pattern"), lambda v: isinstance(v, dict),
     "no object of numbers by module"),
)  # fmt: skip
"""Settings, what each must be where it is no null, and what it is where it is something else."""


def misfits(config: Mapping[str, Any]) -> list[str]:
    """The settings that are of another kind than PEFT's are, each with its value.

    Example:
        >>> misfits({"modules_to_save": "lm_head", "target_modules": None})
        ["modules_to_save is 'lm_head', no list of names"]
    """
    return [f"{name} is {value!r:.60}, {what}" for names, fits, what in _RULES for name in names
            if (value := config.get(name)) is not None and not fits(value)]  # fmt: skip
