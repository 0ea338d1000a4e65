"""Examples as they come, in parts: what texts and pairs of texts have in common."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from lora_mini_jax.data.fields import Fields
from lora_mini_jax.data.files import Record, chunks, place
from lora_mini_jax.errors import UserError
from lora_mini_jax.settings.checks import require_choice, require_whole
from lora_mini_jax.settings.choices import Overlong


class Encoded(NamedTuple):
    """The examples in the order of their records, and how many were left out or cut."""

    examples: list[Any]
    skipped: int
    truncated: int


class Limits(NamedTuple):
    """The most tokens an example may have on any of its sides, and what becomes of longer ones."""

    max_length: int
    overlong: Overlong

    def check(self) -> None:
        """Raise `UserError` for limits that are not allowed."""
        require_whole("max_length", self.max_length, low=2)
        require_choice("overlong", self.overlong, Overlong)


class Whole(Protocol):
    """An example of any length."""

    @property
    def length(self) -> int:
        """Its tokens, on its longer side where it has two."""


Cut = Callable[[Any, int], Any]
"""What is left of an example within so many tokens, itself where it is no longer; None where that
has nothing to learn."""


def in_parts(
    records: Iterable[Record],
    fields: Fields,
    encode: Callable[[Sequence[Record], Fields, int], Sequence[Whole]],
    cut: Cut,
    limits: Limits,
    source: str,
) -> Iterator[Encoded]:
    """``encode(chunk, fields, first)`` of a hundred records or so at a time, the first of them the
    ``first``, and what ``cut`` leaves of that within the limits.

    Raises:
        UserError: limits that are not allowed; no records; an overlong example if so asked;
            nothing left.
    """
    limits.check()
    shortest, longest = math.inf, 0
    seen = kept = 0
    for first, chunk in chunks(records):
        fields = fields.resolved(chunk[0])  # the first chunk's: from then on they are named
        examples = encode(chunk, fields, first)
        shortest = min(shortest, *(example.length for example in examples))
        longest = max(longest, *(example.length for example in examples))
        part = _fit(chunk, examples, cut, limits, source, first)
        seen, kept = seen + len(chunk), kept + len(part.examples)
        yield part
    if not seen:
        raise UserError(f"{source}: no records to encode: give at least one")
    if not kept:
        raise UserError(
            f"{source}: none of {seen} records gives an example to learn from (lengths: {shortest} "
            f"to {longest} tokens, max_length {limits.max_length}): raise max_length, set overlong "
            "to truncate, or check the fields"
        )


def _fit(
    records: Sequence[Record],
    examples: Sequence[Whole],
    cut: Cut,
    limits: Limits,
    source: str,
    first: int,
) -> Encoded:
    kept, truncated = [], 0
    for number, (record, example) in enumerate(zip(records, examples, strict=True), first):
        long = example.length > limits.max_length
        if long and limits.overlong == "error":
            raise UserError(
                f"{source}, {place(record, number)}: {example.length} tokens, more than max_length "
                f"{limits.max_length}: raise max_length, or set overlong to skip or truncate"
            )
        if long and limits.overlong == "skip":
            continue
        left = cut(example, limits.max_length)
        if left is not None:
            kept.append(left)
            truncated += long
    return Encoded(kept, len(examples) - len(kept), truncated)


def joined(parts: Iterable[Encoded]) -> Encoded:
    """All parts as one."""
    parts = list(parts)
    examples = [example for part in parts for example in part.examples]
    return Encoded(examples, sum(p.skipped for p in parts), sum(p.truncated for p in parts))
