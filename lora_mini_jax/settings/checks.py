"""Checks of a setting: what was given and what is allowed, in one line."""

import math
from typing import Any, Literal, get_args, get_origin

from lora_mini_jax.errors import UserError


def require_whole(name: str, value: Any, low: int = 1) -> None:
    """Raise `UserError` unless ``value`` is a whole number from ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UserError(f"{name} is {value!r}: give a whole number from {low}{_of_python(value)}")


def require_number(
    name: str, value: Any, low: float | None = None, below: float = math.inf
) -> None:
    """Raise `UserError` unless ``value`` is finite, above 0 (or from ``low``, where given), and
    below ``below``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = number and math.isfinite(value) and (value > 0 if low is None else value >= low)
    if not fits or value >= below:
        allowed = "above 0" if low is None else f"from {low}"
        allowed += "" if below == math.inf else f", below {below}"
        raise UserError(f"{name} is {value!r}: give a finite number {allowed}{_of_python(value)}")


def _of_python(value: Any) -> str:
    """What else is wrong with a number of NumPy's: settings are written to JSON."""
    return ", a number of Python's" if hasattr(value, "dtype") else ""


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Raise `UserError` unless ``value`` is one of a ``Literal``'s."""
    assert get_origin(choices) is Literal
    if value not in get_args(choices):
        raise UserError(f"{name} is {value!r}: choose one of {', '.join(get_args(choices))}")
