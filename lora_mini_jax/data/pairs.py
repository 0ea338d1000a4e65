"""Sources with their targets, for a model that reads one text and writes another.

The encoder reads ``source eos``, as T5's tokenizer ends every text; the decoder writes ``target
eos`` after the one token that starts it. Prompts of records are sources, completions are targets.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_mini_jax.data.examples import Overlong
from lora_mini_jax.data.fields import Fields, strings
from lora_mini_jax.data.files import Record, chunks
from lora_mini_jax.data.labels import ROOM
from lora_mini_jax.data.packing import TOKENS
from lora_mini_jax.data.tokenizer import Tokenizer
from lora_mini_jax.errors import UserError


class Pair(NamedTuple):
    """What the encoder reads, and what the decoder reads and is to predict; (n,) int32 each."""

    source: np.ndarray
    target: np.ndarray


class EncodedPairs(NamedTuple):
    """The pairs in the order of their records, and how many were left out or cut."""

    examples: list[Pair]
    skipped: int
    truncated: int


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


def source_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text as an encoder reads it, with the end token where there is one.

    Example:
        >>> import tokenizers
        >>> words = tokenizers.models.WordLevel({"</s>": 0, "hi": 1}, unk_token="</s>")
        >>> tokenizer = Tokenizer(tokenizers.Tokenizer(words), None, 0, 2, None, {})
        >>> source_ids(tokenizer, ["hi"])
        [[1, 0]]
    """
    return [ids + _end(tokenizer) for ids in tokenizer.encode_batch(texts)]


def encode_pairs(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    fields: Fields,
    *,
    start_id: int,
    max_length: int,
    overlong: Overlong = "skip",
    source: str = "records",
) -> EncodedPairs:
    """The records' prompts and completions as pairs, of at most ``max_length`` tokens on each side.

    Args:
        records: as from ``read_records``.
        tokenizer: as from ``load_tokenizer``.
        fields: which field is the prompt and which the completion; no separator is put between.
        start_id: the token that starts the decoder.
        max_length: the most tokens of a source, its end token among them, and of a target with
            its first and its end token; at least 2.
        overlong: what to do with a longer pair: ``"skip"`` it, ``"truncate"`` it, or raise an
            ``"error"``. A cut source still ends with the end token; a cut target does not, for
            nothing ends there. A pair without a source or without a target is skipped.
        source: what error messages call the records, such as their file.

    Raises:
        UserError: no records, records of another form, a field that is missing or holds no text,
            an overlong pair if so asked, or nothing left at all.
    """
    parts = list(
        pair_stream(
            records,
            tokenizer,
            fields,
            start_id=start_id,
            max_length=max_length,
            overlong=overlong,
            source=source,
        )
    )
    pairs = [pair for part in parts for pair in part.examples]
    return EncodedPairs(pairs, sum(p.skipped for p in parts), sum(p.truncated for p in parts))


def pair_stream(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    fields: Fields,
    *,
    start_id: int,
    max_length: int,
    overlong: Overlong = "skip",
    source: str = "records",
) -> Iterator[EncodedPairs]:
    """`encode_pairs` in parts, of a hundred records or so, so that none is held for long.

    Raises:
        UserError: as there; that nothing is left shows at the end.
    """
    if max_length < 2:
        raise UserError(f"max_length {max_length} is not allowed: give a whole number from 2")
    seen = kept = 0
    for first, chunk in chunks(records):
        fields = fields.resolved(chunk[0])  # the first chunk's: from then on they are named
        if fields.prompt_field is None or fields.completion_field is None:
            raise UserError(f"{source}: a model with an encoder learns from pairs of texts, not "
                            f"from text alone or chats (fields: {', '.join(map(str, chunk[0]))}): "
                            "name those to use as prompt_field and completion_field")  # fmt: skip
        prompts = strings(chunk, fields.prompt_field, source, first)
        completions = strings(chunk, fields.completion_field, source, first)
        read, end = source_ids(tokenizer, prompts), _end(tokenizer)
        written = [[start_id, *ids, *end] for ids in tokenizer.encode_batch(completions)]
        part = _fit(read, written, end, max_length, overlong, source, first)
        seen, kept = seen + len(chunk), kept + len(part.examples)
        yield part
    if not seen:
        raise UserError(f"{source}: no records to encode: give at least one")
    if not kept:
        raise UserError(f"{source}: none of {seen} records is a pair of at most max_length "
                        f"{max_length} tokens: raise max_length, set overlong to truncate, or "
                        "check the fields")  # fmt: skip


def _fit(
    sources: list[list[int]],
    targets: list[list[int]],
    end: list[int],
    max_length: int,
    overlong: Overlong,
    source: str,
    first: int,
) -> EncodedPairs:
    pairs, truncated = [], 0
    for number, (read, written) in enumerate(zip(sources, targets, strict=True), first):
        cut = max(len(read), len(written)) > max_length
        if cut and overlong == "error":
            raise UserError(f"{source}, record {number}: a pair has {len(read)} and {len(written)} "
                            f"tokens, more than max_length {max_length}: raise max_length, or set "
                            "overlong to skip or truncate")  # fmt: skip
        if (cut and overlong == "skip") or not read or len(written) < 2:
            continue
        truncated += cut
        if len(read) > max_length:
            read = read[: max_length - len(end)] + end
        pairs.append(Pair(np.array(read, np.int32), np.array(written[:max_length], np.int32)))
    return EncodedPairs(pairs, len(sources) - len(pairs), truncated)


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


def _end(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]
