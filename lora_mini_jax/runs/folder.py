"""The folder of a training run: its config, its metrics, and what makes it safe to start twice."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import read_json, read_object, write_json, write_text, writes, writing
from lora_mini_jax.options import Training, defaults, differences, to_json
from lora_mini_jax.processes import together

Row = dict[str, Any]
ELSEWHERE = ("output_dir", "cache_dir", "mesh", "coordinator", "processes", "process")
"""Options that a run may go on with another way: where it runs is not what it computes."""


class RunFolder:
    """A run's folder. Opening it checks that what is there belongs to the same options; nothing is
    written before `create`, so that a mistake in the options leaves nothing behind.

    Raises:
        UserError: the folder holds a run of other options (says which), or files of no run.
    """

    def __init__(self, options: Training) -> None:
        self.path = Path(options.output_dir)
        self._config, self._saved = to_json(options), self.path / "config.json"
        if self._saved.exists():
            # A run from before there was some option did what that option's default says.
            before = defaults(options) | read_object(self._saved)
            changed = differences(before, self._config, ignore=ELSEWHERE)
            if changed:
                raise UserError(
                    f"{self.path} holds a run of another config ({'; '.join(changed)}): give the "
                    "same options to go on with it, or another --output-dir"
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(
                f"{self.path} exists and is not a run folder: give another --output-dir"
            )

    def create(self) -> None:
        """Make the folder, with the options in it."""
        if writes():
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        write_json(self._saved, self._config)
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

    def metrics(self) -> list[Row]:
        """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Forget the metrics after ``step``, which the run is about to do again."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        together("metrics rewound")

    def log(self, rows: Iterable[Row]) -> None:
        """Append lines to metrics.jsonl."""
        if writes():
            self._append("".join(json.dumps(row) + "\n" for row in rows))
        together("metrics written")

    def _append(self, lines: str) -> None:
        with writing(self.path), open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
