"""Methods whose update is a product of thin matrices: they give the matrices, the rest follows."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra.products import through
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.settings.checks import require_number, require_whole
from lora_mini_jax.tree import float32


@dataclass(frozen=True)
class Product(Method):
    """``W' = W + M_1 @ M_2 @ ... @ M_n`` with an inner width ``rank``.

    A subclass gives `init` and `chain`; the call, the merge, embedding rows and their inverses
    follow from the chain.
    """

    least_rank: ClassVar[int] = 1
    """The smallest rank that makes sense."""

    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("rank", self.rank, low=self.least_rank)

    @abstractmethod
    def chain(self, factors: Factors) -> Sequence[jax.Array]:
        """The matrices of the update from ``(in, ...)`` to ``(..., out)``, scales within. A vector
        after one of them stands for a diagonal: its gradient then needs no matrix's."""

    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        return through(x, [each.astype(x.dtype) for each in self.chain(factors)])

    def joint(self, factors: Factors, n_in: int, n_out: int) -> Sequence[jax.Array] | None:
        return self.chain(factors) if type(self).delta is Product.delta else None

    def rows(self, ids: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        first, *rest = self.chain(factors)
        return through(first[ids], rest)

    def merge(self, kernel: jax.Array, factors: Factors) -> jax.Array:
        return float32(kernel) + self.update(factors)

    def unmerge(self, merged: jax.Array, factors: Factors) -> jax.Array:
        return float32(merged) - self.update(factors)

    def sized(self, size: int, n_in: int, n_out: int) -> Method:
        return replace(self, rank=max(min(size, n_in, n_out), self.least_rank))

    def problems(self, n_in: int, n_out: int) -> list[str]:
        if self.rank > min(n_in, n_out):
            return [f"rank {self.rank} exceeds min(in, out) = {min(n_in, n_out)}"]
        return []

    def thin(self, factors: Factors, n_in: int, n_out: int) -> tuple[jax.Array, jax.Array] | None:
        kind = type(self)
        if kind.update is not Product.update or kind.merge is not Product.merge:
            return None  # there is more to it than the chain: a dense part, a gain
        chain = self._matrices(factors)
        widths = [matrix.shape[1] for matrix in chain[:-1]]
        cut = 1 + widths.index(min(widths))
        with jax.default_matmul_precision("highest"):
            return reduce(jnp.matmul, chain[:cut]), reduce(jnp.matmul, chain[cut:])

    def update(self, factors: Factors) -> jax.Array:
        """The product of the chain ``(in, out)``, in float32."""
        with jax.default_matmul_precision("highest"):
            return jnp.linalg.multi_dot(self._matrices(factors))

    def _matrices(self, factors: Factors) -> list[jax.Array]:
        """The chain in float32, every diagonal in the matrix before it."""
        found: list[jax.Array] = []
        for each in map(float32, self.chain(factors)):
            if each.ndim == 1:
                found[-1] = found[-1] * each
            else:
                found.append(each)
        return found


@dataclass(frozen=True)
class LowRank(Product):
    """A `Product` that is scaled by ``alpha / rank``."""

    alpha: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("alpha", self.alpha)

    @property
    def scale(self) -> float:
        """What multiplies the product of the factors."""
        return self.alpha / self.rank
