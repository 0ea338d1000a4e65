"""What a value of a ``config.json`` may be; files come from strangers."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.models.activations import ACTIVATIONS

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


def is_ids(value: Any) -> bool:
    """Whether this is a token id, a tuple of them, or none."""
    return all(map(is_id, value if isinstance(value, tuple) else (value,)))


def is_activation(value: Any) -> bool:
    """Whether this names one of `ACTIVATIONS`."""
    return isinstance(value, str) and value in ACTIVATIONS


def is_flag(value: Any) -> bool:
    """Whether this is true or false."""
    return isinstance(value, bool)


ACTIVATION = f"not supported, only {', '.join(map(repr, ACTIVATIONS))}"
"""What a name that is none of `ACTIVATIONS` is."""
Rule = tuple[Iterable[str], Callable[[Any], bool], str]
"""Fields of a config, what each of them must be, and what it is where it is not."""


def problems(config: Any, rules: Iterable[Rule]) -> list[str]:
    """The fields of a config that break a rule, each with its value."""
    return [f"{name}={getattr(config, name)!r} is {what}" for names, fits, what in rules
            for name in names if not fits(getattr(config, name))]  # fmt: skip


def read_fields(
    of: Any, hf: dict[str, Any], name: str, required: Iterable[str], plain: dict[str, Any]
) -> dict[str, Any]:
    """The fields of the dataclass ``of`` that a ``config.json`` gives; lists become tuples.

    Args:
        of: the dataclass; a null means none where that is a type of the field, else the default.
        name: of the model, for the error.
        required: the keys that must be there.
        plain: what other keys must be, where they are there: anything else is another model.

    Raises:
        UserError: keys that are missing, and settings that are not supported, in one line.
    """
    bad = [f"{key} {hf[key]!r} is not supported, only {want!r}" for key, want in plain.items()
           if hf.get(key) not in (None, want)]  # fmt: skip
    if missing := [key for key in required if hf.get(key) is None]:
        bad.append(f"missing {', '.join(missing)}")
    if bad:
        raise UserError(f"{name} config: {'; '.join(bad)}; use another model or its config.json")
    given = {f.name: hf[f.name] for f in fields(of)
             if f.name in hf and (hf[f.name] is not None or "None" in str(f.type))}  # fmt: skip
    return {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
