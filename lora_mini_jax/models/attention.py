"""Attention of decoders: grouped heads, capped logits, long rows, and the key-value cache."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra.products import matmul
from lora_mini_jax.models.cudnn_attention import by_cudnn
from lora_mini_jax.models.masks import Seen, pairs
from lora_mini_jax.models.splash_attention import by_splash

Array = jax.Array
AT_ONCE = 1024
"""Queries of a row whose weights are in memory at a time, where it has more than twice as many."""


def attend(
    q: Array,
    k: Array,
    v: Array,
    seen: Seen | Array | None = None,
    *,
    scale: float | None = None,
    bias: Array | None = None,
    softcap: float | None = None,
) -> Array:
    """Softmax attention; with fewer key than query heads each serves a group of neighbours.

    The weights of long rows, heads x time x keys, would take more memory than all else: they are
    made for `AT_ONCE` queries at a time, and made again for the backward pass. Where a device has a
    kernel for it they are never in memory: see `cudnn_attention` and `splash_attention`.

    Args:
        q: (batch, time, heads, head_dim).
        k, v: (batch, keys, kv_heads, head_dim).
        seen: who sees whom, or a mask (batch or 1, 1, time or 1, keys) bool, True where a query
            sees a key; None: every query sees the keys up to its own.
        scale: of the logits; None is ``head_dim ** -0.5``.
        bias: (batch or 1, heads, time, keys), added to the logits; None is none.
        softcap: logits become ``softcap * tanh(logits / softcap)``, as Gemma 2's; None is no cap.

    Returns:
        (batch, time, heads, head_dim) of ``q``'s dtype; the softmax is float32.

    Example:
        >>> x = jnp.ones((1, 3, 4, 8))
        >>> attend(x, x[:, :, :2], x[:, :, :2], softcap=30.0).shape
        (1, 3, 4, 8)
    """
    time, keys = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seen = Seen() if seen is None else seen
    if bias is None:
        for kernel in (by_cudnn, by_splash):
            out = kernel(q, k, v, seen, scale, softcap)
            if out is not None:
                return out
    if time <= 2 * AT_ONCE:
        return _attend(q, k, v, pairs(seen, 0, time, keys), bias, scale, softcap)

    def turn(_: None, start: Array) -> tuple[None, Array]:
        queries = jax.lax.dynamic_slice_in_dim(q, start, AT_ONCE, 1)
        mask = pairs(seen, start, AT_ONCE, keys)
        near = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, start, AT_ONCE, 2)
        return None, _attend(queries, k, v, mask, near, scale, softcap)

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


def read_cache(cache: dict[str, Any] | None) -> tuple[tuple[Array, Array] | None, Array | int]:
    """What layers have in a cache, and where the next token goes; without a cache None and 0."""
    return (None, 0) if cache is None else ((cache["k"], cache["v"]), cache["length"])


def next_cache(
    cache: dict[str, Any] | None, kv: tuple[Array, Array], slots: Array | None, time: int
) -> Any:
    """The cache after ``time`` more tokens: what layers have in it now, and who is where; None
    stays None."""
    if cache is None:
        return None
    return {"k": kv[0], "v": kv[1], "segment_ids": slots, "length": cache["length"] + time}


def update_cache(
    kv: tuple[Array, Array], k: Array, v: Array, start: Array | int
) -> tuple[Array, Array]:
    """A layer's cache, ``k`` and ``v`` (batch, length, kv_heads, head_dim), with new ones in it."""
    old, at = kv, (0, start, 0, 0)
    return (
        jax.lax.dynamic_update_slice(old[0], k.astype(old[0].dtype), at),
        jax.lax.dynamic_update_slice(old[1], v.astype(old[1].dtype), at),
    )
