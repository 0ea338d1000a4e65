"""Reads training records, each a ``dict`` from field name to value, from files and data sets.

| ending | one record is |
|---|---|
| ``.jsonl`` | one line, a JSON object; blank lines are passed over |
| ``.json`` | one item of the file's list: an object, or a string (read as ``{"text": ...}``) |
| ``.csv`` | one row under the header, quoted as in RFC 4180 (a quoted field may span lines) |
| ``.tsv`` | one row under the header; a quote is an ordinary character, as GLUE's files need |
| ``.parquet`` | one row |
| ``.txt`` | one block of lines between blank lines: ``{"text": ...}`` |

Text files are UTF-8, with or without a byte-order mark. A folder, or an ``owner/name`` on the
Hugging Face hub, is read by ``datasets``; there the number of a class becomes its name, and -1,
which stands for none, ``None``. Nothing here reads pickle or runs a data set's code.
"""

import re
from itertools import islice
from pathlib import Path
from typing import Any

from lora_mini_jax.data.files import READERS, OneOf, Record, one_line
from lora_mini_jax.errors import UserError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_records(
    source: str | Path, *, split: str = "train", limit: int | None = None
) -> list[Record]:
    """The records of a file, a folder or a data set on the hub, in their order.

    Args:
        source: a path with an ending of the table above, a folder in the hub's layout, or an
            ``owner/name`` of the hub. What exists on disk wins over the hub.
        split: the split to take from a folder or the hub; a single file has none, so it is unused.
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
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} is not allowed: give a whole number from 1, or leave it")
    path = Path(source).expanduser()
    if path.is_dir():
        records = from_datasets(str(path), split, limit)
    elif path.exists():
        records = _from_file(path, limit)
    elif _is_hub_id(str(source)):
        records = from_datasets(str(source), split, limit)
    else:
        raise UserError(
            f"no such file or folder: {source}; give a file that ends in {_allowed()}, "
            "a folder with a data set, or a hub id like owner/name"
        )
    if not records:
        raise UserError(f"{source} holds no records: give a file with at least one")
    return records


def _is_hub_id(source: str) -> bool:
    # A mistyped path must not wait for the network: what has an ending, or lies in a folder that
    # exists, was meant as a path.
    path = Path(source)
    named_like_a_file = path.suffix.lower() in READERS or path.parent.is_dir()
    return _HUB_ID.fullmatch(source) is not None and not named_like_a_file


def _allowed() -> str:
    return ", ".join(READERS)


def _from_file(path: Path, limit: int | None) -> list[Record]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"cannot tell how to read {path}: give a file that ends in {_allowed()}")
    try:
        return list(islice(reader(path), limit))
    except OSError as error:
        raise UserError(f"cannot read {path} ({one_line(error)}): check the file") from error


def from_datasets(
    name: str, split: str, limit: int | None, config: str | None = None
) -> list[Record]:
    """The records of a folder or of a data set on the hub; ``config`` is one of several in it."""
    from datasets import load_dataset

    # What a data set and the network can raise is an open set, and all of it is the user's to fix.
    try:
        dataset = load_dataset(name, *([config] if config else []), split=split)
        dataset = dataset.select(range(min(limit or len(dataset), len(dataset))))
        return _with_names(dataset)
    except Exception as error:
        raise UserError(
            f"cannot load split {split!r} of data set {name}{f', {config}' if config else ''} "
            f"({one_line(error)}): check the name, the split and the network, or give a local file"
        ) from error


def _with_names(dataset: Any) -> list[Record]:
    from datasets import ClassLabel

    records, features = dataset.to_list(), dataset.features
    for field in (f for f, kind in features.items() if isinstance(kind, ClassLabel)):
        names = tuple(features[field].names)
        for record in records:
            number = record[field]
            known = number is not None and number >= 0
            record[field] = OneOf(names, number) if known else None
    return records
