"""The folder of a training run: its config, and what makes it safe to start twice."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import (
    locked,
    read_json,
    read_object,
    write_json,
    writes,
    writing,
)
from lora_mini_jax.options import Training, defaults, differences, to_json
from lora_mini_jax.processes import together
from lora_mini_jax.runs.metrics import Metrics, Row

ELSEWHERE = ("output_dir", "cache_dir", "mesh", "coordinator", "processes", "process", "remat",
             "log_every", "save_every", "tensorboard")  # fmt: skip
"""Options that a run may go on with another way: where it runs, what it keeps for the backward pass
and how often it writes is not what it computes."""
LOCK = ".lock"
PASSING = ("data.json", "metrics.jsonl", "tensorboard", "checkpoints", "matrix.json",
           "diverged.json")  # fmt: skip
"""What is of no use without a checkpoint, an adapter or a summary."""


class Told(Protocol):
    """What a run depends on and its options only name, such as `Batches`."""

    @property
    def fingerprint(self) -> str:
        """A hash that tells it from others."""
        ...


class RunFolder:
    """A run's folder. Opening it checks that what is there belongs to the same options, or is
    nothing that training found; nothing is written before `create`, so that a mistake in the
    options leaves nothing behind.

    Raises:
        UserError: the folder holds a run of other options (says which), or files of no such run.
    """

    saved_as = "config.json"
    """The file that keeps the options; its name tells one kind of folder from another."""

    def __init__(self, options: Training) -> None:
        self.path = Path(options.output_dir)
        self.metrics = Metrics(self.path)
        self._config, self._saved = to_json(options), self.path / self.saved_as
        self._options = options
        self._replaces = self._checked()

    def _checked(self) -> bool:
        """Whether what is there is to be replaced; errors as for the class."""
        with writing(self.path):
            if self._saved.exists():
                return self._differs(self._options)
            if self.path.exists() and (not self.path.is_dir() or self._names()):
                raise UserError(f"{self.path} exists and is not a run folder, for it has no "
                                f"{self.saved_as}: give another --output-dir")  # fmt: skip
        return False

    def _names(self) -> set[str]:
        """What is in the folder, apart from its lock."""
        return {path.name for path in self.path.iterdir()} - {LOCK}

    def _differs(self, options: Training) -> bool:
        """Whether the options are not those of the folder, in which there is nothing to lose."""
        saved = read_object(self._saved)
        # A run from before there was some option did what that option's default says.
        changed = differences(defaults(options) | saved, self._config, ignore=ELSEWHERE)
        if not changed or self._nothing_to_lose():
            return bool(changed)
        if saved.keys() - self._config.keys():
            raise UserError(f"{self.path} holds a run of another command, or of another version: "
                            "give another --output-dir")  # fmt: skip
        raise UserError(
            f"{self.path} holds a run of another config ({'; '.join(changed)}): give the "
            "same options to go on with it, or another --output-dir"
        )

    def _nothing_to_lose(self) -> bool:
        passing = self._names() <= {self.saved_as, *PASSING}
        return passing and not any(self.checkpoints.glob("[0-9]*"))

    @contextmanager
    def alone(self) -> Generator[None]:
        """Make the folder, and let nobody else work in it until the block ends.

        Raises:
            UserError: another does; or, as for the class, it is not what it was any more.
        """
        if writes():
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        busy = f"another run is at work in {self.path}: wait for it, or give another --output-dir"
        with locked(self.path / LOCK, busy):
            if writes():
                self._replaces = self._checked()
            yield

    def create(self, **data: Told) -> None:
        """Make the folder, with the options in it, and what tells ``data`` from other data.

        Raises:
            UserError: training began on other data than this.
        """
        told, path = {n: part.fingerprint for n, part in data.items()}, self.path / "data.json"
        if path.exists() and read_object(path) != told and not self._nothing_to_lose():
            raise UserError(
                f"{self.path} holds a run on other data: what its options name, or "
                "the tokenizer, has changed since it began; give it the same again, or another "
                "--output-dir"
            )
        if writes():
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                for name in PASSING if self._replaces else ():
                    _remove(self.path / name)
        write_json(self._saved, self._config)
        if told:
            write_json(path, told)
        together("run folder made")

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Where the finished adapter is, and the best so far where that is kept."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """Where the finished model of a pre-training run is."""
        return self.path / "model"

    def summary(self) -> Row | None:
        """What a finished run found; None for one that is not finished."""
        path = self.path / "summary.json"
        return read_json(path) if path.exists() else None

    def finish(self, summary: Row) -> None:
        """Mark the run as finished."""
        write_json(self.path / "summary.json", summary)

    def diverged(self) -> int | None:
        """The step at which a comparison saw this run diverge; None for one that did not."""
        path = self.path / "diverged.json"
        found = path.exists() and not self._replaces  # else it is of other options
        return read_json(path)["step"] if found else None

    def set_diverged(self, step: int) -> None:
        """Note that the run diverged, so that it is not run again."""
        write_json(self.path / "diverged.json", {"step": step})


class ComparisonFolder(RunFolder):
    """The folder of a comparison. Its runs have folders of their own inside, which look after
    themselves; so it is only a finished one that has something to lose."""

    saved_as = "comparison.json"

    def _nothing_to_lose(self) -> bool:
        return self.summary() is None


def _remove(path: Path) -> None:
    """Take a file or folder away, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
