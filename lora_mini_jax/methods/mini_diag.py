"""LoRA-Mini with a diagonal in the middle: our own, for the fewest trained parameters."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra import outer
from lora_mini_jax.algebra.low_rank import Product
from lora_mini_jax.method import Factors
from lora_mini_jax.settings.checks import require_choice, require_number


@dataclass(frozen=True)
class LoRAMiniDiag(Product):
    """LoRA-Mini-diag: ``W' = W + alpha A_aux @ diag(d) @ B_aux``, only ``d`` trained.

    Not from a paper. LoRA-Mini (arXiv 2411.15804) trains ``A @ B`` between its frozen outer
    factors; here a diagonal stands there, so ``rank`` parameters per kernel buy an update of that
    rank, up to ``min(in, out)``. With the singular vectors of the kernel's gradient around it (the
    default), the first step is along the gradient itself. ``d (rank)`` is 0 at the start. ``A_aux
    (in, rank)`` and ``B_aux (rank, out)`` come from data then, and are stored with the adapter: it
    is few parameters to train, not few bytes to keep.

    Args:
        rank: how many directions, at most ``min(in, out)``.
        alpha: the update is scaled by it (not by ``alpha / rank``, for a direction's own part does
            not depend on how many others there are).
        outer_init: how the frozen factors are made, see `outer.OuterInit`.
        dropout: share of the layer's input that the adapter does not see in training.

    Raises:
        UserError: a rank that is not a whole number from 1, an alpha that is not positive, or an
            unknown ``outer_init``.

    Example:
        >>> LoRAMiniDiag(rank=64).n_trainable(4096, 4096)
        64
    """

    name = "lora-mini-diag"

    rank: int = 64
    alpha: float = 16.0
    outer_init: outer.OuterInit = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("alpha", self.alpha)
        require_choice("outer_init", self.outer_init, outer.OuterInit)

    @property
    def needs_data(self) -> bool:
        return self.outer_init in outer.FROM_DATA

    @property
    def stored(self) -> frozenset[str]:
        return frozenset(("A_aux", "B_aux") if self.needs_data else ())

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        own = jax.random.split(key)
        a_aux, b_aux = outer.draw(self.outer_init, own, kernel, self.rank, self.rank)
        return {"d": jnp.zeros(self.rank, jnp.float32)}, {"A_aux": a_aux, "B_aux": b_aux}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["A_aux"], self.alpha * factors["d"], factors["B_aux"]

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank

    @property
    def gradient_rank(self) -> int:
        return self.rank if self.outer_init == "gradient" else 0

    def from_data(self, kernel: jax.Array, seen: Factors) -> Factors:
        return outer.from_data(self.outer_init, kernel, seen, self.rank, self.rank)
