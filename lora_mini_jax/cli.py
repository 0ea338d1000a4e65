"""The command line, ``lora-mini``: options in, one of the commands out, user errors as one line."""

import contextlib
import importlib
import inspect
import io
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from lora_mini_jax import __version__
from lora_mini_jax.errors import UserError, told_of_devices, told_of_memory
from lora_mini_jax.files import writes
from lora_mini_jax.options import (
    Compare,
    Demo,
    Export,
    Finetune,
    Generate,
    Inspect,
    Merge,
    Methods,
    PlanStep,
    Predict,
    Pretrain,
    defaults_from,
)
from lora_mini_jax.options.paths import local
from lora_mini_jax.options.words import (
    defaults_in_words,
    mistakes,
    parsers_error,
    settings_as_words,
    take_config,
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

ABOUT = (
    "Fine-tune JAX and Flax models with small adapters. Start with `lora-mini demo`, or\n"
    "`lora-mini finetune --model FOLDER --data FILE`.\n"
    "`lora-mini COMMAND --help` explains a command; `lora-mini --version` prints the version."
)
"""What ``lora-mini --help`` begins with; the option parser does not wrap it."""

CONFIG = "--config FILE gives defaults for these options: JSON, such as the config.json of a run."
"""What the help of every command ends its beginning with; see `words.take_config`."""

GO_ON = ("finetune", "compare", "pretrain", "demo")
"""The commands that leave checkpoints."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits with 0, or with 2 and one line on stderr for a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    if sys.stderr is None:  # closed before the start; a progress bar wants to write somewhere
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    try:
        run(local(parse(words)))
    except UserError as error:
        print(f"lora-mini: {error.line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint, if there is one"
        print(f"lora-mini: stopped{goes_on if {*words[:1]} & {*GO_ON} else ''}", file=sys.stderr)
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

    argv, config = take_config(argv)
    command = argv[0] if argv else ""
    if command == "--version":
        print(f"lora-mini {__version__}")
        sys.exit(0)
    cls: Any = OPTIONS.get(command)
    if cls is None and command not in ("-h", "--help"):
        said = f"unknown command {command!r}" if command else "no command"
        raise UserError(f"{said}: choose from {', '.join(COMMANDS)} (see lora-mini --help)")
    default = defaults_from(cls, config) if cls and config is not None else None
    argv = settings_as_words(argv, cls, getattr(default, "settings", ()))
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), defaults_in_words():
            if cls is None:
                return tyro.extras.subcommand_cli_from_dict(
                    OPTIONS, args=argv, prog="lora-mini", description=ABOUT
                )
            given: dict[str, Any] = {} if default is None else {"default": default}
            about = f"{inspect.getdoc(cls)}\n{CONFIG}"
            prog = f"lora-mini {command}"
            return tyro.cli(cls, args=argv[1:], prog=prog, description=about, **given)
    except SystemExit as stop:
        if not stop.code:
            raise
        said = mistakes(argv[1:], cls, default) or parsers_error(stderr.getvalue())
        raise UserError(f"{said} (see lora-mini {command} --help)") from None


def run(options: Any) -> None:
    """Carry out a command, alone or as one of several processes."""
    # A plan takes the options of a run, but no part in it.
    if getattr(options, "coordinator", None) is None or isinstance(options, PlanStep):
        with told_of_devices(), told_of_memory():
            return carry_out(options)
    with told_of_devices():
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


if __name__ == "__main__":
    main()
