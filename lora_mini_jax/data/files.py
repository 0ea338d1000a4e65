"""One reader per file format: a path in, an iterator of records (``dict``) out.

``READERS`` maps an ending to its reader; ``records.read_records`` has the table of formats. Every
reader yields as it reads, so that a limit spares the rest of the file. Errors are ``UserError``
and name the file and, in text files, the line, counted from 1.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from lora_mini_jax.errors import UserError, one_line

Record = dict[str, Any]
CHUNK = 128
"""Records that are tokenised at once."""

_JSON_KINDS = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}


class OneOf(str):
    """The name of a class that knows the names of all classes of its field, in their order."""

    names: tuple[str, ...]

    def __new__(cls, names: tuple[str, ...], number: int) -> "OneOf":
        made = super().__new__(cls, names[number])
        made.names = names
        return made


class At(dict[str, Any]):
    """A record that knows the line of its file on which it begins, so that an error can say it."""

    def __init__(self, values: Any, line: int) -> None:
        super().__init__(values)
        self.line = line


def place(record: Record, number: int) -> str:
    """Where a record is: its line where its file has lines, else its number from 1."""
    return f"line {record.line}" if isinstance(record, At) else f"record {number}"


def of_table(row: Record) -> Record:
    """A row of a table without the keys that objects in it have of other rows: a column's objects
    all have the same keys, null where a row has none, and a chat template would write those.

    Example:
        >>> of_table({"id": None, "messages": [{"role": "user", "content": "Hi", "name": None}]})
        {'id': None, 'messages': [{'role': 'user', 'content': 'Hi'}]}
    """
    return {field: _own(value) for field, value in row.items()}


def _own(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _own(inner) for key, inner in value.items() if inner is not None}
    return [_own(inner) for inner in value] if isinstance(value, list) else value


def chunks(records: Iterable[Record]) -> Iterator[tuple[int, list[Record]]]:
    """Lists of up to `CHUNK` records, each with the number of its first, from 1."""
    rest, first = iter(records), 1
    while chunk := list(islice(rest, CHUNK)):
        yield first, chunk
        first += len(chunk)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1, decoded singly so an error has one."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: byte {error.object[error.start]:#04x} is not UTF-8: "
                    "save the file as UTF-8"
                ) from None


def _kind(value: object) -> str:
    return _JSON_KINDS.get(type(value), "a number")


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not valid JSON ({one_line(error)}): "
                "write one JSON object a line"
            ) from None
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number}: {_kind(record)}, not an object: "
                'write one JSON object a line, like {"text": "..."}'
            )
        yield At(record, number)


def _json(path: Path) -> Iterator[Record]:
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        return
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"{path}{line}: not valid JSON ({one_line(error)}): "
            "write a list of objects, or name a file with one object a line .jsonl"
        ) from None
    if not isinstance(items, list):
        given = "an object" if isinstance(items, dict) else _kind(items)
        raise UserError(f"{path} holds {given} at its top: write a list of objects")
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict | str):
            raise UserError(f"{path}, item {number}: {_kind(item)}: write an object or a string")
        yield {"text": item} if isinstance(item, str) else item


def _table(
    path: Path, delimiter: str, quoting: Any, header: list[str] | None = None
) -> Iterator[Record]:
    lines = (line for _, line in _lines(path))
    csv.field_size_limit(2**28)  # Python's own is 128 KiB; a quote never closed reads no further
    # Strict, for otherwise a quote that is never closed swallows the rest of the file in silence.
    rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    start = 1
    try:
        for row in rows:
            if row and header is None:
                header = row
                if len(set(header)) < len(header):
                    raise UserError(
                        f"{path}, line {start}: two columns have one name ({', '.join(header)}): "
                        "name each column differently"
                    )
            elif row and header is not None:
                if len(row) != len(header):
                    raise UserError(
                        f"{path}, line {start}: fields: {len(row)}, but the header has "
                        f"{len(header)} ({', '.join(header)}): give every row as many as the header"
                    )
                yield At(zip(header, row, strict=True), start)
            start = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {start}: not a row of the table ({error}): "
            "quote the field as RFC 4180 does, or write the records as .jsonl"
        ) from None


def _csv(path: Path) -> Iterator[Record]:
    return _table(path, ",", csv.QUOTE_MINIMAL)


def tsv(path: Path, header: Sequence[str] | None = None) -> Iterator[Record]:
    """A tsv file's rows; with ``header``, the names of the columns, all of them."""
    return _table(path, "\t", csv.QUOTE_NONE, None if header is None else list(header))


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from map(of_table, batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path} is not a parquet file ({one_line(error)}): write it again, or as .jsonl"
        ) from None


def _txt(path: Path) -> Iterator[Record]:
    lines = (line.rstrip("\r\n") for _, line in _lines(path))
    for blank, block in groupby(lines, key=lambda line: not line.strip()):
        if not blank:
            yield {"text": "\n".join(block)}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": tsv,
    ".parquet": _parquet,
    ".txt": _txt,
}
