"""Kernels as precise as those that an adapter was drawn from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.saved.record import Record
from lora_mini_jax.tree import dense, flatten, rounded, unflatten


def as_drawn_from(params: Mapping[str, Any], record: Record) -> Mapping[str, Any]:
    """The parameters, with adapted kernels rounded to the numbers they had in training: singular
    vectors of a kernel are not those of the kernel rounded. Each is rounded when it is opened
    (`tree.dense`), so that not all of them are in memory twice."""
    if record.dtype == "float32":
        return params
    flat, dtype = flatten(params), jnp.dtype(record.dtype)
    for path in flat.keys() & {site.target.path for site in record.sites}:
        if flat[path].dtype != dtype:
            flat[path] = _Rounded(flat[path], dtype)
    return unflatten(flat)


@partial(jax.tree_util.register_dataclass, data_fields=("kernel",), meta_fields=("dtype",))
@dataclass(frozen=True)
class _Rounded:
    """A kernel, quantised or not, that opens as an array of this dtype."""

    kernel: Any
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def unbox(self) -> jax.Array:
        return rounded(dense(self.kernel), self.dtype)
