"""Normalisation without a mean: T5's, Llama's and Gemma's."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """``x / rms(x) * (offset + scale)`` over the last axis, in float32, returned in ``dtype``.

    Attributes:
        eps: added to the mean square.
        dtype, param_dtype: of the result, and of ``scale``.
        offset: 1 where the file holds what is added to 1, as Gemma's do; ``scale`` then starts
            at 0 in place of 1.

    Example:
        >>> norm, x = RMSNorm(1e-6, jnp.float32, jnp.float32), jnp.array([[3.0, 4.0]])
        >>> y = norm.apply(norm.init(jax.random.key(0), x), x)
        >>> float(jnp.mean(y**2).round(2))
        1.0
    """

    eps: float
    dtype: Any
    param_dtype: Any
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.constant(1 - self.offset)
        scale = self.param("scale", start, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * (self.offset + scale.astype(jnp.float32))).astype(self.dtype)
