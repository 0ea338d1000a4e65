"""Sources with their targets, for a model that reads one text and writes another.

The encoder reads ``source eos``, as T5's tokenizer ends every text; the decoder writes ``target
eos`` after the one token that starts it. Prompts of records are sources, completions are targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_mini_jax.data.examples import Overlong
from lora_mini_jax.data.fields import Fields, strings
from lora_mini_jax.data.files import Record
from lora_mini_jax.data.labels import ROOM
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
    if max_length < 2:
        raise UserError(f"max_length {max_length} is not allowed: give a whole number from 2")
    if not records:
        raise UserError(f"{source}: no records to encode: give at least one")
    named = fields.resolved(records[0])
    if named.prompt_field is None or named.completion_field is None:
        raise UserError(f"{source}: a model with an encoder learns from pairs of texts, not from "
                        f"text alone or chats (fields: {', '.join(map(str, records[0]))}): name "
                        "those to use as prompt_field and completion_field")  # fmt: skip
    prompts = strings(records, named.prompt_field, source)
    completions = strings(records, named.completion_field, source)
    end, pairs, skipped, truncated = _end(tokenizer), [], 0, 0
    answers = tokenizer.encode_batch(completions)
    for read, answer in zip(source_ids(tokenizer, prompts), answers, strict=True):
        written = [start_id, *answer, *end]
        cut = max(len(read), len(written)) > max_length
        if cut and overlong == "error":
            raise UserError(f"{source}: a pair has {len(read)} and {len(written)} tokens, more "
                            f"than max_length {max_length}: raise max_length, or set overlong to "
                            "skip or truncate")  # fmt: skip
        if (cut and overlong == "skip") or not read or len(written) < 2:
            skipped += 1
            continue
        truncated += cut
        if len(read) > max_length:
            read = read[: max_length - len(end)] + end
        pairs.append(Pair(np.array(read, np.int32), np.array(written[:max_length], np.int32)))
    if not pairs:
        raise UserError(f"{source}: none of {skipped} records is a pair of at most max_length "
                        f"{max_length} tokens: raise max_length, set overlong to truncate, or "
                        "check the fields")  # fmt: skip
    return EncodedPairs(pairs, skipped, truncated)


def pair_rows(pairs: Sequence[Pair], *, max_length: int, pad_id: int = 0) -> PairRows:
    """The pairs as rows, padded on the right to the longest in multiples of 8, up to
    ``max_length``.

    Example:
        >>> rows = pair_rows([Pair(np.array([5, 1]), np.array([0, 7, 1]))], max_length=4)
        >>> rows.tokens.tolist(), rows.loss_mask.tolist()
        ([[0, 7, 1, 0]], [[False, True, True, False]])
    """
    source, source_mask = _padded([pair.source for pair in pairs], max_length, pad_id)
    tokens, segment_ids = _padded([pair.target for pair in pairs], max_length, pad_id)
    loss_mask = segment_ids > 0
    loss_mask[:, 0] = False  # what starts the decoder is given
    return PairRows(tokens, segment_ids, loss_mask, source, source_mask)


def _padded(rows: Sequence[np.ndarray], most: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one length, and 1 where they have a token; (rows, length) int32 both."""
    length = min(most, -(-max(map(len, rows)) // ROOM) * ROOM)
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return tokens, mask


def _end(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]
