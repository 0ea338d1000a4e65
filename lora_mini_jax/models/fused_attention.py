"""Attention without its weights in memory, on NVIDIA GPUs: cuDNN's, through JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.hardware import capability, ways

Array = jax.Array
WIDEST = 128
"""The most entries a head may have."""


def fused(
    q: Array, k: Array, v: Array, mask: Array | None, causal: bool, scale: float
) -> Array | None:
    """Softmax attention as `attention.attend` has it; None where cuDNN has none.

    It has none for float32, for heads of odd sizes, for GPUs before Ampere and on meshes where a
    head would be split. Derivatives are those of reverse mode alone.

    Args:
        q, k, v: (batch, time, heads, width) and (batch, keys, kv_heads, width).
        mask: (batch or 1, 1, time or 1, keys) bool, or None.
        causal: whether no query sees a later key, with a mask or without.
        scale: of the logits.
    """
    narrow = q.dtype in (jnp.bfloat16, jnp.float16) and q.dtype == k.dtype == v.dtype
    (time, width), keys = (q.shape[1], q.shape[3]), k.shape[1]
    even = time % 2 == keys % 2 == width % 8 == 0 and width <= WIDEST
    whole = k.shape[2] % ways() == 0
    if not (narrow and even and whole) or capability() < 8 or (causal and time != keys):
        return None
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], time, keys))
    how: dict[str, Any] = {"is_causal": causal, "scale": scale, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(q, k, v, mask=mask, **how)
