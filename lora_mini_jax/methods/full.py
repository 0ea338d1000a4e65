"""Training parameters whole: all of them, or biases, norms or an output head alone."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.tree import float32


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: ``W' = W + dense``, the whole of ``dense`` trained, zero at the start.

    Trains any array: kernels, tables, biases, norms. On the targets ``"bias-only"`` it is BitFit
    (arXiv 2106.10199), on ``"head-only"`` a linear probe; beside another method it trains what
    ``modules_to_save`` names. Keeping the difference, rather than a changed copy,
    leaves the base untouched, starts at the identity and merges and unmerges like everything else.
    The kernel's layer uses the sum, so there is no product beside it.

    Raises:
        UserError: a dropout, which would need an adapter path to act on.

    Example:
        >>> Full().n_trainable(64, 32)
        2048
    """

    name = "full"
    default_targets = "all"
    adapts_any_array = True
    takes_dropout = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise UserError(f"{self.name} trains the parameters themselves: leave dropout at 0")

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        return {"dense": jnp.zeros(kernel.shape, jnp.float32)}, {}

    def shift(self, factors: Factors) -> jax.Array:
        return factors["dense"]

    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        return jnp.zeros((*x.shape[:-1], kernel.shape[-1]), x.dtype)

    def rows(self, ids: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        return jnp.zeros((*ids.shape, kernel.shape[-1]), jnp.float32)

    def merge(self, kernel: jax.Array, factors: Factors) -> jax.Array:
        return float32(kernel) + factors["dense"]

    def unmerge(self, merged: jax.Array, factors: Factors) -> jax.Array:
        return float32(merged) - factors["dense"]

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return n_in * n_out

    def problems(self, n_in: int, n_out: int) -> list[str]:
        return []
