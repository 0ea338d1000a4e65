"""LoRA-Mini (arXiv 2411.15804): LoRA's two matrices split into four, the inner two trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra import outer as outer_factors
from lora_mini_jax.algebra.draws import uniform
from lora_mini_jax.algebra.low_rank import LowRank
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.settings.checks import require_choice, require_whole

WIDTH = 8
"""Of ``a`` and ``b`` for each rank where a budget decides: of one count, the best of 2, 8, 32 and
128 (experiments/results/sweep_wide.json)."""


@dataclass(frozen=True)
class LoRAMini(LowRank):
    """LoRA-Mini: ``W' = W + (alpha / rank) A_aux @ A @ B @ B_aux``, only ``A`` and ``B`` trained.

    ``A_aux (in, a)`` and ``B_aux (b, out)`` are frozen; ``A (a, rank)`` and ``B (rank, b)`` are
    trained: ``rank (a + b)`` float32 parameters per kernel, whatever the kernel's size.
    ``A ~ U(-1/sqrt(a), 1/sqrt(a))`` and ``B = 0``, so training starts at the unchanged model.
    Frozen factors follow from the key (for ``svd`` the kernel too); only those from data are saved.

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
            layer's inputs and of its outputs. ``lora-mini finetune`` takes ``"gradient"``, the
            best of them, unless told otherwise.
        outer: how the frozen factors are kept. ``"float32"``; ``"bfloat16"``: rounded once, when
            they are drawn, and the update is that of the rounded ones everywhere;
            ``"recompute"``: not at all, but drawn again in every call and once more in its
            backward pass, from 16 bytes. ``"orthogonal"`` ones then take a QR decomposition each
            time, which is slow; only drawn ones can be, neither ``"svd"`` nor those from data.

    Raises:
        UserError: a size that is not a whole number from 1, a rank above ``a`` or ``b``, an
            unknown ``outer_init`` or ``outer``, or the two not going together.

    Example:
        >>> LoRAMini(rank=4, a=32, b=32).n_trainable(4096, 4096)
        256
    """

    name = "lora-mini"

    a: int = 32
    b: int = 32
    outer_init: outer_factors.OuterInit = "orthogonal"
    outer: outer_factors.Kept = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("a", self.a)
        require_whole("b", self.b)
        if self.rank > min(self.a, self.b):
            raise UserError(
                f"rank {self.rank} exceeds min(a, b) = {min(self.a, self.b)}: "
                "lower rank, or raise a and b"
            )
        require_choice("outer_init", self.outer_init, outer_factors.OuterInit)
        require_choice("outer", self.outer, outer_factors.Kept)
        if self.outer == "recompute" and self.outer_init not in outer_factors.DRAWN:
            raise UserError(
                f"outer_init {self.outer_init} cannot be drawn again in every call: with outer "
                f"recompute choose one of {', '.join(outer_factors.DRAWN)}"
            )

    @property
    def needs_data(self) -> bool:
        return self.outer_init in outer_factors.FROM_DATA

    @property
    def stored(self) -> frozenset[str]:
        return frozenset(("A_aux", "B_aux") if self.needs_data else ())

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        keys = jax.random.split(key, 3)
        a = uniform(keys[2], (self.a, self.rank), self.a**-0.5)
        b = jnp.zeros((self.rank, self.b), jnp.float32)
        if self.outer == "recompute":
            return {"A": a, "B": b}, outer_factors.seed(keys[:2], kernel)
        a_aux, b_aux = outer_factors.draw(self.outer_init, keys[:2], kernel, self.a, self.b)
        return {"A": a, "B": b}, self._rounded({"A_aux": a_aux, "B_aux": b_aux})

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        if self.outer == "recompute":
            a_aux, b_aux = outer_factors.again(self.outer_init, factors, self.a, self.b)
        else:
            a_aux, b_aux = factors["A_aux"], factors["B_aux"]
        return a_aux, factors["A"], self.scale * factors["B"], b_aux

    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        delta = super().delta
        if self.outer not in ("float32", x.dtype.name):  # or what is drawn or widened were kept
            delta = jax.checkpoint(delta, policy=jax.checkpoint_policies.dots_saveable)
        return delta(x, kernel, factors)

    def joint(self, factors: Factors, n_in: int, n_out: int) -> Sequence[jax.Array] | None:
        return None if self.outer == "recompute" else self.chain(factors)

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * (self.a + self.b)

    def sized(self, size: int, n_in: int, n_out: int) -> Method:
        a, b = (min(size, self._widest(n_in, n_out, side)) for side in (n_in, n_out))
        return replace(self, rank=min(max(1, size // WIDTH), a, b), a=a, b=b)

    def problems(self, n_in: int, n_out: int) -> list[str]:
        found = super().problems(n_in, n_out)
        for name, side in (("a", n_in), ("b", n_out)):
            if (width := getattr(self, name)) > (most := self._widest(n_in, n_out, side)):
                wide = f", all that outer_init {self.outer_init} has" if width <= side else ""
                found.append(f"{name} = {width} exceeds {most}{wide}")
        return found

    @classmethod
    def with_data(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        again = settings.get("outer") == "recompute"  # which only drawn factors can be
        return {} if again else {"outer_init": "gradient"}

    @property
    def gradient_rank(self) -> int:
        return max(self.a, self.b) if self.outer_init == "gradient" else 0

    def from_data(self, kernel: jax.Array, seen: Factors) -> Factors:
        made = outer_factors.from_data(self.outer_init, kernel, seen, self.a, self.b)
        return self._rounded(made)

    def _rounded(self, factors: Factors) -> Factors:
        """The frozen factors as they are kept."""
        return {name: leaf.astype(self.outer) for name, leaf in factors.items()}

    def _widest(self, n_in: int, n_out: int, side: int) -> int:
        return outer_factors.widest(self.outer_init, n_in, n_out, side)
