"""What a ``config.json`` may say; files come from strangers."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from lora_mini_jax.errors import UserError
from lora_mini_jax.settings.checks import Rule, is_, is_size, whole

DEEPEST = 10_000


def depth(*names: str) -> Rule:
    """Numbers of layers."""
    return whole(*names, high=DEEPEST)


def is_ids(value: Any) -> bool:
    """Whether this is a token id, a tuple of them, or none."""
    ids = value if isinstance(value, tuple) else (value,)
    return all(each is None or is_size(each, 0) for each in ids)


def token_id(*names: str) -> Rule:
    """A token id."""
    return Rule(names, lambda value: is_size(value, 0), is_("no token id"))


def token_ids(*names: str) -> Rule:
    """A token id, a tuple of them, or none."""
    return Rule(names, is_ids, is_("no token id"))


def unsupported(
    hf: Mapping[str, Any], plain: Mapping[str, Any], what: str = "not supported"
) -> list[str]:
    """The keys of a ``config.json`` that say something else than ``plain``, of another model; a
    null says nothing."""
    return [f"{key} {hf[key]!r} is {what}, only {want!r}" for key, want in plain.items()
            if hf.get(key) not in (None, want)]  # fmt: skip


def missing(hf: Mapping[str, Any], required: Iterable[str]) -> list[str]:
    """One problem for all keys that must be there and are not."""
    absent = [key for key in required if hf.get(key) is None]
    return [f"missing {', '.join(absent)}"] if absent else []


def given(of: Any, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the dataclass ``of`` that a ``config.json`` gives. A null means none where the
    field may be that, else its default."""
    hints = get_type_hints(of)
    nullable = {name for name, hint in hints.items() if NoneType in get_args(hint)}
    return {f.name: hf[f.name] for f in fields(of)
            if f.name in hf and (hf[f.name] is not None or f.name in nullable)}  # fmt: skip


def read_fields(
    of: Any, hf: Mapping[str, Any], name: str, required: Iterable[str], plain: Mapping[str, Any]
) -> dict[str, Any]:
    """`given`, of a config that must have the ``required`` keys and be `plain <unsupported>`; lists
    become tuples.

    Args:
        name: of the model, for the error.

    Raises:
        UserError: keys that are missing, and settings that are not supported, in one line.
    """
    if bad := unsupported(hf, plain) + missing(hf, required):
        raise UserError(f"{name} config: {'; '.join(bad)}; use another model or its config.json")
    return {key: tuple(v) if isinstance(v, list) else v for key, v in given(of, hf).items()}
