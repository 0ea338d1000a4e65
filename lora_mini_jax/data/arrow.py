"""Arrays with a row for each entry in Arrow files: written as they come, read where they are asked.

A file is a sequence of record batches of one size, the last may be smaller, so the place of a row
is known from its number. It is mapped into memory: nothing is read but the rows that are indexed,
and what has been read is the operating system's to forget.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lora_mini_jax.errors import UserError

AT_ONCE = 1024
"""Entries in a record batch of arrays that differ in length."""
SMALL = ("segment_ids", "positions", "source_mask")
"""Arrays of int32 that hold nothing larger than a row is wide: 16 bits will do on disk."""


def write_rows(path: Path, chunks: Iterable[Any]) -> None:
    """Write dataclasses of arrays (rows, width), int32 or bool, as one file, for `read_rows`.

    All but the last have the same number of rows.
    """

    def stored(name: str, array: np.ndarray) -> np.ndarray:
        small = name in SMALL and array.shape[1] < 2**16
        return array.astype(np.uint16) if small else _plain(array)

    def columns() -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        import pyarrow as pa

        for chunk in chunks:
            arrays = vars(chunk)
            fixed = {
                name: pa.FixedSizeListArray.from_arrays(
                    pa.array(stored(name, array).ravel()), array.shape[1]
                )
                for name, array in arrays.items()
            }
            yield fixed, {name: array.dtype.name for name, array in arrays.items()}

    _write(path, columns())


def write_examples(path: Path, examples: Iterable[Any]) -> None:
    """Write named tuples of arrays (n,), int32 or bool, as one file, for `Examples`."""

    def columns() -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        import pyarrow as pa

        rest = iter(examples)
        while some := list(islice(rest, AT_ONCE)):
            lists, kinds = {}, {}
            for name in some[0]._fields:
                arrays = [getattr(example, name) for example in some]
                ends = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
                values = pa.array(_plain(np.concatenate(arrays)))
                lists[name] = pa.LargeListArray.from_arrays(pa.array(ends), values)
                kinds[name] = arrays[0].dtype.name
            yield lists, kinds

    _write(path, columns())


def _plain(array: np.ndarray) -> np.ndarray:
    # Arrow's own booleans are bits, which NumPy cannot look at in place.
    return array.view(np.uint8) if array.dtype == bool else array


def _write(path: Path, batches: Iterable[tuple[Mapping[str, Any], Mapping[str, str]]]) -> None:
    import pyarrow as pa

    with path.open("wb") as file:
        writer = None
        for columns, kinds in batches:
            batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
            batch = batch.replace_schema_metadata(kinds)
            writer = writer or pa.ipc.new_file(file, batch.schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()
        file.flush()
        os.fsync(file.fileno())


class _Mapped:
    """A file of record batches; ``chunk(i)`` gives what ``views`` makes of one of them."""

    def __init__(self, path: Path, views: Callable[[Any], Any]) -> None:
        import pyarrow as pa

        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            count = reader.num_record_batches
            self.at_once = reader.get_batch(0).num_rows
            self.rows = (count - 1) * self.at_once + reader.get_batch(count - 1).num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}): delete {path.parent}, and it is made "
                "again"
            ) from error
        self.schema = reader.schema
        self.kinds = {n.decode(): np.dtype(k.decode()) for n, k in self.schema.metadata.items()}
        self.chunk = lru_cache(maxsize=1024)(lambda i: views(reader.get_batch(i)))


class Column:
    """Arrays of rows (rows, width) in a file, as one array: indexed by a slice or by row numbers.

    What is indexed is a NumPy array of ``dtype``; made by `read_rows`.
    """

    def __init__(self, mapped: _Mapped, name: str) -> None:
        self._mapped, self._name = mapped, name
        self.dtype = mapped.kinds[name]
        self.shape = (mapped.rows, mapped.schema.field(name).type.list_size)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        found = np.empty((len(rows), self.shape[1]), self.dtype)
        for i, row in enumerate(rows.tolist()):
            chunk, at = divmod(row, self._mapped.at_once)
            found[i] = self._mapped.chunk(chunk)[self._name][at]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


def read_rows(path: Path, kind: type) -> Any:
    """What `write_rows` wrote, as one dataclass ``kind`` of `Column`.

    Raises:
        UserError: the file is damaged.
    """

    def views(batch: Any) -> dict[str, np.ndarray]:
        flat = {name: batch.column(name).flatten() for name in batch.schema.names}
        return {name: f.to_numpy().reshape(batch.num_rows, -1) for name, f in flat.items()}

    mapped = _Mapped(path, views)
    return kind(**{name: Column(mapped, name) for name in mapped.schema.names})


class Examples(Sequence[Any]):
    """What `write_examples` wrote, as a sequence of named tuples ``kind``, each read when asked.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path, kind: Callable[..., Any]) -> None:
        def views(batch: Any) -> list[tuple[np.ndarray, np.ndarray]]:
            lists = (batch.column(name) for name in batch.schema.names)
            return [(each.offsets.to_numpy(), each.values.to_numpy()) for each in lists]

        self._mapped, self._kind = _Mapped(path, views), kind
        self._dtypes = [self._mapped.kinds[name] for name in self._mapped.schema.names]

    def __len__(self) -> int:
        return self._mapped.rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk, at = divmod(index, self._mapped.at_once)
        arrays = (v[ends[at] : ends[at + 1]] for ends, v in self._mapped.chunk(chunk))
        return self._kind(*(a.astype(d) for a, d in zip(arrays, self._dtypes, strict=True)))
