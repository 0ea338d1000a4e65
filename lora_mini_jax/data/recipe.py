"""How records become examples, and examples rows: what a task says, and what is noted meanwhile."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_mini_jax.data.records import Records


@dataclass(frozen=True)
class Recipe:
    """How records become rows.

    Attributes:
        encode: ``encode(records, source=...)`` gives parts with ``examples``, ``skipped`` and
            ``truncated``.
        rows: ``rows(examples, lengths, at_once=...)`` gives a dataclass of arrays for every so many
            rows; ``lengths`` is (examples, arrays of each) int32.
        example: the class of an example, a named tuple of arrays.
        row: the class of the rows.
        settings: what else has a say, as JSON.
        tokenizer: the folder of the tokenizer.
    """

    encode: Callable[..., Iterator[Any]]
    rows: Callable[..., Iterator[Any]]
    example: type
    row: type
    settings: Any
    tokenizer: Path


class Part(NamedTuple):
    """Training or held-out data, made."""

    rows: Any
    examples: Sequence[Any]
    skipped: int
    truncated: int
    top: int
    """The largest token id."""


class Tally:
    """What is noted of the examples while they go by."""

    def __init__(self) -> None:
        self.skipped = self.truncated = self.top = 0
        self._lengths = array("i")

    def examples(self, parts: Iterable[Any]) -> Iterator[Any]:
        """The examples of all parts."""
        for part in parts:
            self.skipped += part.skipped
            self.truncated += part.truncated
            for example in part.examples:
                self._lengths.extend(map(len, example))
                ids = (int(a.max()) for a in example if a.dtype != bool)
                self.top = max(self.top, *ids)
                yield example

    def lengths(self, arrays: int) -> np.ndarray:
        """(examples, arrays of each)."""
        return np.frombuffer(self._lengths, np.intc).reshape(-1, arrays)

    def counts(self) -> dict[str, int]:
        """What is kept of it."""
        return {"skipped": self.skipped, "truncated": self.truncated, "top": self.top}


def in_memory(records: Records, recipe: Recipe, source: str) -> Part:
    """The rows and examples of the records, kept nowhere; ``source`` is what errors call them."""
    tally = Tally()
    examples = list(tally.examples(recipe.encode(records, source=source)))
    lengths = tally.lengths(len(examples[0]))
    (rows,) = recipe.rows(examples, lengths, at_once=len(examples))
    return Part(rows, examples, **tally.counts())
