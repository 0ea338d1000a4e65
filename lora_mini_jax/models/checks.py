"""What a value of a ``config.json`` may be; files come from strangers."""

from typing import Any

LARGEST = 2**31 - 1
DEEPEST = 10_000


def is_real(value: Any) -> bool:
    """Whether this is a positive number, far from where float32 ends."""
    return isinstance(value, int | float) and value is not True and 1e-30 < value < 1e30


def is_size(value: Any, least: int = 1) -> bool:
    """Whether this is a whole number, not below ``least``, that an array may be large."""
    return type(value) is int and least <= value <= LARGEST


def is_depth(value: Any) -> bool:
    """Whether this is a number of layers."""
    return is_size(value) and value <= DEEPEST


def is_id(value: Any) -> bool:
    """Whether this is a token id, or none."""
    return value is None or is_size(value, 0)


def is_flag(value: Any) -> bool:
    """Whether this is true or false."""
    return isinstance(value, bool)
