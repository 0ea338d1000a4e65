"""Random keys for kernels, and draws from them."""

import zlib
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.errors import UserError

GENERATOR = "threefry2x32"


def as_key(key: Any) -> jax.Array:
    """A typed random key from a seed, one of JAX's keys, or a key's data.

    Always of JAX's threefry generator, whatever the default is: its bits are the same on every
    backend, which drawing the frozen leaves again relies on.

    Raises:
        UserError: a key of another generator, or a seed of more than 64 bits.
    """
    if isinstance(key, Integral):
        if not -(2**63) <= key < 2**63:
            raise UserError(f"seed {key} is not allowed: give a whole number below 2**63")
        return jax.random.key(int(key), impl=GENERATOR)
    if not hasattr(key, "dtype"):
        raise UserError(f"a random key is a seed or one of JAX's keys, not {key!r}: give one")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape != (2,):
            raise UserError(f"a key of data {key.shape} is not of {GENERATOR}: give a seed")
        return jax.random.wrap_key_data(key, impl=GENERATOR)
    if str(jax.random.key_impl(key)) != GENERATOR:
        raise UserError(
            f"keys of {jax.random.key_impl(key)} differ between machines: give a seed, or "
            f"jax.random.key(seed, impl='{GENERATOR}')"
        )
    return key


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """The random stream that belongs to one kernel."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def split_key(key: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """A key for each of the stacked matrices of a kernel; the key itself where there is one."""
    return jax.random.split(key, lead) if lead else key


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    """Float32 draws from ``U(-bound, bound)``."""
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
