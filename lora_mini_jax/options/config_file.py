"""Options to and from the JSON file that is saved with every run."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import read_object

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def from_file(cls: "type[DataclassInstance]", path: str) -> Any:
    """The options of a command as its saved ``config.json`` has them.

    Raises:
        UserError: no such file, not JSON, not an object, or a key the command does not have.
    """
    values = read_object(path)
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise UserError(
            f"{path}: unknown option {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise UserError(f"{path}: a value of the wrong type: {error}") from None


def to_json(options: "DataclassInstance") -> dict[str, Any]:
    """Options as `from_file` reads them back."""
    return json.loads(json.dumps(asdict(options)))


def defaults(options: "DataclassInstance") -> dict[str, Any]:
    """What options are that nobody gives, as `to_json` has them."""
    known = {f.name: f.default for f in fields(options) if f.default is not MISSING}
    return json.loads(json.dumps(known))


def differences(a: dict[str, Any], b: dict[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """``name: old -> new`` for every value that differs."""
    names = sorted((set(a) | set(b)) - set(ignore))
    return [f"{n}: {a.get(n)!r} -> {b.get(n)!r}" for n in names if a.get(n) != b.get(n)]
