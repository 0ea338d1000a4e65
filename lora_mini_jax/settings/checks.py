"""Checks of settings: what was given and what is allowed, in one line.

A setting is checked by a `require_...`, all fields of a config together by rules, see `problems`.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

from lora_mini_jax.errors import UserError

LARGEST = 2**31 - 1
"""The largest size of an array."""


def require_whole(name: str, value: Any, low: int = 1) -> None:
    """Raise `UserError` unless ``value`` is a whole number from ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UserError(
            f"{name} is {value!r:.60}: give a whole number from {low}{_of_python(value)}"
        )


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
        raise UserError(
            f"{name} is {value!r:.60}: give a finite number {allowed}{_of_python(value)}"
        )


def _of_python(value: Any) -> str:
    """What else is wrong with a number of NumPy's: settings are written to JSON."""
    return ", a number of Python's" if hasattr(value, "dtype") else ""


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Raise `UserError` unless ``value`` is one of a ``Literal``'s."""
    assert get_origin(choices) is Literal
    if value not in get_args(choices):
        raise UserError(f"{name} is {value!r:.60}: choose one of {', '.join(get_args(choices))}")


def is_real(value: Any) -> bool:
    """Whether this is a positive number, far from where float32 ends."""
    return isinstance(value, int | float) and value is not True and 1e-30 < value < 1e30


def is_size(value: Any, low: int = 1, high: int = LARGEST) -> bool:
    """Whether this is a whole number from ``low`` to ``high``."""
    return type(value) is int and low <= value <= high


@dataclass(frozen=True)
class Rule:
    """What each of some fields must be.

    Attributes:
        names: the fields.
        fits: whether a value is right.
        says: what is wrong, of a field's name and its value.
    """

    names: tuple[str, ...]
    fits: Callable[[Any], bool]
    says: Callable[[str, Any], str]


@dataclass(frozen=True)
class Joint:
    """How fields must go together; asked only where each of them is right by itself.

    Attributes:
        names: the fields.
        fits: whether a config is right.
        says: what is wrong, in which ``{c.name}`` is a value of the config.
    """

    names: tuple[str, ...]
    fits: Callable[[Any], bool]
    says: str


def problems(config: Any, rules: Iterable[Rule | Joint]) -> list[str]:
    """What breaks the rules in a config, in their order; each with its values."""
    found, wrong = [], set()
    for rule in rules:
        if isinstance(rule, Joint):
            if wrong.isdisjoint(rule.names) and not rule.fits(config):
                found.append(rule.says.format(c=config))
            continue
        bad = [name for name in rule.names if not rule.fits(getattr(config, name))]
        found += [rule.says(name, getattr(config, name)) for name in bad]
        wrong.update(bad)
    return found


def is_(what: str) -> Callable[[str, Any], str]:
    """`Rule.says` for a value that is ``what``: "not a whole number"."""
    return lambda name, value: f"{name}={value!r} is {what}"


def whole(*names: str, low: int = 1, high: int | None = None) -> Rule:
    """Whole numbers from ``low``, to ``high`` where that is given."""
    limits = f"from {low}" + (f" to {high}" if high else "")
    return Rule(names, lambda value: is_size(value, low, high or LARGEST),
                is_(f"not a whole number {limits}"))  # fmt: skip


def positive(*names: str) -> Rule:
    """Positive numbers, see `is_real`."""
    return Rule(names, is_real, is_("not a positive number"))


def flag(*names: str) -> Rule:
    """True or false."""
    return Rule(names, lambda value: isinstance(value, bool), is_("neither true nor false"))


def choice(name: str, allowed: Collection[Any], link: str = " ") -> Rule:
    """One of ``allowed``; ``link`` stands between the name and the value in what is said."""
    only = f"not supported, only {', '.join(map(repr, filter(None, allowed)))}"
    return Rule((name,), lambda value: value in tuple(allowed),  # it may be unhashable
                lambda name, value: f"{name}{link}{value!r} is {only}")  # fmt: skip


def multiple(name: str, of: str) -> Joint:
    """``name`` is a multiple of ``of``."""
    return Joint((name, of), lambda config: getattr(config, name) % getattr(config, of) == 0,
                 f"{name}={{c.{name}}} is not a multiple of {of}={{c.{of}}}")  # fmt: skip


def optional(rule: Rule, unset: Any = None) -> Rule:
    """The rule for fields that may also be ``unset``."""
    return replace(rule, fits=lambda value: (type(value) is type(unset) and value == unset)
                   or rule.fits(value))  # fmt: skip
