"""What an adapter method is: a frozen dataclass of pure functions over one kernel matrix.

The object is the configuration and the algorithm; it holds no arrays. Every function sees a single
matrix ``(in, out)`` in Flax layout (``y = x @ kernel``). Stacked layers, attention heads, einsum
axes and transposed kernels are dealt with once, in `adapter.py` and `linen.py`, so a method is a
page of formulas.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lora_mini_jax.errors import UserError
from lora_mini_jax.tree import float32

Factors = dict[str, jax.Array]
"""A kernel's adapter leaves by name, trainable and frozen ones together."""


@dataclass(frozen=True)
class Method(ABC):
    """An adapter method. Subclass it, and give it one line in ``methods/__init__.py``.

    The laws it must obey are in ``tests/test_laws.py``: ``delta(x) == x @ (merge(W) - W)``, merging
    and unmerging return the kernel, every trainable leaf gets a gradient, no frozen leaf does.
    """

    name: ClassVar[str]
    """What the command line and saved files call it."""

    regenerates: ClassVar[bool] = True
    """Whether ``init`` with the same key and kernel gives the frozen leaves again (then they need
    not be saved). False for a method whose frozen leaves change while training."""

    @abstractmethod
    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        """``(trainable, frozen)`` float32 leaves for one kernel ``(in, out)``."""

    @abstractmethod
    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        """What is added to ``x @ kernel``: linear in ``x`` ``(..., in)``, gives ``(..., out)``."""

    @abstractmethod
    def merge(self, kernel: jax.Array, factors: Factors) -> jax.Array:
        """The adapted kernel as one dense matrix; everything in float32."""

    @abstractmethod
    def unmerge(self, merged: jax.Array, factors: Factors) -> jax.Array:
        """The kernel that was merged: the inverse of `merge` in its first argument."""

    @abstractmethod
    def n_trainable(self, n_in: int, n_out: int) -> int:
        """How many parameters are trained for a kernel of this size."""

    @abstractmethod
    def problems(self, n_in: int, n_out: int) -> list[str]:
        """Why this method cannot adapt a kernel of this size; empty when it can."""

    def rows(self, ids: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        """What is added to ``kernel[ids]``, for an embedding table. Override it where the factors
        can be indexed: this default multiplies a one-hot matrix."""
        one_hot = jax.nn.one_hot(ids, kernel.shape[0], dtype=jnp.float32)
        return self.delta(one_hot, kernel, factors)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the fields, with the method's name under ``"method"``."""
        return {"method": self.name, **asdict(self)}

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """The same method with other hyper-parameters, by name.

        Raises:
            UserError: a setting that the method does not have, or a value it does not allow.
        """
        unknown = sorted(set(settings) - set(self.field_names()))
        if unknown:
            raise UserError(
                f"{self.name} has no option {', '.join(unknown)}: choose from "
                f"{', '.join(self.field_names())}"
            )
        # JSON writes 16.0 as 16; the two must be one method, and one compiled program.
        values = {
            name: float(value)
            if type(value) is int and type(getattr(self, name)) is float
            else value
            for name, value in settings.items()
        }
        return replace(self, **values)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The hyper-parameters this method has."""
        return tuple(f.name for f in fields(cls))


@dataclass(frozen=True)
class LowRank(Method):
    """A method whose update is a product of thin matrices: ``W' = W + M_1 @ M_2 @ ... @ M_n``.

    A subclass gives `init` and `chain`; the call, the merge, embedding rows and their inverses
    follow from the chain.
    """

    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        require_whole("rank", self.rank)
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not (number and 0 < self.alpha < math.inf):
            raise UserError(f"alpha is {self.alpha!r}: give a finite number above 0")

    @property
    def scale(self) -> float:
        """What multiplies the product of the factors: ``alpha / rank``."""
        return self.alpha / self.rank

    @abstractmethod
    def chain(self, factors: Factors) -> Sequence[jax.Array]:
        """The matrices of the update from ``(in, ...)`` to ``(..., out)``, the scale within."""

    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        for matrix in self.chain(factors):
            x = x @ matrix.astype(x.dtype)
        return x

    def rows(self, ids: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        first, *rest = self.chain(factors)
        out = first[ids]
        for matrix in rest:
            out = out @ matrix
        return out

    def merge(self, kernel: jax.Array, factors: Factors) -> jax.Array:
        return float32(kernel) + self._update(factors)

    def unmerge(self, merged: jax.Array, factors: Factors) -> jax.Array:
        return float32(merged) - self._update(factors)

    def problems(self, n_in: int, n_out: int) -> list[str]:
        if self.rank > min(n_in, n_out):
            return [f"rank {self.rank} exceeds min(in, out) = {min(n_in, n_out)}"]
        return []

    def _update(self, factors: Factors) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jnp.linalg.multi_dot([float32(m) for m in self.chain(factors)])


def require_whole(name: str, value: Any) -> None:
    """Raise `UserError` unless ``value`` is a whole number from 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}: give a whole number from 1")


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    """Float32 draws from ``U(-bound, bound)``."""
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
