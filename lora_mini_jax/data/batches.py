"""Examples to rows of one length, and rows to batches of one shape.

A row holds one example or, packed, as many as fit; ``segment_ids`` tell them apart, for attention
must not look from one into another. A batch is a pure function of the step, so a run that is
taken up at step ``n`` sees exactly what it would have seen: there is no state to save.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lora_mini_jax.data.examples import Example
from lora_mini_jax.errors import UserError

Batch = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of one length. Made by ``pack``.

    Attributes:
        tokens: (rows, length) int32; 0 on padding.
        segment_ids: (rows, length) int32; 1, 2, ... for the examples of a row, 0 on padding.
        positions: (rows, length) int32; from 0 within each example; 0 on padding.
        loss_mask: (rows, length) bool; whether the prediction of the token counts in the loss.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray


def pack(examples: Sequence[Example], length: int, *, packing: bool = True) -> Packed:
    """Rows of ``length`` tokens that hold every example once and whole.

    With ``packing`` the longest examples are placed first, each in the row where it leaves the
    least room (best fit, decreasing); then the examples of a row, and the rows by their first
    example, are put in the order given. Without, every example has a row to itself. Either way
    the same examples give the same rows. The first token of an example never counts in the loss.

    Raises:
        UserError: no examples, or one that is empty or longer than ``length``.

    Example:
        >>> one = Example(np.array([5, 6], np.int32), np.array([False, True]))
        >>> pack([one, one], 5).segment_ids
        array([[1, 1, 2, 2, 0]], dtype=int32)
    """
    lengths = [len(example.tokens) for example in examples]
    if not lengths:
        raise UserError("no examples to pack: give at least one")
    if min(lengths) < 1 or max(lengths) > length:
        raise UserError(
            f"examples of {min(lengths)} to {max(lengths)} tokens do not go into rows of {length}: "
            "give examples of 1 token to a row's length (max_length of encode_records)"
        )
    rows = _best_fit(lengths, length) if packing else [[index] for index in range(len(lengths))]
    packed = Packed(*(np.zeros((len(rows), length), kind) for kind in ("i4", "i4", "i4", bool)))
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, 1):
            here = (row, slice(start, start + lengths[index]))
            packed.tokens[here] = examples[index].tokens
            packed.segment_ids[here] = segment
            packed.positions[here] = np.arange(lengths[index])
            packed.loss_mask[here] = examples[index].loss_mask
            packed.loss_mask[row, start] = False
            start += lengths[index]
    return packed


def _best_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """The indices of the examples in each row."""
    rows: list[list[int]] = []
    rooms: list[int] = []  # The sizes of room there are, ascending; each has rows in `having`.
    having: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(rooms, lengths[index])
        if at == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[at]
            row = having[room].pop()
            if not having[room]:
                del rooms[at], having[room]
        rows[row].append(index)
        left = room - lengths[index]
        if left and left not in having:
            insort(rooms, left)
        if left:
            having.setdefault(left, []).append(row)
    return sorted(sorted(members) for members in rows)


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of ``batch_size`` rows, the same for the same seed and step.

    ``len(batches)`` is the number of steps in an epoch. Every row comes once in each epoch, in an
    order that the seed and the epoch fix (the rows' own order where ``shuffle`` is false). The
    last batch of an epoch is filled up with rows of padding, which have no loss, so all batches
    have one shape, and a ``batch_size`` beyond the number of rows works.

    Attributes:
        packed: the rows: a `Packed`, or any other dataclass of arrays, ``tokens`` among them, that
            have a row's entries along their first axis and 0 (or False) for padding.
        batch_size: rows in a batch, from 1.
        seed: of the order, from 0.
        shuffle: whether to draw a new order for every epoch.

    Raises:
        UserError: a batch size or a seed out of its range.

    Example:
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

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs: step // len(self) is the epoch.

        Returns:
            The arrays of ``packed`` by name, each with ``batch_size`` rows, free to change.

        Raises:
            UserError: ``step`` is below 0.
        """
        if step < 0:
            raise UserError(f"step {step} is not allowed: give a whole number from 0")
        epoch, at = divmod(step, len(self))
        rows = len(self.packed.tokens)
        return self._gather(_order(self.seed, epoch, rows) if self.shuffle else _rows(rows), at)

    def eval_batches(self) -> Iterator[Batch]:
        """All rows once, in their own order, whatever ``shuffle`` says."""
        for at in range(len(self)):
            yield self._gather(_rows(len(self.packed.tokens)), at)

    def _gather(self, order: np.ndarray, at: int) -> Batch:
        chosen = order[at * self.batch_size : (at + 1) * self.batch_size]
        batch = {}
        for name, rows in vars(self.packed).items():
            batch[name] = np.zeros((self.batch_size, *rows.shape[1:]), rows.dtype)
            batch[name][: len(chosen)] = rows[chosen]
        return batch


def _rows(rows: int) -> np.ndarray:
    return np.arange(rows)


# Remembered because every step of an epoch asks for it; it is pure, so this is not state.
@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    order.setflags(write=False)
    return order
