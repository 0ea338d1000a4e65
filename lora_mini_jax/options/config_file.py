"""Options to and from the JSON file that is saved with every run."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Any

from lora_mini_jax.errors import UserError, meant
from lora_mini_jax.files import read_object
from lora_mini_jax.options.adapter import MethodOptions
from lora_mini_jax.options.kinds import allowed, fitted
from lora_mini_jax.settings.spec import to_pairs

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def defaults_from(cls: "type[DataclassInstance]", path: str) -> Any:
    """An options object that holds what a ``config.json`` says, and else the command's defaults.

    A method's settings may stand there as ``"settings": ["rank=4"]`` or ``"rank": 4``. The object
    is made without checking how its values go together: the command line may yet change them. What
    must be given and is not in the file is the option parser's ``MISSING``.

    Raises:
        UserError: no such file, not JSON, not an object, a key that the command does not have, or a
            value of the wrong type.
    """
    from tyro import MISSING as REQUIRED  # of no use to those who only import the options

    given = read_object(path)
    for name in getattr(cls, "passed_over", ()) if "method" in given else ():  # it is a run's
        given.pop(name, None)
    values, settings = _checked(cls, path, given)
    options: Any = object.__new__(cls)
    for field in fields(cls):
        default = REQUIRED if field.default is MISSING else field.default
        object.__setattr__(options, field.name, values.get(field.name, default))
    if settings:
        object.__setattr__(options, "settings", (*options.settings, *to_pairs(settings)))
    return options


def _checked(cls: Any, path: str, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of options, as their annotations say, and those of a method's settings."""
    kinds = {field.name: field.type for field in fields(cls)}
    own = cls.setting_kinds() if issubclass(cls, MethodOptions) else {}
    values, settings, wrong, unknown = {}, {}, [], []
    for name, value in given.items():
        if name in kinds:
            try:
                values[name] = fitted(value, kinds[name])
            except TypeError:
                wrong.append(f"{name} is {json.dumps(value)}: give {allowed(kinds[name])}")
        elif name in own:
            settings[name] = value
        else:
            unknown.append(f"{name}{meant(name, {*kinds, *own})}")
    if len(unknown) > 3 and "method" in given:
        raise UserError(f"{path} is the config of another command, with {len(unknown)} options "
                        "that this one has not: leave those out")  # fmt: skip
    wrong += [f"no such option: {name}" for name in unknown]
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}")
    return values, settings


def to_json(options: "DataclassInstance") -> dict[str, Any]:
    """Options as `defaults_from` reads them back."""
    return json.loads(json.dumps(asdict(options)))


def defaults(options: "DataclassInstance") -> dict[str, Any]:
    """What options are that nobody gives, as `to_json` has them."""
    known = {f.name: f.default for f in fields(options) if f.default is not MISSING}
    return json.loads(json.dumps(known))


def differences(a: dict[str, Any], b: dict[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """``name: old -> new`` for every value that differs."""
    names = sorted((set(a) | set(b)) - set(ignore))
    return [f"{n}: {a.get(n)!r} -> {b.get(n)!r}" for n in names if a.get(n) != b.get(n)]
