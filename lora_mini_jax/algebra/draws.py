"""Random keys for kernels, and draws from them."""

import zlib

import jax
import jax.numpy as jnp


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """The random stream that belongs to one kernel."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def split_key(key: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """A key for each of the stacked matrices of a kernel; the key itself where there is one."""
    return jax.random.split(key, lead) if lead else key


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    """Float32 draws from ``U(-bound, bound)``."""
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
