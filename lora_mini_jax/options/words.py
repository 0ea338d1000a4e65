"""What is done with the command line's words before and after the option parser sees them."""

import operator
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import MISSING, fields
from itertools import dropwhile, pairwise, takewhile
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from lora_mini_jax.errors import UserError, flag, meant
from lora_mini_jax.options.adapter import BASE, MethodOptions


def take_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """``argv`` without ``--config FILE``, and the file.

    Raises:
        UserError: no file, or several.
    """
    kept, files, words = [], [], deque(argv)
    while words:
        word = words.popleft()
        if word.startswith("--config="):
            files.append(word.partition("=")[2])
        elif word == "--config":
            files.append(words.popleft() if words and not words[0].startswith("--") else "")
        else:
            kept.append(word)
    if "" in files:
        raise UserError("--config needs a file: --config runs/finetune/config.json")
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times: give one file")
    return kept, files[0] if files else None


def settings_as_words(argv: list[str], cls: Any, before: Sequence[str]) -> list[str]:
    """``argv`` with the flags that are a method's own (``--rank 4``) moved into ``--settings``,
    after those ``before``, which a config file gives.

    Raises:
        UserError: both ways mixed, or a flag without a value.
    """
    if cls is None or not issubclass(cls, MethodOptions):
        return argv
    known = {field.name for field in fields(cls)} | {"help"}
    if all(_flag(word) in known for word in argv if word.startswith("--")):
        return argv
    kinds = cls.setting_kinds()  # imports jax, which --help can do without
    kept, settings, words = [], [], deque(argv)
    while words:
        word = words.popleft()
        name, (_, equals, value) = _flag(word), word.partition("=")
        if not word.startswith("--") or name in known or name not in kinds:
            kept.append(word)
            continue
        if not equals:
            if words and not words[0].startswith("--"):
                value = words.popleft()
            elif kinds[name] is bool:
                value = "true"
            else:
                raise UserError(f"{word} needs a value; lora-mini methods shows the defaults")
        settings.append(f"{name}={value}")
    if settings and any(_flag(word) == "settings" for word in kept if word.startswith("--")):
        raise UserError("give the method's settings as --settings or as flags, not both ways")
    return [*kept, *(["--settings", *before, *settings] if settings else [])]


def unknown(words: Sequence[str], cls: Any) -> str:
    """The options that a command does not have, with those that may have been meant; or nothing."""
    kinds = {field.name: field.type for field in fields(cls)}
    names = {*kinds, "help", *(f"no-{name}" for name, kind in kinds.items() if kind is bool)}
    if issubclass(cls, MethodOptions):
        names |= set(cls.setting_kinds())
    flags = set(map(flag, names))
    given = dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--"))
    said = [f"{word}{meant(word, flags)}" for word in given if word.replace("_", "-") not in flags]
    return f"no such option: {', '.join(said)}" if said else ""


def mistakes(words: Sequence[str], cls: Any, default: Any = None) -> str:
    """What the options of a command lack or may not be, all of it; or nothing. Options that are in
    ``default``, which a config file gives, are not missing."""
    from tyro import MISSING as REQUIRED

    given = {_flag(word) for word in words if word.startswith("--")}
    need = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
    need = [name for name in need if getattr(default, name, REQUIRED) is REQUIRED]
    lacking = f"missing: {', '.join(map(flag, need))}" if need else ""
    # An option that is not known may be a required one that is written wrongly.
    said = [unknown(words, cls) or lacking, *_no_choices(words, cls)]
    return "; ".join(filter(None, said))


def _no_choices(words: Sequence[str], cls: Any) -> list[str]:
    """The options that are given another word than those they choose from."""
    kinds, found = {field.name: field.type for field in fields(cls)}, []
    for word, after in pairwise([*words, "--"]):
        name, (_, equals, value) = _flag(word), word.partition("=")
        value = value if equals else after
        choices = _choices(kinds.get(name)) if word.startswith("--") else ()
        none = value == "None" and NoneType in get_args(kinds.get(name))
        no_value = not equals and value.startswith("--")
        if choices and value not in choices and not none and not no_value:
            *others, last = choices
            found.append(f"{flag(name)} is {value!r}: choose {', '.join(others)} or {last}")
    return found


def _choices(kind: Any) -> tuple[str, ...]:
    """The words that an option of this kind chooses from; of another kind none.

    Example:
        >>> _choices(Literal["int8", "nf4"] | None)
        ('int8', 'nf4')
    """
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next(filter(None, map(_choices, get_args(kind))), ())


def _flag(word: str) -> str:
    """``--lora-plus-ratio=2`` as the option's name, ``lora_plus_ratio``."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def defaults_in_words() -> Any:
    """Within this context ``--help`` shows no path of this machine as a default, and a line break
    as people write it."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    def shown(text: str) -> list[str]:
        said = "the model in the package" if text == BASE else text
        return [said.encode("unicode_escape").decode()]

    def rule(info: Any) -> Any:
        if info.type is not str:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="STR",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=shown,
        )

    registry = ConstructorRegistry()
    registry.primitive_rule(rule)
    return registry


_SAID = {
    r"Error parsing (--\S+): invalid literal for int.* 10: (.*)": r"\1 is \2: give a whole number",
    r"Error parsing (--\S+): could not convert string.*?: (.*)": r"\1 is \2: give a number",
    r"Error parsing (--\S+): no type matching \{None\}\|INT .* \[(.*)\]\.": (
        r"\1 is \2: give a whole number"
    ),
    r"Error parsing (--\S+): Could not find .*: \[(.*)\]": r"\1 is \2: give whole numbers",
    r"Missing value for argument '(\S+)'.*": r"\1 needs a value",
    r"Unrecognized options: (.*)": r"no option takes \1",
    r"Error parsing \w+: (.*)": r"\1",
}
"""What the option parser says, and what is said instead."""


def parsers_error(text: str) -> str:
    """What the option parser says in a box, as a line: from below the box's title up to its rule,
    where help begins. A terminal that knows ASCII alone gets another box."""
    box = "╭╮╰╯│─ "
    _, *lines = ["" if set(line) <= {*box, "-"} else line.strip(box)
                 for line in text.strip().splitlines()]  # fmt: skip
    said = " ".join(takewhile(bool, dropwhile(operator.not_, lines)))
    for pattern, instead in _SAID.items():
        if found := re.fullmatch(pattern, said):
            return found.expand(instead)
    return said
