"""A method and its settings as people write them: ``lora-mini:rank=4,a=32``."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lora_mini_jax.errors import UserError


def split_spec(text: str) -> tuple[str, dict[str, Any]]:
    """``name:key=value,...`` or ``name(key=value,...)`` as name and settings.

    Values are numbers, true, false, or else words; a word may itself be such a text, in the form
    with brackets.

    Raises:
        UserError: a setting without ``=``, or brackets that do not close.

    Example:
        >>> split_spec("diffora:inner=lora-mini(rank=4,a=16),rho=0.5")
        ('diffora', {'inner': 'lora-mini(rank=4,a=16)', 'rho': 0.5})
    """
    name, colon, rest = text.partition(":")
    if "(" in name or (not colon and "(" in text):
        name, _, rest = text.partition("(")
        if not rest.endswith(")"):
            raise UserError(f"{text!r}: the bracket does not close; write lora-mini(rank=4,a=32)")
        rest = rest[:-1]
    return name, parse_settings(_split(rest), text)


def parse_settings(pairs: Iterable[str], spec: str) -> dict[str, Any]:
    """``["rank=4", "rslora=true"]`` as ``{"rank": 4, "rslora": True}``; ``spec`` is for errors."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(
                f"{spec!r}: {pair!r} is not a setting; write like lora-mini:rank=4,a=32"
            )
        found[name.strip().replace("-", "_")] = parse_value(value.strip())
    return found


def parse_value(text: str) -> Any:
    """A number, true or false in JSON's words; anything else is text as it stands."""
    try:
        value = json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, int | float | dict) else text


def to_pairs(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The inverse of `parse_settings`.

    >>> to_pairs({"rank": 4, "rslora": True, "mode": "bat"})
    ('rank=4', 'rslora=true', 'mode=bat')
    """
    return tuple(f"{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in settings.items())


def to_spec(method: Mapping[str, Any], form: str = "{}:{}") -> str:
    """A method's `to_dict` as people write it, and as `split_spec` reads it.

    Example:
        >>> to_spec({"method": "diffora", "inner": {"method": "lora", "rank": 4}, "rho": 0.5})
        'diffora:inner=lora(rank=4),rho=0.5'
    """
    given = {n: v for n, v in method.items() if n != "method" and v is not None}
    inner = {n: to_spec(v, "{}({})") for n, v in given.items() if isinstance(v, Mapping)}
    return form.format(method["method"], ",".join(to_pairs(given | inner)))


def _split(text: str) -> list[str]:
    """At the commas that are not within brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "({[") - (c in ")}]")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part for part in parts if part.strip()]
