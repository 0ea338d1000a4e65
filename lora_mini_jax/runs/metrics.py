"""What a run finds as it goes: ``metrics.jsonl``, a line for every so many steps."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_mini_jax.files import write_text, writes, writing
from lora_mini_jax.processes import together

Row = dict[str, Any]


class Metrics:
    """The lines of a run's folder; of several processes the first writes them.

    Example:
        >>> import tempfile
        >>> metrics = Metrics(Path(tempfile.mkdtemp()))
        >>> metrics.log([{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}])
        >>> metrics.rewind(1)
        >>> metrics.rows()
        [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "metrics.jsonl"

    def rows(self) -> list[Row]:
        """The lines there are; a last one that a kill cut short is left out."""
        if not self._path.exists():
            return []
        rows = []
        for line in self._path.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Forget the lines after ``step``, which the run is about to do again."""
        write_text(self._path, _lines(row for row in self.rows() if row["step"] <= step))
        together("metrics rewound")

    def log(self, rows: Iterable[Row]) -> None:
        """Append lines."""
        if writes():
            with writing(self._folder), open(self._path, "a", encoding="utf-8") as file:
                file.write(_lines(rows))
                file.flush()
                os.fsync(file.fileno())
        together("metrics written")


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
