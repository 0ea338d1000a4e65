"""What a run shows while it trains: progress bar, metrics.jsonl and TensorBoard."""

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from statistics import median
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from tqdm import tqdm

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import writes
from lora_mini_jax.options import Training
from lora_mini_jax.processes import on_host
from lora_mini_jax.runs.folder import Row, RunFolder

T = TypeVar("T")


class Diverged(UserError):
    """A loss or gradient that is not finite, or a held-out loss.

    Args:
        message: the whole line for the user.
        step: at which it was seen; below 0 in a search, whose steps count up to 0.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Meter:
    """Progress bar, metrics.jsonl and TensorBoard, without waiting for the device at every step."""

    def __init__(
        self, options: Training, folder: RunFolder, start: int, steps: int, rate: optax.Schedule
    ) -> None:
        self._options, self._folder, self._step = options, folder, start
        self._rate = rate
        rows = folder.metrics.rows()
        self._before = max((row["seconds"] for row in rows), default=0.0)
        self._began, self._last, self._pending = time.monotonic(), time.monotonic(), []
        self._tokens, self._waited = [], 0.0
        self._bar = tqdm(
            total=steps, initial=start, unit="step", desc=options.method, disable=not writes()
        )
        self._board = _board(folder) if options.tensorboard and writes() else None

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._bar.close()
        if self._board:
            self._board.close()

    def waits(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; how long one waits for each is noted."""
        while True:
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - began
            yield batch

    def add(self, metrics: Any, tokens: Any) -> None:
        """Note one step and how many tokens it saw, padding apart, an array of one number; every
        ``log_every`` steps they are written."""
        self._pending.append(metrics)
        self._tokens.append(tokens)
        self._step += 1
        self._bar.update()
        if self._step % self._options.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Fetch and write what is pending.

        Raises:
            Diverged: a loss or gradient that is not finite, with its step.
        """
        if not self._pending:
            return
        # Fetched one by one: within a list NumPy makes a ValueError of an interruption.
        fetched = on_host([(m.loss, m.grad_norm) for m in self._pending])
        losses, norms = np.asarray(fetched, np.float64).T
        first = self._step - len(self._pending)
        bad = np.flatnonzero(~np.isfinite(losses) | ~np.isfinite(norms))
        if bad.size:
            said = f"loss {losses[bad[0]]} with gradient norm {norms[bad[0]]}"
            raise self._diverged(said, int(first + bad[0] + 1))
        now = time.monotonic()
        elapsed, n = max(now - self._last, 1e-9), len(self._pending)
        speed = sum(int(np.asarray(tokens)) for tokens in self._tokens) / elapsed
        waited, self._waited = self._waited, 0.0
        self._last, self._pending, self._tokens = now, [], []
        row = {"loss": losses.mean(), "grad_norm": norms.mean(), "tokens_per_second": speed}
        row |= {"step_seconds": elapsed / n, "data_wait_share": min(waited / elapsed, 1.0)}
        row["learning_rate"] = np.asarray(self._rate(self._step - 1)).item()
        self._bar.set_postfix({"loss": f"{losses.mean():.3f}", "tok/s": f"{speed:.0f}"})
        self._write({name: float(value) for name, value in row.items()})

    def evaluated(self, found: Row) -> None:
        """Write what an evaluation found; the time it took is not counted as training speed.

        Raises:
            Diverged: a held-out loss that is not finite.
        """
        if not np.isfinite(loss := found["valid_loss"]):
            raise self._diverged(f"held-out loss {loss}", self._step)
        self._last = time.monotonic()
        self._write(found)

    def saved(self) -> None:
        """After `flush`: nor is the time since then, of a checkpoint or the best adapter."""
        self._last = time.monotonic()

    def compiled(self, step: jax.stages.Compiled) -> None:
        """Write how much memory the compiled step needs: its arguments, results that are not
        written over them, and temporaries. Nor is the time to compile counted as training."""
        self._last, self._waited = time.monotonic(), 0.0
        memory = step.memory_analysis()
        if memory is not None:  # some backends do not say
            sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes
            total = sum(sizes) - memory.alias_size_in_bytes + memory.temp_size_in_bytes
            self._write({"step_bytes": total})

    def _diverged(self, said: str, step: int) -> Diverged:
        return Diverged(
            f"{said} at step {step}: stopped; begin again with a lower --learning-rate and another "
            "--output-dir, or look at the data (checkpoints from before, if there are any, stay in "
            f"{self._folder.checkpoints})",
            step,
        )

    def _write(self, row: Row) -> None:
        seconds = round(self._before + time.monotonic() - self._began, 3)
        self._folder.metrics.log([{"step": self._step, **row, "seconds": seconds}])
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, self._step)
            self._board.flush()


def waited(rows: Iterable[Row]) -> float | None:
    """The share of a run's time in steps that it waited for data, from the lines of its metrics;
    None where they do not say. Its wait for the first batch is that of starting up, and no part."""
    seconds, waits, before = 0.0, 0.0, 0
    for row in (row for row in rows if "data_wait_share" in row):
        took = row["step_seconds"] * (row["step"] - before)
        seconds, waits = seconds + took, waits + took * row["data_wait_share"]
        before = row["step"]
    return waits / seconds if seconds else None


def typical(rows: Iterable[Row], name: str) -> float:
    """The median over a run's steps of what the lines of its metrics say of so many steps each. The
    first line has the warming up in it, and counts only where there is no other."""
    values, before = [], 0
    for row in (row for row in rows if name in row):
        values.append([row[name]] * (row["step"] - before))
        before = row["step"]
    return median(chain.from_iterable(values[1:] or values))


def check_board(options: Training) -> None:
    """Raise `UserError` for TensorBoard's logs without their writer, before a folder is made."""
    if options.tensorboard and writes():
        _writer()


def _board(folder: RunFolder) -> Any:
    return _writer()(str(folder.path / "tensorboard"))


def _writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except Exception as error:  # one that does not suit its protobuf raises whatever it likes
        raise UserError(
            f"--tensorboard needs tensorboardX, which cannot be imported ({error}): "
            "pip install tensorboardX"
        ) from None
    return SummaryWriter
