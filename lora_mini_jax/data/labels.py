"""Texts, or pairs of them, with a class or a number each: records in, rows for an encoder out.

Classes are known by their names. In the data they are strings or whole numbers, which are names
too (``"0"``), or the places of names that are given. 1.0 is the whole number 1: columns of whole
numbers with gaps in them are often written so.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_mini_jax.data.fields import strings, values_of
from lora_mini_jax.data.files import OneOf, Record, place
from lora_mini_jax.data.tokenizer import Tokenizer
from lora_mini_jax.errors import UserError

ROOM = 8
"""Rows are as long as the longest needs, in multiples of this."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Rows of one text, or pair, each. Made by ``encode_labelled``.

    Attributes:
        tokens: (rows, length) int32; the model's own id on padding.
        segment_ids: (rows, length) int32; 1 on tokens, 0 on padding, which is not attended to.
        type_ids: (rows, length) int32; which text of a pair a token is of.
        labels: (rows,) int32, the number of the class; or float32, the number itself.
        counted: (rows,) bool; True, so that a row of nothing but padding is told apart.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    type_ids: np.ndarray
    labels: np.ndarray
    counted: np.ndarray


def encode_labelled(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    text_fields: Sequence[str],
    labels: np.ndarray,
    *,
    max_length: int,
    pad_id: int = 0,
    types: int = 2,
    source: str = "records",
) -> tuple[Labelled, int]:
    """The records as rows, and how many of them were cut.

    Args:
        records: as from ``read_records``.
        tokenizer: as from ``load_tokenizer``; its special tokens and type ids are taken.
        text_fields: the field of the text, or the two of a pair.
        labels: of each record, as from ``class_numbers`` or ``numbers``.
        max_length: the most tokens a row may have, special ones among them. Of a pair the longer
            text is cut first.
        pad_id: the model's id of padding.
        types: how many type ids the model has; with one or none they are all 0.
        source: what error messages call the records.

    Raises:
        UserError: a field that is missing or holds no text; no room beside the special tokens.

    Example:
        >>> import tokenizers
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[CLS]": 0, "hi": 1}))
        >>> words.post_processor = tokenizers.processors.TemplateProcessing(
        ...     single="[CLS] $A", special_tokens=[("[CLS]", 0)])
        >>> tokenizer = Tokenizer(words, None, None, 2, None, {})
        >>> rows, cut = encode_labelled([{"text": "hi"}], tokenizer, ["text"], np.array([1]),
        ...                             max_length=8)
        >>> rows.tokens[0, :2].tolist(), rows.labels.tolist(), cut
        ([0, 1], [1], 0)
    """
    texts = [strings(records, field, source) for field in text_fields]
    encoded = _encoded(tokenizer, texts, max_length)
    longest = max(len(one.ids) for one in encoded)
    shape = len(records), min(max_length, -(-longest // ROOM) * ROOM)
    tokens, segments = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    type_ids = np.zeros(shape, np.int32)
    for row, one in enumerate(encoded):
        tokens[row, : len(one.ids)] = one.ids
        segments[row, : len(one.ids)] = 1
        if types > 1:
            type_ids[row, : len(one.ids)] = one.type_ids
    counted = np.ones(len(records), bool)
    cut = sum(1 for one in encoded if one.overflowing)
    return Labelled(tokens, segments, type_ids, labels, counted), cut


def _encoded(tokenizer: Tokenizer, texts: Sequence[list[str]], max_length: int) -> list[Any]:
    """The encodings of texts or pairs, with special tokens; one that was cut has ``overflowing``
    ones."""
    backend = copy.deepcopy(tokenizer.backend)  # which alone is told to cut
    special = backend.num_special_tokens_to_add(len(texts) > 1)
    if not special:
        raise UserError("this tokenizer adds no special tokens, which an encoder needs: its "
                        "tokenizer.json lacks a post_processor")  # fmt: skip
    if max_length <= special:
        raise UserError(f"max_length {max_length} is not allowed: {special} special tokens go "
                        "into it, and text")  # fmt: skip
    backend.enable_truncation(max_length, strategy="longest_first")
    return backend.encode_batch(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)))


