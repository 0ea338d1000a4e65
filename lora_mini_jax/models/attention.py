"""Attention of decoders: who sees whom, the key-value cache, grouped heads and capped logits."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.models.fused_attention import fused
from lora_mini_jax.products import matmul

Array = jax.Array
AT_ONCE = 1024
"""Queries of a row whose weights are in memory at a time, where it has more than twice as many."""


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    bias: Array | None = None,
    softcap: float | None = None,
    causal: bool = False,
) -> Array:
    """Softmax attention; with fewer key than query heads each serves a group of neighbours.

    The weights of long rows, heads x time x keys, would take more memory than all else: they are
    made for `AT_ONCE` queries at a time, and made again for the backward pass. On NVIDIA GPUs, in a
    narrow dtype, they are never in memory: see `fused_attention`.

    Args:
        q: (batch, time, heads, head_dim).
        k, v: (batch, keys, kv_heads, head_dim).
        mask: (batch or 1, 1, time, keys) bool, True where a query sees a key; None is causal.
        scale: of the logits; None is ``head_dim ** -0.5``.
        bias: (batch or 1, heads, time, keys), added to the logits; None is none.
        softcap: logits become ``softcap * tanh(logits / softcap)``, as Gemma 2's; None is no cap.
        causal: whether the mask shows no query a later key than itself, so that those need not be
            looked at.

    Returns:
        (batch, time, heads, head_dim) of ``q``'s dtype; the softmax is float32.

    Example:
        >>> x = jnp.ones((1, 3, 4, 8))
        >>> attend(x, x[:, :, :2], x[:, :, :2], softcap=30.0).shape
        (1, 3, 4, 8)
    """
    time, keys = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if bias is None and softcap is None:
        out = fused(q, k, v, mask, causal or mask is None, scale)
        if out is not None:
            return out
    if time <= 2 * AT_ONCE:
        mask = jnp.tril(jnp.ones((1, 1, time, keys), bool)) if mask is None else mask
        return _attend(q, k, v, mask, bias, scale, softcap)

    def turn(_: None, start: Array) -> tuple[None, Array]:
        def part(array: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, AT_ONCE, axis)

        before = jnp.arange(keys) <= start + jnp.arange(AT_ONCE)[:, None]
        seen = before[None, None] if mask is None else part(mask, 2)
        near = None if bias is None else part(bias, 2)
        return None, _attend(part(q, 1), k, v, seen, near, scale, softcap)

    whole = (time - 1) // AT_ONCE * AT_ONCE  # the last turn begins earlier, to be as long
    starts = jnp.minimum(jnp.arange(0, time, AT_ONCE), time - AT_ONCE)
    _, turns = jax.lax.scan(jax.checkpoint(turn, prevent_cse=False), None, starts)
    out = jnp.moveaxis(turns, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])
    return jnp.concatenate([out[:, :whole], out[:, whole - time :]], 1)


def _attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    bias: Array | None,
    scale: float,
    softcap: float | None,
) -> Array:
    """`attend` with the weights of all queries in memory."""
    batch, time, _, width = q.shape
    keys, kv_heads = k.shape[1:3]
    # A group's heads are rows of one matrix, so that keys and values need no copies of theirs.
    rows = jnp.moveaxis(q.reshape(batch, time, kv_heads, -1, width), 1, 3)
    rows = rows.reshape(batch, kv_heads, -1, width)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    logits = jnp.einsum("bkqd,bksd->bkqs", rows, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, kv_heads, -1, time, keys)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.reshape(bias.shape[0], *logits.shape[1:3], *bias.shape[2:])
    logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
    # The weights' sum divides the narrow result, not the weights: fewer passes over what grows with
    # the square of the length, and less of it is kept for the backward pass.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = weights.sum(-1).reshape(batch, kv_heads, -1, 1)
    weights = weights.reshape(batch, kv_heads, -1, keys).astype(v.dtype)
    out = matmul(weights, v, preferred_element_type=jnp.float32) / total
    out = jnp.moveaxis(out.reshape(batch, kv_heads, -1, time, width), 3, 1)
    return out.reshape(q.shape).astype(q.dtype)


def init_cache(
    config: Any, batch: int, length: int, dtype: Any = jnp.float32, layers: int | None = None
) -> dict[str, Any]:
    """An empty key-value cache for ``length`` tokens a row; writing past its end is not checked.

    Args:
        config: of any decoder: its layers, heads and their width are read.
        batch, length, dtype: of the cache.
        layers: how many; None is ``config.num_hidden_layers``.

    Returns:
        ``k`` and ``v`` (layers, batch, length, kv_heads, head_dim) of ``dtype``; ``segment_ids``
        (batch, length) int32, 0 where a slot holds padding; ``length`` () int32, slots in use.
    """
    heads = (config.num_key_value_heads, config.head_dim)
    empty = jnp.zeros((layers or config.num_hidden_layers, batch, length, *heads), dtype)
    slots = jnp.zeros((batch, length), jnp.int32)
    return {"k": empty, "v": empty, "segment_ids": slots, "length": jnp.zeros((), jnp.int32)}


def written(kv: tuple[Array, Array], k: Array, v: Array, start: Array | int) -> tuple[Array, Array]:
    """A layer's cache, ``k`` and ``v`` (batch, length, kv_heads, head_dim), with new ones in it."""
    old, at = kv, (0, start, 0, 0)
    return (
        jax.lax.dynamic_update_slice(old[0], k.astype(old[0].dtype), at),
        jax.lax.dynamic_update_slice(old[1], v.astype(old[1].dtype), at),
    )


def causal_masks(
    tokens: Array,
    segment_ids: Array | None,
    cache: dict[str, Any] | None,
    windows: Sequence[int | None] = (None,),
) -> tuple[tuple[Array | None, ...], Array | None]:
    """Who sees whom: a token the earlier ones of its own segment, and itself.

    Args:
        tokens: (batch, time).
        segment_ids: (batch, time) int32, 0 for padding; None is one segment.
        cache: with ``length`` () and ``segment_ids`` (batch, length); the tokens come after it.
        windows: a mask is made for each: how many tokens back one is seen, itself counted; None
            is no limit. Padding counts, so that rows may be padded on either side.

    Returns:
        The masks (batch, 1, time, keys) bool, or None for plain causal; and the segments of the
        keys (batch, keys), None where there is neither a cache nor segments.
    """
    if segment_ids is None and cache is None and tuple(windows) == (None,):
        return (None,), None
    segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    start, slots = 0, segments
    if cache is not None:
        start = cache["length"]
        stored = cache["segment_ids"]
        slots = jax.lax.dynamic_update_slice(stored, segments.astype(stored.dtype), (0, start))
    back = (start + jnp.arange(tokens.shape[1]))[:, None] - jnp.arange(slots.shape[1])
    # Padding sees padding: no query row is ever fully masked, so no softmax can be 0/0.
    seen = (back >= 0) & (segments[:, :, None] == slots[:, None, :])
    masks = (seen if window is None else seen & (back < window) for window in windows)
    return tuple(mask[:, None] for mask in masks), slots
