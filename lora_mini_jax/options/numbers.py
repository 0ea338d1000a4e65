"""Which numbers an option may be, whatever the command."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lora_mini_jax.errors import UserError, flag

COUNT, POSITIVE, LIMIT, NOT_NEGATIVE, SHARE, SEED = (
    "a whole number from 1",
    "a finite number above 0",
    "a number above 0, or inf",
    "a finite number from 0",
    "a number from 0 to 1",
    "a whole number from 0, below 2**32",
)
_FITS: dict[str, Callable[[Any], bool]] = {
    COUNT: lambda value: value >= 1,
    POSITIVE: lambda value: 0 < value < math.inf,
    LIMIT: lambda value: value > 0,
    NOT_NEGATIVE: lambda value: 0 <= value < math.inf,
    SHARE: lambda value: 0 <= value <= 1,
    SEED: lambda value: 0 <= value < 2**32,  # JAX takes others modulo 2**32, or not at all
}


def wrong_numbers(options: Any, allowed: Mapping[str, str]) -> list[str]:
    """What is wrong with the options that ``allowed`` names; None is not."""
    found = []
    for name, kind in allowed.items():
        given = getattr(options, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not _FITS[kind](value):
                found.append(f"{flag(name)} is {value}: give {kind}")
    return found


def check_numbers(options: Any, allowed: Mapping[str, str]) -> None:
    """Raise one `UserError` for all of `wrong_numbers`, where there are any."""
    if wrong := wrong_numbers(options, allowed):
        raise UserError("; ".join(wrong))