def class_names(records: Sequence[Record], field: str, source: str) -> tuple[str, ...]:
    """The names of the classes in training data: as the data set lists them where it does, else
    sorted, by number where all are whole numbers.

    Raises:
        UserError: a record without a class, or fewer than two classes.

    Example:
        >>> class_names([{"y": 10}, {"y": 9}, {"y": 10}], "y", "train.jsonl")
        ('9', '10')
    """
    values = values_of(records, field, source)
    if isinstance(values[0], OneOf):
        return values[0].names
    found = {_name(v, (), _at(records, i, source), field) for i, v in enumerate(values)}
    whole = all(name.removeprefix("-").isdecimal() for name in found)
    names = tuple(sorted(found, key=lambda name: (int(name) if whole else 0, name)))
    if len(names) < 2:
        raise UserError(f"{source}: every record has the class {names[0]!r} in field {field!r}: "
                        "give data with two classes or more, or name them with "
                        "--labels")  # fmt: skip
    return names


def class_numbers(
    records: Sequence[Record], field: str, names: Sequence[str], source: str, given: bool = False
) -> np.ndarray:
    """The place of each record's class among the names, (records,) int32.

    Args:
        records, field, source: whose class, where, and what errors call them.
        names: of the classes, in order.
        given: whether the names were given rather than found in the data; a whole number that is
            none of them is then a place among them.

    Raises:
        UserError: a record without a class, or with one that is none of ``names``.

    Example:
        >>> class_numbers([{"y": "yes"}, {"y": 0}], "y", ["no", "yes"], "x.jsonl", given=True)
        array([1, 0], dtype=int32)
    """
    numbers = {name: i for i, name in enumerate(names)}
    if given:
        numbers = {str(i): i for i in range(len(names))} | numbers
    found = []
    for i, value in enumerate(values_of(records, field, source)):
        where = _at(records, i, source)
        name = _name(value, names, where, field)
        if name not in numbers:
            raise UserError(f"{where}: field {field!r} holds {value!r:.60}, which is none of the "
                            f"classes {', '.join(names)}: correct it, or name all classes with "
                            "--labels")  # fmt: skip
        found.append(numbers[name])
    return np.array(found, np.int32)


def numbers(records: Sequence[Record], field: str, source: str) -> np.ndarray:
    """Each record's number, (records,) float32; a string that spells one counts.

    Raises:
        UserError: a record with something else, or a number that is not finite.

    Example:
        >>> numbers([{"score": 1}, {"score": "2.5"}], "score", "x.jsonl")
        array([1. , 2.5], dtype=float32)
    """
    found = []
    for i, value in enumerate(values_of(records, field, source)):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{_at(records, i, source)}: field {field!r} holds {value!r:.60}, "
                            "which is no number: correct it, or leave the record out")  # fmt: skip
        found.append(number)
    return np.array(found, np.float32)


def _name(value: Any, names: Sequence[str], where: str, field: str) -> str:
    """A class's name; ``names`` are those that are known, if any are."""
    known = isinstance(value, str | int | float) and str(value) in names
    if isinstance(value, float) and value.is_integer() and not known:
        value = int(value)
    gap = value is None or (isinstance(value, float) and math.isnan(value))
    if gap or (str(value) in ("", "-1") and str(value) not in names):
        raise UserError(f"{where}: field {field!r} holds {value!r}, which stands for no label, as "
                        "in GLUE's test split: give data with labels, or name it among "
                        "--labels")  # fmt: skip
    if isinstance(value, list | tuple):
        raise UserError(f"{where}: field {field!r} holds {value!r:.60}, and one class for each "
                        "text is supported: write a string or a whole number")  # fmt: skip
    if not (isinstance(value, str | int) or known):
        raise UserError(f"{where}: field {field!r} holds {value!r:.60}, which is no class: write a "
                        "string or a whole number")  # fmt: skip
    return str(value)


def _at(records: Sequence[Record], index: int, source: str) -> str:
    return f"{source}, {place(records[index], index + 1)}"
