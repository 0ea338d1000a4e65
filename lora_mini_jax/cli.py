"""The command line, ``lora-mini``: options in, one of the commands out, user errors as one line."""

import contextlib
import difflib
import importlib
import io
import operator
import os
import re
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from itertools import dropwhile, takewhile
from typing import Any

from lora_mini_jax.errors import UserError, told_of_memory
from lora_mini_jax.files import writes
from lora_mini_jax.options import (
    Compare,
    Demo,
    Export,
    Finetune,
    Generate,
    Inspect,
    Merge,
    MethodOptions,
    Methods,
    PlanStep,
    Predict,
    Pretrain,
    from_file,
)

COMMANDS: dict[str, tuple[type, str, str]] = {
    "finetune": (Finetune, "commands.finetune", "run_finetune"),
    "compare": (Compare, "runs.compare", "compare"),
    "pretrain": (Pretrain, "runs.pretrain", "pretrain"),
    "methods": (Methods, "commands.methods", "run_methods"),
    "inspect": (Inspect, "commands.inspect", "run_inspect"),
    "plan": (PlanStep, "commands.forecast", "run_plan"),
    "generate": (Generate, "commands.adapters", "run_generate"),
    "predict": (Predict, "commands.predict", "run_predict"),
    "merge": (Merge, "commands.adapters", "run_merge"),
    "export": (Export, "commands.adapters", "run_export"),
    "demo": (Demo, "runs.demo", "demo"),
}
"""Each command's options, and the function that takes them: its module and its name."""
OPTIONS: dict[str, Any] = {name: options for name, (options, _, _) in COMMANDS.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits with 0, or with 2 and one line on stderr for a user's mistake."""
    try:
        run(parse(list(sys.argv[1:] if argv is None else argv)))
    except UserError as error:
        print(f"lora-mini: {error.line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("lora-mini: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `lora-mini ... | head` has read enough; stay silent in the end too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def parse(argv: list[str]) -> Any:
    """The options object of the command that ``argv`` names.

    ``--config file.json`` anywhere after the command gives defaults; options beside it win.

    Raises:
        UserError: an unknown command, option or value, or one that is missing.
    """
    import tyro

    argv, config = _take_config(argv)
    command = argv[0] if argv else ""
    cls: Any = OPTIONS.get(command)
    if cls is None and command not in ("-h", "--help"):
        said = f"unknown command {command!r}" if command else "no command"
        raise UserError(f"{said}: choose from {', '.join(COMMANDS)} (see lora-mini --help)")
    default = from_file(cls, config) if cls and config is not None else None
    argv = _settings_as_words(argv, cls, default)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            if config is None:
                return tyro.extras.subcommand_cli_from_dict(OPTIONS, args=argv, prog="lora-mini")
            return tyro.cli(cls, args=argv[1:], default=default, prog=f"lora-mini {command}")
    except SystemExit as stop:
        if not stop.code:
            raise
        said = _unknown(argv[1:], cls) or _one_line(stderr.getvalue())
        raise UserError(f"{said} (see lora-mini {command} --help)") from None


def run(options: Any) -> None:
    """Carry out a command, alone or as one of several processes."""
    if getattr(options, "coordinator", None) is None:
        with told_of_memory():
            return carry_out(options)
    _needed("processes", "start")(options.coordinator, options.processes, options.process)
    with contextlib.ExitStack() as stack:
        if not writes():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        return _needed("processes", "guarded")(partial(carry_out, options))


def carry_out(options: Any) -> None:
    """The command itself. What it needs is imported here, so that ``--help`` is quick."""
    ((module, name),) = (home for kind, *home in COMMANDS.values() if kind is type(options))
    _needed(module, name)(options)


def _needed(module: str, name: str) -> Any:
    """What a module of the package defines, imported only now."""
    return getattr(importlib.import_module(f"lora_mini_jax.{module}"), name)


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    """``argv`` without ``--config FILE``, and the file."""
    for i, word in enumerate(argv):
        if word.startswith("--config="):
            return argv[:i] + argv[i + 1 :], word.partition("=")[2]
        if word == "--config":
            if i + 1 == len(argv):
                raise UserError("--config needs a file: --config runs/finetune/config.json")
            return argv[:i] + argv[i + 2 :], argv[i + 1]
    return argv, None


def _settings_as_words(argv: list[str], cls: Any, default: Any) -> list[str]:
    """``argv`` with the flags that are a method's own (``--rank 4``) moved into ``--settings``,
    after those that a config file gives."""
    if cls is None or not issubclass(cls, MethodOptions):
        return argv
    known = {field.name for field in fields(cls)} | {"help"}
    if all(_flag(word) in known for word in argv if word.startswith("--")):
        return argv
    from lora_mini_jax.methods import METHODS  # imports jax, which --help can do without

    own = {name for method in METHODS.values() for name in method.field_names()} - known
    kept, settings, words = [], [], deque(argv)
    while words:
        word = words.popleft()
        name, (_, equals, value) = _flag(word), word.partition("=")
        if not word.startswith("--") or name not in own:
            kept.append(word)
            continue
        if not equals:
            value = words.popleft() if words and not words[0].startswith("--") else "true"
        settings.append(f"{name}={value}")
    if settings and "--settings" in kept:
        raise UserError("give the method's settings as --settings or as flags, not both ways")
    before = default.settings if default else ()
    return [*kept, *(["--settings", *before, *settings] if settings else [])]


def _flag(word: str) -> str:
    """``--lora-plus-ratio=2`` as the option's name, ``lora_plus_ratio``."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def _unknown(words: list[str], cls: Any) -> str:
    """The options that a command does not have, with those that may have been meant; or nothing."""
    known = {field.name.replace("_", "-"): field.type for field in fields(cls)}
    flags = {f"--no-{name}" for name, kind in known.items() if kind is bool}
    flags |= {f"--{name}" for name in known} | {"--help"}
    said = []
    for word in dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--")):
        if word.replace("_", "-") in flags:
            continue
        initials = [f for f in flags if "".join(p[0] for p in f[2:].split("-")) == word[2:]]
        near = initials or difflib.get_close_matches(word, sorted(flags), cutoff=0.5)
        said.append(f"{word}: did you mean {' or '.join(near)}?" if near else word)
    return f"no such option: {', '.join(said)}" if said else ""


_NUMBERS = {"invalid literal for int": "a whole number", "could not convert string": "a number"}
"""What Python says of a word that is no number, and what to give."""


def _one_line(text: str) -> str:
    """What the option parser says in a box, as a line: up to the box's rule, where help begins. A
    terminal that knows ASCII alone gets another box."""
    box = "╭╮╰╯│─ "
    title, *lines = ["" if set(line) <= {*box, "-"} else line.strip(box)
                     for line in text.strip().splitlines()]  # fmt: skip
    said = " ".join(takewhile(bool, dropwhile(operator.not_, lines)))
    said = re.sub(r"^Error parsing \w+: ", "", said)
    for python, kind in _NUMBERS.items():
        said = re.sub(rf"^Error parsing (\S+): {python}[^']*(.*)", rf"\1 is \2: give {kind}", said)
    return said if title == "Value error" else f"{title.lower()}: {said}"


if __name__ == "__main__":
    main()
