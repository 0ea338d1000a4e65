"""Examples to rows of one length: each has one to itself or, packed, as many as fit share one.

``segment_ids`` tell the examples of a row apart, for attention must not look from one into another.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lora_mini_jax.data.examples import Example
from lora_mini_jax.errors import UserError

TOKENS = 2**17
"""About how many tokens of rows are made at once, where not all are."""


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
    if not examples:
        raise UserError("no examples to pack: give at least one")
    lengths = np.array([[len(example.tokens)] for example in examples])
    (packed,) = packed_chunks(examples, lengths, length, packing=packing, at_once=len(examples))
    return packed


def packed_chunks(
    examples: Sequence[Example],
    lengths: np.ndarray,
    length: int,
    *,
    packing: bool,
    at_once: int | None,
) -> Iterator[Packed]:
    """`pack` in chunks of ``at_once`` rows, by default about `TOKENS` tokens.

    Args:
        examples: what is indexed, each once; where it must go is told by the lengths alone.
        lengths: (examples, 1 or more): tokens of each example, in the first column.
        length: as in `pack`.
        packing: as in `pack`.
        at_once: rows in a chunk; the last may have fewer.

    Raises:
        UserError: as `pack`.
    """
    sizes = lengths[:, 0]
    if sizes.min() < 1 or sizes.max() > length:
        raise UserError(
            f"examples of {sizes.min()} to {sizes.max()} tokens do not go into rows of {length}: "
            "give examples of 1 token to a row's length (max_length of encode_records)"
        )
    order, ends = _grouped(_best_fit(sizes, length) if packing else np.arange(len(sizes)))
    at_once = at_once or max(1, TOKENS // length)
    for start in range(0, len(ends), at_once):
        stops = ends[start : start + at_once]
        begins = np.concatenate([ends[start - 1 : start] if start else [0], stops[:-1]])
        members = [order[a:b] for a, b in zip(begins, stops, strict=True)]
        yield _filled(examples, members, length)


def _filled(examples: Sequence[Example], rows: Sequence[np.ndarray], length: int) -> Packed:
    """Rows of the examples with these indices."""
    packed = Packed(*(np.zeros((len(rows), length), kind) for kind in ("i4", "i4", "i4", bool)))
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members.tolist(), 1):
            tokens, loss_mask = examples[index]
            here = (row, slice(start, start + len(tokens)))
            packed.tokens[here] = tokens
            packed.segment_ids[here] = segment
            packed.positions[here] = np.arange(len(tokens))
            packed.loss_mask[here] = loss_mask
            packed.loss_mask[row, start] = False
            start += len(tokens)
    return packed


def _best_fit(lengths: np.ndarray, length: int) -> np.ndarray:
    """The number of the row that each example goes to; (examples,) int32."""
    row_of = np.empty(len(lengths), np.int32)
    count = 0
    rooms: list[int] = []  # The sizes of room there are, ascending; each has rows in `having`.
    having: dict[int, list[int]] = {}
    for index in np.argsort(-lengths, kind="stable"):
        size = int(lengths[index])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room, count = count, length, count + 1
        else:
            room = rooms[at]
            row = having[room].pop()
            if not having[room]:
                del rooms[at], having[room]
        row_of[index] = row
        left = room - size
        if left and left not in having:
            insort(rooms, left)
        if left:
            having.setdefault(left, []).append(row)
    return row_of


def _grouped(row_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The examples row by row, in their order, rows in that of their first; and where each row
    ends among them."""
    _, first, row, sizes = np.unique(
        row_of, return_index=True, return_inverse=True, return_counts=True
    )
    rows = np.argsort(first)
    return np.argsort(first[row], kind="stable"), np.cumsum(sizes[rows])
