"""LoRA-XS (Balazy et al., arXiv 2405.17604): one small trained matrix between frozen factors."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra.decompositions import top_singular
from lora_mini_jax.algebra.low_rank import LowRank
from lora_mini_jax.method import Factors


@dataclass(frozen=True)
class LoRAXS(LowRank):
    """LoRA-XS: ``W' = W + (alpha / rank) A @ R @ B``, only ``R (rank, rank)`` trained.

    ``A (in, rank) = U_r S_r`` and ``B (rank, out) = V_r`` are frozen and come from the kernel's
    singular value decomposition; ``R ~ N(0, 1e-5^2)``, so training starts next to the unchanged
    model. ``rank^2`` parameters per kernel, whatever its size; the frozen factors are not saved.

    Args:
        rank: the inner width, at most ``min(in, out)``.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: share of the layer's input that the adapter does not see in training.

    Raises:
        UserError: a rank that is not a whole number from 1, or an alpha that is not positive.

    Example:
        >>> LoRAXS(rank=4).n_trainable(64, 32)
        16
    """

    name = "lora-xs"

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        u, s, vt = top_singular(kernel, self.rank)
        r = 1e-5 * jax.random.normal(key, (self.rank, self.rank), jnp.float32)
        return {"R": r}, {"A": u * s, "B": vt}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["A"], self.scale * factors["R"], factors["B"]

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank**2
