"""Whether a value from a JSON file is of the kind that an option is annotated with."""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    NoneType: "null",
}


def fitted(value: Any, kind: Any) -> Any:
    """The value as an option of this kind has it: a list as a tuple, and 1 as 1.0 for a float.

    Raises:
        TypeError: a value of another kind.

    Example:
        >>> fitted([1, 2], tuple[float, ...])
        (1.0, 2.0)
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            try:
                return fitted(value, part)
            except TypeError:
                pass
    elif origin is tuple and isinstance(value, list):
        return tuple(fitted(each, parts[0]) for each in value)
    elif origin is Literal and value in parts:
        return value
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    raise TypeError(f"{value!r} is not {allowed(kind)}")


def allowed(kind: Any) -> str:
    """What fits, in words.

    Example:
        >>> allowed(int | None)
        'a whole number or null'
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(allowed, parts))
    if origin is tuple:
        return f"a list, each {allowed(parts[0])}"
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    return _WORDS[kind]
