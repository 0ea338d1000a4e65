"""Attention without its weights in memory, on NVIDIA GPUs: cuDNN's, through JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.hardware import capability, model_parallel
from lora_mini_jax.models.masks import Seen, pairs

Array = jax.Array
WIDEST = 128
"""The most entries a head may have."""


def by_cudnn(
    q: Array, k: Array, v: Array, seen: Seen | Array, scale: float, softcap: float | None = None
) -> Array | None:
    """Softmax attention as `attention.attend` has it; None where cuDNN has none.

    It has none for float32, for capped logits, for heads of odd sizes, for GPUs before Ampere and
    on meshes where a head would be split. Derivatives are those of reverse mode alone.

    Args:
        q, k, v: (batch, time, heads, width) and (batch, keys, kv_heads, width).
        seen: who sees whom; or a mask (batch or 1, 1, time or 1, keys) bool.
        scale: of the logits.
        softcap: of the logits, or None.
    """
    narrow = q.dtype in (jnp.bfloat16, jnp.float16) and q.dtype == k.dtype == v.dtype
    (time, width), keys = (q.shape[1], q.shape[3]), k.shape[1]
    even = time % 2 == keys % 2 == width % 8 == 0 and width <= WIDEST
    whole = k.shape[2] % model_parallel() == 0
    causal = isinstance(seen, Seen) and seen.start is None
    fits = narrow and even and whole and softcap is None and (time == keys or not causal)
    if not fits or capability() < 8:
        return None
    mask = None
    if not (isinstance(seen, Seen) and seen.all_before):
        mask = pairs(seen, 0, time, keys)
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], time, keys))
    how: dict[str, Any] = {"is_causal": causal, "scale": scale, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(q, k, v, mask=mask, **how)
