"""LoRA-Mini (arXiv 2411.15804): LoRA's two matrices split into four, the inner two trained."""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp

from lora_mini_jax.checks import require_choice, require_whole
from lora_mini_jax.errors import UserError
from lora_mini_jax.low_rank import LowRank, orthonormal, top_singular
from lora_mini_jax.method import Factors, Method, uniform

OuterInit = Literal["normal", "fan_in", "orthogonal", "svd", "gradient", "activation"]
FROM_DATA = ("gradient", "activation")


@dataclass(frozen=True)
class LoRAMini(LowRank):
    """LoRA-Mini: ``W' = W + (alpha / rank) A_aux @ A @ B @ B_aux``, only ``A`` and ``B`` trained.

    ``A_aux (in, a)`` and ``B_aux (b, out)`` are frozen; ``A (a, rank)`` and ``B (rank, b)`` are
    trained: ``rank (a + b)`` float32 parameters per kernel, whatever the kernel's size.
    ``A ~ U(-1/sqrt(a), 1/sqrt(a))`` and ``B = 0``, so training starts at the unchanged model.
    The frozen factors are a function of the key (and the kernel, for ``svd``): they are not saved.

    Args:
        rank: the inner width, at most ``min(a, b)``.
        alpha: the update is scaled by ``alpha / rank``.
        a: the width between the frozen and the trained factor on the input side, at most ``in``.
        b: the same on the output side, at most ``out``.
        dropout: share of the layer's input that the adapter does not see in training.
        outer_init: how the frozen factors are drawn. ``"normal"``: N(0, 1), the authors' code.
            ``"fan_in"``: N(0, 1/in) and N(0, 1/b). ``"orthogonal"``: orthonormal columns and rows.
            ``"svd"``: the kernel's top singular vectors. And two of our own, made by `calibrate`
            from some batches and stored with the adapter: ``"gradient"``, the top singular vectors
            of the kernel's gradient, and ``"activation"``, the top principal directions of the
            layer's inputs and of its outputs.

    Raises:
        UserError: a size that is not a whole number from 1, a rank above ``a`` or ``b``, or an
            unknown ``outer_init``.

    Example:
        >>> LoRAMini(rank=4, a=32, b=32).n_trainable(4096, 4096)
        256
    """

    name = "lora-mini"

    a: int = 32
    b: int = 32
    outer_init: OuterInit = "orthogonal"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("a", self.a)
        require_whole("b", self.b)
        if self.rank > min(self.a, self.b):
            raise UserError(
                f"rank {self.rank} exceeds min(a, b) = {min(self.a, self.b)}: "
                "lower rank, or raise a and b"
            )
        require_choice("outer_init", self.outer_init, OuterInit)

    @property
    def needs_data(self) -> bool:
        return self.outer_init in FROM_DATA

    @property
    def stored(self) -> frozenset[str]:
        return frozenset(("A_aux", "B_aux") if self.needs_data else ())

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        left, right, inner = jax.random.split(key, 3)
        a_aux, b_aux = self._outer(left, right, kernel)
        a = uniform(inner, (self.a, self.rank), self.a**-0.5)
        b = jnp.zeros((self.rank, self.b), jnp.float32)
        return {"A": a, "B": b}, {"A_aux": a_aux, "B_aux": b_aux}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["A_aux"], factors["A"], self.scale * factors["B"], factors["B_aux"]

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * (self.a + self.b)

    def sized(self, size: int, n_in: int, n_out: int) -> Method:
        a, b = (min(size, self._limit(n_in, n_out, side)) for side in (n_in, n_out))
        return replace(self, rank=min(self.rank, a, b), a=a, b=b)

    def problems(self, n_in: int, n_out: int) -> list[str]:
        found = super().problems(n_in, n_out)
        if self.a > (limit := self._limit(n_in, n_out, n_in)):
            found.append(f"a = {self.a} exceeds {limit}")
        if self.b > (limit := self._limit(n_in, n_out, n_out)):
            found.append(f"b = {self.b} exceeds {limit}")
        return found

    def _limit(self, n_in: int, n_out: int, side: int) -> int:
        return min(n_in, n_out) if self.outer_init in ("svd", "gradient") else side

    def from_data(self, kernel: jax.Array, gradient: jax.Array, moment: jax.Array) -> Factors:
        if self.outer_init == "gradient":
            left, _, right = top_singular(gradient, max(self.a, self.b))
        else:
            left, _, _ = top_singular(moment, self.a)
            _, _, right = top_singular(kernel.T @ moment @ kernel, self.b)
        return {"A_aux": left[:, : self.a], "B_aux": right[: self.b]}

    def _outer(
        self, left: jax.Array, right: jax.Array, kernel: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """``A_aux (in, a)`` and ``B_aux (b, out)`` in float32."""
        n_in, n_out = kernel.shape
        if self.needs_data:
            return jnp.zeros((n_in, self.a)), jnp.zeros((self.b, n_out))
        if self.outer_init == "svd":
            u, _, vt = top_singular(kernel, max(self.a, self.b))
            return u[:, : self.a], vt[: self.b]
        a_aux = jax.random.normal(left, (n_in, self.a), jnp.float32)
        b_aux = jax.random.normal(right, (self.b, n_out), jnp.float32)
        if self.outer_init == "orthogonal":
            return orthonormal(a_aux), orthonormal(b_aux.T).T
        if self.outer_init == "fan_in":
            return a_aux * n_in**-0.5, b_aux * self.b**-0.5
        return a_aux, b_aux
