"""Examples as they come, in parts: what texts and pairs of texts have in common."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

from lora_mini_jax.data.fields import Fields
from lora_mini_jax.data.files import Record, chunks
from lora_mini_jax.errors import UserError

Overlong = Literal["skip", "truncate", "error"]


class Encoded(NamedTuple):
    """The examples in the order of their records, and how many were left out or cut."""

    examples: list[Any]
    skipped: int
    truncated: int


def check_limits(max_length: int, overlong: str) -> None:
    """Raise `UserError` for limits that are not allowed."""
    if max_length < 2:
        raise UserError(f"max_length {max_length} is not allowed: give a whole number from 2")
    if overlong not in get_args(Overlong):
        raise UserError(f"overlong {overlong!r} is not allowed: give skip, truncate or error")


def in_parts(
    records: Iterable[Record],
    fields: Fields,
    encode: Callable[[Sequence[Record], Fields, int], Encoded],
    source: str,
    wanted: Callable[[], str],
) -> Iterator[Encoded]:
    """``encode(chunk, fields, first)`` of a hundred records or so at a time, the first of them the
    ``first``; ``wanted`` says of a record what none is, where nothing is left.

    Raises:
        UserError: no records, or nothing left.
    """
    seen = kept = 0
    for first, chunk in chunks(records):
        fields = fields.resolved(chunk[0])  # the first chunk's: from then on they are named
        part = encode(chunk, fields, first)
        seen, kept = seen + len(chunk), kept + len(part.examples)
        yield part
    if not seen:
        raise UserError(f"{source}: no records to encode: give at least one")
    if not kept:
        raise UserError(f"{source}: none of {seen} records {wanted()}: raise max_length, set "
                        "overlong to truncate, or check the fields")  # fmt: skip


def joined(parts: Iterable[Encoded]) -> Encoded:
    """All parts as one."""
    parts = list(parts)
    examples = [example for part in parts for example in part.examples]
    return Encoded(examples, sum(p.skipped for p in parts), sum(p.truncated for p in parts))
