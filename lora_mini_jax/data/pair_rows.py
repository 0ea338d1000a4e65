"""Pairs of a source and a target as rows of one length, for the encoder and the decoder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lora_mini_jax.data.labels import ROOM
from lora_mini_jax.data.packing import TOKENS
from lora_mini_jax.data.pairs import Pair


@dataclass(frozen=True, eq=False)
class PairRows:
    """Rows of one pair each; those that the decoder reads are named as a decoder's own are. Made
    by ``pair_rows``.

    Attributes:
        tokens: (rows, time) int32, the decoder's: the token that starts it, target and end.
        segment_ids: (rows, time) int32; 1 on tokens, 0 on padding.
        loss_mask: (rows, time) bool; whether the prediction of the token counts in the loss.
        source: (rows, length) int32, the encoder's.
        source_mask: (rows, length) int32; 1 on tokens, 0 on padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    loss_mask: np.ndarray
    source: np.ndarray
    source_mask: np.ndarray


def pair_rows(pairs: Sequence[Pair], *, max_length: int, pad_id: int = 0) -> PairRows:
    """The pairs as rows, padded on the right to the longest in multiples of 8, up to
    ``max_length``.

    Example:
        >>> rows = pair_rows([Pair(np.array([5, 1]), np.array([0, 7, 1]))], max_length=4)
        >>> rows.tokens.tolist(), rows.loss_mask.tolist()
        ([[0, 7, 1, 0]], [[False, True, True, False]])
    """
    lengths = np.array([[len(array) for array in pair] for pair in pairs])
    (rows,) = pair_chunks(pairs, lengths, max_length=max_length, pad_id=pad_id, at_once=len(pairs))
    return rows


def pair_chunks(
    pairs: Sequence[Pair], lengths: np.ndarray, *, max_length: int, pad_id: int, at_once: int | None
) -> Iterator[PairRows]:
    """`pair_rows` in chunks of ``at_once`` rows, by default about `TOKENS` tokens.

    Args:
        pairs: what is indexed, once and in order.
        lengths: (pairs, 2), of sources and targets.
        max_length: as in `pair_rows`.
        pad_id: what stands after the end.
        at_once: rows in a chunk; the last may have fewer.
    """
    wide, long = (min(max_length, -(-int(most) // ROOM) * ROOM) for most in lengths.max(0))
    at_once = at_once or max(1, TOKENS // (wide + long))
    for start in range(0, len(pairs), at_once):
        some = pairs[start : start + at_once]
        source, source_mask = _padded([pair.source for pair in some], wide, pad_id)
        tokens, segment_ids = _padded([pair.target for pair in some], long, pad_id)
        loss_mask = segment_ids > 0
        loss_mask[:, 0] = False  # what starts the decoder is given
        yield PairRows(tokens, segment_ids, loss_mask, source, source_mask)


def _padded(rows: Sequence[np.ndarray], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one length, and 1 where they have a token; (rows, length) int32 both."""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return tokens, mask
