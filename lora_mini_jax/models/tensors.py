"""Safetensors files, read a few megabytes at a time: never mapped, never held whole.

The pages of a mapped file are memory of the process for as long as it is open, so that a model
would be held twice while it is read.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_mini_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""The kinds of numbers that are read, by the names in the files."""

_LONGEST_HEADER = 100_000_000  # the format's own limit
_SLAB = 1 << 22


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in a file; nothing of it is in memory.

    Attributes:
        file, name: the file, and what the tensor is called there.
        kind: the numbers, ``"BF16"``; read only where it is a key of `DTYPES`.
        shape: as the file has it.
        start: its first byte, counted from the start of the file.
    """

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int

    def read(self, out: np.ndarray, part: tuple[slice, ...]) -> None:
        """Fill ``out`` with a part of the tensor, one slice a dimension, cast to ``out``'s dtype.

        Raises:
            UserError: the file has become shorter, or cannot be read.
        """
        if not self.shape:
            out, part = out[None], (slice(None),)
        shape, dtype = self.shape or (1,), DTYPES[self.kind]
        row = dtype.itemsize * math.prod(shape[1:])
        first, last, _ = part[0].indices(shape[0])
        straight = out.dtype == dtype and out.shape[1:] == shape[1:] and out.flags.c_contiguous
        step = max(1, _SLAB // max(1, row))
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.start + first * row)
                for i in range(first, last, step):
                    many = min(step, last - i)
                    to = out[i - first : i - first + many]
                    slab = to if straight else np.empty((many, *shape[1:]), dtype)
                    if stream.readinto(slab.reshape(-1).view(np.uint8).data) != slab.nbytes:
                        raise UserError(f"{self.file} ends within {self.name}: fetch it again")
                    if not straight:
                        to[...] = slab[(slice(None), *part[1:])]
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror}") from None


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and numbers; read piece by piece.

    Raises:
        UserError: as `Tensor.read`.
    """
    if one.shape != other.shape or not {one.kind, other.kind} <= DTYPES.keys():
        return False
    dtype = DTYPES[one.kind] if one.kind == other.kind else np.dtype(np.float64)
    row = max(1, dtype.itemsize * math.prod(one.shape[1:]))
    step, count = max(1, _SLAB // row), one.shape[0] if one.shape else 1
    whole = (slice(None),) * len(one.shape)
    for i in range(0, count, step):
        part = (slice(i, i + step), *whole[1:]) if one.shape else ()
        size = (min(step, count - i), *one.shape[1:]) if one.shape else ()
        a, b = np.empty(size, dtype), np.empty(size, dtype)
        one.read(a, part)
        other.read(b, part)
        if not np.array_equal(a, b):
            return False
    return True


def tensors_of(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name; only its header is read.

    Raises:
        UserError: a file that cannot be read, or whose header is no header of such a file.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"it declares a header of {length} bytes and has {size} in all")
            return _entries(file, json.loads(stream.read(length)), 8 + length, size)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{file} is damaged (its header is nested too deeply): fetch it again"
                        ) from None  # fmt: skip
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): fetch it again") from None


def _entries(file: Path, header: Any, base: int, size: int) -> dict[str, Tensor]:
    """The tensors that a header lists; ``ValueError`` where it is not to be trusted."""
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    found, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not name.isprintable():
            raise ValueError(f"it has a tensor called {name!r}")
        kind, shape, (start, stop) = _entry(name, entry)
        dtype = DTYPES.get(kind)
        if dtype is not None and stop - start != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{name} is {kind} {shape} in {stop - start} bytes")
        found[name] = Tensor(file, name, kind, shape, base + start)
        spans.append((start, stop))
    # Side by side, from end to end: then none overlap, and none lie outside the file.
    ends = [0, *(stop for _, stop in sorted(spans))]
    if any(start != end or stop < start for (start, stop), end in
           zip(sorted(spans), ends, strict=False)) or ends[-1] != size - base:  # fmt: skip
        raise ValueError("its tensors do not fill it from end to end")
    return found


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """(kind, shape, offsets) of one tensor, of the right types at least."""

    def counts(key: str) -> tuple[int, ...]:
        value = entry.get(key)
        if not isinstance(value, list) or any(type(n) is not int or n < 0 for n in value):
            raise ValueError(f"{name} has no {key} of whole numbers")
        return tuple(value)

    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise ValueError(f"{name} has no dtype")
    if not entry["dtype"].isprintable() or len(counts("data_offsets")) != 2:
        raise ValueError(f"{name} has no place in it")
    start, stop = counts("data_offsets")
    return entry["dtype"], counts("shape"), (start, stop)
