"""What every part of a run is given."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from lora_mini_jax.options import Training
from lora_mini_jax.runs.folder import Row, RunFolder
from lora_mini_jax.runs.meter import check_board
from lora_mini_jax.tasks.devices import Devices

Log = Callable[[str], None]
"""What is done with a line of text for the user."""
Options = TypeVar("Options", bound=Training)


@dataclass(frozen=True, eq=False)
class Run(Generic[Options]):
    """A run's options, and where it writes, works and speaks.

    Attributes:
        options: what is done.
        say: see `Log`.
        given: the options as the user gave them, and gives them again to go on, where something
            filled in the others.
    """

    options: Options
    say: Log = print
    given: Options | None = None

    @cached_property
    def folder(self) -> RunFolder:
        """Its folder; errors as in `RunFolder`."""
        return RunFolder(self.given or self.options)

    @cached_property
    def devices(self) -> Devices:
        """Its devices; errors as in `Devices.of`."""
        return Devices.of(self.options)

    def check(self) -> None:
        """Raise `UserError` for what shows before anything is read: a mesh that does not fit the
        devices, logs that nothing can write."""
        _ = self.devices
        check_board(self.options)

    def finished(self) -> Row | None:
        """The summary of a run that is finished, and is not to be run again."""
        if done := self.folder.summary():
            self.say(f"{self.folder.path} is finished already; nothing to do")
        return done
