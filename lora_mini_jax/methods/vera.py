"""VeRA (Kopiczko et al., arXiv 2310.11454): two trained vectors between shared random factors."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra.draws import uniform
from lora_mini_jax.algebra.low_rank import Product
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.settings.checks import require_number


@dataclass(frozen=True)
class VeRA(Product):
    """VeRA: ``W' = W + A @ diag(d) @ B @ diag(b)``, only ``d (rank,)`` and ``b (out,)`` trained.

    ``A (in, rank)`` and ``B (rank, out)`` are frozen, random and shared: every kernel takes the
    first rows and columns of the same two, drawn row by row so that no kernel's share depends on
    how large the others are. As PEFT draws them, uniform with variance ``2 / in`` and ``2 / rank``
    (PEFT: 2 over the largest ``in``). ``b = 0``, so training starts at the unchanged model;
    ``rank + out`` parameters per kernel. Shared values, not shared memory: each kernel keeps its
    part, which is drawn again rather than saved.

    Args:
        rank: the inner width; may exceed the kernel's sides, 256 and more are usual.
        d_initial: where ``d`` starts.
        dropout: share of the layer's input that the adapter does not see in training.

    Raises:
        UserError: a rank that is not a whole number from 1, or a ``d_initial`` that is not above 0.

    Example:
        >>> VeRA(rank=16).n_trainable(64, 32)
        48
    """

    name = "vera"
    shares_draw = True

    rank: int = 256
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("d_initial", self.d_initial)

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        n_in, n_out = kernel.shape
        left, right = jax.random.split(key)
        a = _rows(left, n_in, self.rank, (6 / n_in) ** 0.5)
        b = _rows(right, n_out, self.rank, (6 / self.rank) ** 0.5).T
        d = jnp.full((self.rank,), self.d_initial, jnp.float32)
        return {"d": d, "b": jnp.zeros((n_out,), jnp.float32)}, {"A": a, "B": b}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["A"], factors["d"], factors["B"], factors["b"]

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank + n_out

    def sized(self, size: int, n_in: int, n_out: int) -> Method:
        return replace(self, rank=size)  # of all kernels the same, for they share their matrices

    def problems(self, n_in: int, n_out: int) -> list[str]:
        return []


def _rows(key: jax.Array, n: int, rank: int, bound: float) -> jax.Array:
    """``(n, rank)``; row ``i`` depends on ``i`` and the key alone, but for the bound."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
    return jax.vmap(lambda k: uniform(k, (rank,), bound))(keys)
