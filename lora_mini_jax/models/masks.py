"""Who sees whom in a decoder: in a few numbers, and as a mask of all pairs where one is needed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
NO_LIMIT = np.iinfo(np.int32).max


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("segments", "slots", "start", "which"),
    meta_fields=("windows",),
)
@dataclass(frozen=True)
class Seen:
    """A token sees the earlier ones of its own segment, and itself.

    Attributes:
        segments: (batch, time) int32, of the tokens, 0 for padding; None is one segment.
        slots: (batch, keys) int32, of the keys; None where `segments` is.
        start: () int32, which key the first token is; None where keys are the tokens themselves.
        windows: how many tokens back one is seen, itself counted, in every kind of layer; None is
            no limit. Padding counts, so that rows may be padded on either side.
        which: () int, whose window it is; None is the only one.
    """

    segments: Array | None = None
    slots: Array | None = None
    start: Array | None = None
    windows: tuple[int | None, ...] = (None,)
    which: Any = None

    @property
    def all_before(self) -> bool:
        """Whether a token sees itself and every one before it: the plain causal mask."""
        return self.segments is None and self.start is None and self.windows == (None,)

    def by(self, which: Any) -> "Seen":
        """In the layers of this kind; None where all are of one."""
        return replace(self, which=which)

    def mask(self, first: Any, queries: int, keys: int) -> Array:
        """(batch or 1, 1, queries, keys) bool: what each sees of so many tokens, from ``first`` on.

        Padding sees padding: no query's row is ever empty, so no softmax can be 0/0.
        """
        start = 0 if self.start is None else self.start
        back = (start + first + jnp.arange(queries))[:, None] - jnp.arange(keys)
        seen = (back >= 0)[None, None]
        if self.windows != (None,):
            limits = jnp.asarray([NO_LIMIT if w is None else w for w in self.windows])
            seen = seen & (back < limits[0 if self.which is None else self.which])
        if self.segments is None or self.slots is None:
            return seen
        own = jax.lax.dynamic_slice_in_dim(self.segments, first, queries, 1)
        return seen & (own[:, :, None] == self.slots[:, None, :])[:, None]


def look_back(
    tokens: Array,
    segment_ids: Array | None,
    cache: Mapping[str, Any] | None = None,
    windows: tuple[int | None, ...] = (None,),
) -> Seen:
    """Whom tokens see: of themselves, or of what is in a cache when they are in it too.

    Args:
        tokens: (batch, time).
        segment_ids: (batch, time) int32, 0 for padding; None is one segment.
        cache: with ``length`` () and ``segment_ids`` (batch, length); the tokens come after it.
        windows: of every kind of layer, see `Seen`.

    Returns:
        With a cache its ``slots`` are the cache's next ``segment_ids``.
    """
    if cache is None:
        return Seen(segment_ids, segment_ids, None, windows)
    segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    stored, start = cache["segment_ids"], cache["length"]
    slots = jax.lax.dynamic_update_slice(stored, segments.astype(stored.dtype), (0, start))
    return Seen(segments, slots, start, windows)


def pairs(seen: Seen | Array, first: Any, queries: int, keys: int) -> Array:
    """The mask of so many queries, from ``first`` on, where one may be there already."""
    if isinstance(seen, Seen):
        return seen.mask(first, queries, keys)
    if seen.shape[2] == 1:
        return seen
    return jax.lax.dynamic_slice_in_dim(seen, first, queries, 2)
