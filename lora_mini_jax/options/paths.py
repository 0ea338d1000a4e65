"""The options that are paths: with ``~`` as a shell reads it, and on this machine."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lora_mini_jax.errors import UserError, flag
from lora_mini_jax.files import is_address

PATHS = ("model", "adapter", "data", "valid", "prompts", "tokenizer", "shape", "output_dir",
         "output", "cache_dir", "init_adapter")  # fmt: skip
"""Options that may be paths; the first few may be hub ids too."""


def local(options: Any) -> Any:
    """The options with ``~`` at the start of paths written out: in ``--data=~/x``, and in words in
    quotes or in a file, shells leave it.

    Raises:
        UserError: a ``~`` that is nobody's, or addresses such as ``gs://bucket/run``; all of them
            in one message.
    """
    changed, wrong = {}, []
    for name in sorted({field.name for field in fields(options)} & {*PATHS}):
        value = getattr(options, name)
        given = value if isinstance(value, tuple) else (value,)
        wrong += [f"{flag(name)} {path}" for path in given if path and is_address(path)]
        found = tuple(map(_at_home, given))
        if found != given:
            changed[name] = found if isinstance(value, tuple) else found[0]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: an address is no path; mount it, or copy what is "
                        "there, and give a path on this machine")  # fmt: skip
    return replace(options, **changed) if changed else options


def _at_home(path: str | None) -> str | None:
    if path is None or not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise UserError(f"{path}: there is no such user, or no HOME: write the whole path, or "
                        f"./{path} for what is called so") from None  # fmt: skip
