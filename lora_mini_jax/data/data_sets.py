"""Records of a data set: a folder in the hub's layout, or a name on the hub."""

from collections.abc import Iterator
from typing import Any

from lora_mini_jax.data.files import CHUNK, OneOf, Record, of_table
from lora_mini_jax.errors import UserError, one_line


def load_split(name: str, split: str, limit: int | None, config: str | None = None) -> Any:
    """A split of a data set, of at most ``limit`` records; ``config`` is one of several in it.

    Raises:
        UserError: it cannot be loaded, whatever the reason.
    """
    from datasets import load_dataset

    # What a data set and the network can raise is an open set, and all of it is the user's to fix.
    try:
        dataset = load_dataset(name, *([config] if config else []), split=split)
        return dataset.select(range(min(limit or len(dataset), len(dataset))))
    except Exception as error:
        raise UserError(
            f"cannot load split {split!r} of data set {name}{f', {config}' if config else ''} "
            f"({one_line(error)}): check the name, the split and the network, or give a local file"
        ) from error


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
