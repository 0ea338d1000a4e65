"""Reads training records, each a ``dict`` from field name to value, from files and data sets.

| ending | one record is |
|---|---|
| ``.jsonl`` | one line, a JSON object; blank lines are passed over |
| ``.json`` | one item of the file's list: an object, or a string (read as ``{"text": ...}``) |
| ``.csv`` | one row under the header, quoted as in RFC 4180 (a quoted field may span lines) |
| ``.tsv`` | one row under the header; a quote is an ordinary character, as GLUE's files need |
| ``.parquet`` | one row |
| ``.txt`` | one block of lines between blank lines: ``{"text": ...}`` |

Text files are UTF-8, with or without a byte-order mark. A folder, files in the hub's layout or what
``save_to_disk`` wrote, or an ``owner/name`` on the Hugging Face hub, is read by ``datasets``; there
the number of a class becomes its name, and -1, which stands for none, ``None``. Nothing here reads
pickle or runs a data set's code.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from lora_mini_jax.data.data_sets import held_out_split, load_split, with_names
from lora_mini_jax.data.files import READERS, Record
from lora_mini_jax.errors import UserError, one_line

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, eq=False)
class Records:
    """Records that are read anew whenever one goes through them, and never held all at once.

    Attributes:
        read: begins to read them.
        fingerprint: says what they are as JSON, by content: the same from equal records only.
    """

    read: Callable[[], Iterator[Record]]
    fingerprint: Callable[[], Any]

    def __iter__(self) -> Iterator[Record]:
        return self.read()

    @cached_property
    def count(self) -> int:
        """How many there are; they are read to know it."""
        return sum(1 for _ in self)

    @cached_property
    def content(self) -> Any:
        """What ``fingerprint`` says, asked once."""
        return self.fingerprint()


def read_records(
    source: str | Path, *, split: str = "train", limit: int | None = None
) -> list[Record]:
    """The records of a file, a folder or a data set on the hub, in their order, as a list.

    Args:
        source: a path with an ending of the table above, a folder in the hub's layout or of
            ``save_to_disk``, or an ``owner/name`` of the hub. What exists on disk wins over the
            hub.
        split: the split to take from a folder or the hub; a single file has none, nor has a
            ``Dataset`` that was saved, so it is unused.
        limit: take only the first ``limit`` records (all of them by default). What lies beyond
            them in a file is neither read nor checked.

    Raises:
        UserError: no such source, an ending that is not in the table, no records, or a malformed
            one; the message names the file and, in text files, the line, counted from 1.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "pets.csv"
        >>> _ = path.write_text('name,says\\nCat,"Meow, meow"\\n')
        >>> read_records(path)
        [{'name': 'Cat', 'says': 'Meow, meow'}]
    """
    return list(open_records(source, split=split, limit=limit))


def open_records(source: str | Path, *, split: str = "train", limit: int | None = None) -> Records:
    """What `read_records` reads, without holding it in memory; arguments as there.

    A file is told by the SHA-256 of its bytes, a data set by its fingerprint, which ``datasets``
    makes from its files.

    Raises:
        UserError: as `read_records`; what is wrong within a file shows while it is read.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} is not allowed: give a whole number from 1, or leave it")
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_dataset(str(path), split, limit)
    if path.exists():
        return _of_file(path, limit)
    if _is_hub_id(str(source)):
        return _of_dataset(str(source), split, limit)
    raise UserError(
        f"no such file or folder: {source}; give a file that ends in {_allowed()}, "
        "a folder with a data set, or a hub id like owner/name"
    )


def validation_split(source: str) -> str:
    """What a folder, or a data set on the hub, calls the split that it holds out itself; "" where
    it has none, and of a file.

    Raises:
        UserError: a data set that cannot be loaded.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return held_out_split(str(path))
    return held_out_split(source) if not path.exists() and _is_hub_id(source) else ""


def held_out(
    records: Records, share: float, limit: int | None, source: str
) -> tuple[Records, Records]:
    """``(training, held out)``: the last ``share`` of the records, one at least, is held out.

    ``limit`` keeps only the first so many of those. Where the border is shows when either is read,
    for all have to be counted.

    Raises:
        UserError: while reading: a single record, which is called ``source``.

    Example:
        >>> ten = Records(lambda: iter([{"text": str(i)} for i in range(10)]), lambda: "ten")
        >>> [len(list(part)) for part in held_out(ten, 0.2, None, "ten")]
        [8, 2]
    """

    def border() -> int:
        if records.count < 2:
            raise UserError(f"one record of {source} is read, and some are to be held out: give "
                            "--valid, or more data")  # fmt: skip
        return records.count - max(1, round(records.count * share))

    def last() -> Iterator[Record]:
        start = border()
        return islice(records, start, None if limit is None else start + limit)

    return (
        Records(
            lambda: islice(records, border()),
            lambda: {"but the last": share, "of": records.content},
        ),
        Records(last, lambda: {"the last": share, "of": records.content, "limit": limit}),
    )


def _is_hub_id(source: str) -> bool:
    # A mistyped path must not wait for the network: what has an ending, or lies in a folder that
    # exists, was meant as a path.
    path = Path(source)
    named_like_a_file = path.suffix.lower() in READERS or path.parent.is_dir()
    return _HUB_ID.fullmatch(source) is not None and not named_like_a_file


def _allowed() -> str:
    return ", ".join(READERS)


def _of_file(path: Path, limit: int | None) -> Records:
    ending = path.suffix.lower()
    if ending not in READERS:
        raise UserError(f"cannot tell how to read {path}: give a file that ends in {_allowed()}")

    if not path.is_file():
        raise UserError(f"{path} is no ordinary file, and data is read more than once: write it to "
                        "a file")  # fmt: skip

    def read() -> Iterator[Record]:
        empty = True
        try:
            for record in islice(READERS[ending](path), limit):
                empty = False
                yield record
        except OSError as error:
            raise UserError(f"cannot read {path} ({one_line(error)}): check the file") from error
        if empty:
            raise _empty(path)

    return Records(read, lambda: {"sha256": digest(path), "ending": ending, "limit": limit})


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path} ({one_line(error)}): check the file") from error


def _empty(source: str | Path) -> UserError:
    return UserError(f"{source} holds no records: give a file with at least one")


def _of_dataset(name: str, split: str, limit: int | None) -> Records:
    dataset = load_split(name, split, limit)
    if not len(dataset):
        raise _empty(name)
    return Records(lambda: with_names(dataset), lambda: {"data set": dataset._fingerprint})
