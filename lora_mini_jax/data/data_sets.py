"""Records of a data set: a folder in the hub's layout or of ``save_to_disk``, or a hub's name."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_mini_jax.data.files import CHUNK, OneOf, Record, of_table
from lora_mini_jax.errors import UserError, one_line

VALIDATION = ("validation", "valid", "val", "dev")
"""What data sets call the split that is held out while one trains. ``datasets`` calls it the first
where it goes by the names of files; the others are written in a data set's card."""


def is_one_split(name: str | Path) -> bool:
    """Whether it is a folder that ``Dataset.save_to_disk`` wrote: a single split, without a name
    to ask for."""
    return all(Path(name, file).is_file() for file in ("state.json", "dataset_info.json"))


def held_out_split(name: str) -> str:
    """The split of `VALIDATION` that a data set has; "" where there is none.

    Raises:
        UserError: it cannot be loaded, whatever the reason.
    """
    from datasets import load_dataset

    if is_one_split(name):
        return ""
    with _loading(f"data set {name}", "the name and the network"):
        there = load_dataset(name)
    return next((split for split in VALIDATION if split in there), "")


def load_split(name: str, split: str, limit: int | None, config: str | None = None) -> Any:
    """A split of a data set, of at most ``limit`` records; ``config`` is one of several in it. Of a
    folder with one split that one, whatever ``split`` says.

    Raises:
        UserError: it cannot be loaded, whatever the reason.
    """
    from datasets import load_dataset, load_from_disk

    of = f"data set {name}{f', {config}' if config else ''}"
    with _loading(f"split {split!r} of {of}", "the name, the split and the network"):
        if is_one_split(name):
            dataset: Any = load_from_disk(name)
        else:
            dataset = load_dataset(name, *([config] if config else []), split=split)
        return dataset.select(range(min(limit or len(dataset), len(dataset))))


@contextmanager
def _loading(what: str, check: str) -> Generator[None]:
    """Turn what loading a data set raises into a `UserError`: with the network it is an open set,
    and all of it is the user's to fix."""
    try:
        yield
    except Exception as error:
        raise UserError(f"cannot load {what} ({one_line(error)}): check {check}, or give a local "
                        "file") from error  # fmt: skip


def with_names(dataset: Any) -> Iterator[Record]:
    """The records of a data set, with the names of classes for their numbers."""
    from datasets import ClassLabel

    classes = {f: tuple(k.names) for f, k in dataset.features.items() if isinstance(k, ClassLabel)}
    for start in range(0, len(dataset), CHUNK):
        part = dataset.select(range(start, min(start + CHUNK, len(dataset))))
        for record in map(of_table, part.to_list()):
            for field, names in classes.items():
                number = record[field]
                known = number is not None and number >= 0
                record[field] = OneOf(names, number) if known else None
            yield record
