"""Sources with their targets, for a model that reads one text and writes another.

The encoder reads ``source eos``, as T5's tokenizer ends every text; the decoder writes ``target
eos`` after the one token that starts it. Prompts of records are sources, completions are targets.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from lora_mini_jax.data.encoded import Encoded, Limits, Overlong, in_parts
from lora_mini_jax.data.fields import Fields, strings
from lora_mini_jax.data.files import Record
from lora_mini_jax.data.tokenizer import Tokenizer
from lora_mini_jax.errors import UserError


class Pair(NamedTuple):
    """What the encoder reads, and what the decoder reads and is to predict; (n,) int32 each."""

    source: np.ndarray
    target: np.ndarray

    @property
    def length(self) -> int:
        """How many tokens its longer side has."""
        return max(len(self.source), len(self.target))

    def cut(self, max_length: int, end: int) -> "Pair | None":
        """Within so many tokens a side: a source still ends with its last ``end`` tokens, a target
        does not. None where a side has nothing in it."""
        source, target = self
        if not len(source) or len(target) < 2:  # the first, which starts the decoder, is given
            return None
        if len(source) > max_length:
            kept = max_length - end
            source = np.concatenate([source[:kept], source[len(source) - end :]])
        return Pair(source, target[:max_length])


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

    def encode(chunk: Sequence[Record], fields: Fields, first: int) -> list[Pair]:
        if fields.prompt_field is None or fields.completion_field is None:
            raise UserError(f"{source}: a model with an encoder learns from pairs of texts, not "
                            f"from text alone or chats (fields: {', '.join(map(str, chunk[0]))}): "
                            "name those to use as prompt_field and completion_field")  # fmt: skip
        prompts = strings(chunk, fields.prompt_field, source, first)
        completions = strings(chunk, fields.completion_field, source, first)
        read = source_ids(tokenizer, prompts)
        written = [[start_id, *ids, *end] for ids in tokenizer.encode_batch(completions)]
        return [Pair(_ids(r), _ids(w)) for r, w in zip(read, written, strict=True)]

    end = tokenizer.closing
    cut, limits = partial(Pair.cut, end=len(end)), Limits(max_length, overlong)
    return in_parts(records, fields, encode, cut, limits, source)


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)
