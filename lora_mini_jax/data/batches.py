"""Rows to batches of one shape.

A batch is a pure function of the step, so a run that is taken up at step ``n`` sees exactly what it
would have seen, on however many devices and in however many processes: there is no state to save.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from lora_mini_jax.errors import UserError

TOLD = 4096
"""Rows that are read to tell data from other data."""
Batch = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of ``batch_size`` rows, the same for the same seed and step.

    ``len(batches)`` is the number of steps in an epoch. Every row comes once in each epoch, in an
    order that the seed and the epoch fix (the rows' own order where ``shuffle`` is false). The
    last batch of an epoch is filled up with rows of padding, which have no loss, so all batches
    have one shape, and a ``batch_size`` beyond the number of rows works.

    Attributes:
        packed: the rows: a `Packed`, or any other dataclass of arrays, ``tokens`` among them, that
            have a row's entries along their first axis and 0 (or False) for padding. They may be
            on disk (`cache`): nothing but the rows of a batch is read.
        batch_size: rows in a batch, from 1.
        seed: of the order, from 0.
        shuffle: whether to draw a new order for every epoch.

    Raises:
        UserError: a batch size or a seed out of its range.

    Example:
        >>> from lora_mini_jax.data import Example, pack
        >>> one = Example(np.array([5, 6], np.int32), np.array([False, True]))
        >>> batches = Batches(pack([one] * 3, 2), batch_size=2, seed=0)
        >>> len(batches), batches.batch(1)["segment_ids"].tolist()
        (2, [[1, 1], [0, 0]])
    """

    packed: Any
    batch_size: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size} is not allowed: give one from 1")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is not allowed: give a whole number from 0")

    def __len__(self) -> int:
        return -(-len(self.packed.tokens) // self.batch_size)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of a batch's arrays, by name."""
        arrays = vars(self.packed).items()
        return {name: (self.batch_size, *array.shape[1:]) for name, array in arrays}

    def batch(self, step: int, part: slice = slice(None)) -> Batch:
        """The batch of a step, counted from 0 over all epochs: step // len(self) is the epoch.

        Args:
            step: which.
            part: which of its rows, for who needs not all of them; the others are not read.

        Returns:
            The arrays of ``packed`` by name, each with ``batch_size`` rows or those of ``part``,
            free to change.

        Raises:
            UserError: ``step`` is below 0.
        """
        if step < 0:
            raise UserError(f"step {step} is not allowed: give a whole number from 0")
        epoch, at = divmod(step, len(self))
        rows = len(self.packed.tokens)
        order = _order(self.seed, epoch, rows) if self.shuffle else np.arange(rows)
        chosen = order[at * self.batch_size : (at + 1) * self.batch_size][part]
        count = len(range(self.batch_size)[part])
        batch = {}
        for name, array in vars(self.packed).items():
            batch[name] = np.zeros((count, *array.shape[1:]), array.dtype)
            batch[name][: len(chosen)] = array[chosen]
        return batch

    @property
    def fingerprint(self) -> str:
        """A hash that tells these rows from others; of more than `TOLD`, so many evenly spread."""
        rows = len(self.packed.tokens)
        some = np.linspace(0, rows - 1, min(rows, TOLD)).astype(int)
        found = hashlib.sha256(str(rows).encode())
        for array in vars(self.packed).values():
            found.update(array[some].tobytes())
        return found.hexdigest()

    @property
    def in_order(self) -> "Batches":
        """The same rows in their own order, whatever ``shuffle`` says."""
        return replace(self, shuffle=False)

    def eval_batches(self) -> Iterator[Batch]:
        """All rows once, in their own order, whatever ``shuffle`` says."""
        return map(self.in_order.batch, range(len(self)))


# Remembered because every step of an epoch asks for it; it is pure, so this is not state.
@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    order.setflags(write=False)
    return order
