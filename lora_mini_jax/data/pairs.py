"""Sources with their targets, for a model that reads one text and writes another.

The encoder reads ``source eos``, as T5's tokenizer ends every text; the decoder writes ``target
eos`` after the one token that starts it. Prompts of records are sources, completions are targets.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lora_mini_jax.data.encoded import Encoded, Overlong, check_limits, in_parts
from lora_mini_jax.data.fields import Fields, strings
from lora_mini_jax.data.files import Record
from lora_mini_jax.data.tokenizer import Tokenizer
from lora_mini_jax.errors import UserError


class Pair(NamedTuple):
    """What the encoder reads, and what the decoder reads and is to predict; (n,) int32 each."""

    source: np.ndarray
    target: np.ndarray


def source_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text as an encoder reads it, with the end token where there is one.

    Example:
        >>> import tokenizers
        >>> words = tokenizers.models.WordLevel({"</s>": 0, "hi": 1}, unk_token="</s>")
        >>> tokenizer = Tokenizer(tokenizers.Tokenizer(words), None, 0, 2, None, {})
        >>> source_ids(tokenizer, ["hi"])
        [[1, 0]]
    """
    return [ids + tokenizer.closing for ids in tokenizer.encode_batch(texts)]


def pair_stream(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    fields: Fields,
    *,
    start_id: int,
    max_length: int,
    overlong: Overlong = "skip",
    source: str = "records",
) -> Iterator[Encoded]:
    """The records' prompts and completions as `Pair`s, of at most ``max_length`` tokens on each
    side; in parts, of a hundred records or so, so that none is held for long.

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
            an overlong pair if so asked, or nothing left at all, which shows at the end.
    """
    check_limits(max_length, overlong)

    def encode(chunk: Sequence[Record], fields: Fields, first: int) -> Encoded:
        if fields.prompt_field is None or fields.completion_field is None:
            raise UserError(f"{source}: a model with an encoder learns from pairs of texts, not "
                            f"from text alone or chats (fields: {', '.join(map(str, chunk[0]))}): "
                            "name those to use as prompt_field and completion_field")  # fmt: skip
        prompts = strings(chunk, fields.prompt_field, source, first)
        completions = strings(chunk, fields.completion_field, source, first)
        read, end = source_ids(tokenizer, prompts), tokenizer.closing
        written = [[start_id, *ids, *end] for ids in tokenizer.encode_batch(completions)]
        return _fit(read, written, end, max_length, overlong, source, first)

    wanted = f"is a pair of at most max_length {max_length} tokens"
    yield from in_parts(records, fields, encode, source, lambda: wanted)


def _fit(
    sources: list[list[int]],
    targets: list[list[int]],
    end: list[int],
    max_length: int,
    overlong: Overlong,
    source: str,
    first: int,
) -> Encoded:
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
    return Encoded(pairs, len(sources) - len(pairs), truncated)
