"""LoRA (Hu et al., arXiv 2106.09685): a trained product of two thin matrices beside each kernel."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lora_mini_jax.method import Factors, LowRank, uniform


@dataclass(frozen=True)
class LoRA(LowRank):
    """LoRA: ``W' = W + (alpha / rank) A @ B`` with ``A (in, rank)`` and ``B (rank, out)`` trained.

    ``A ~ U(-1/sqrt(in), 1/sqrt(in))`` as PEFT draws it and ``B = 0``, so training starts at the
    unchanged model. Trains ``rank (in + out)`` float32 parameters per kernel.

    Args:
        rank: the inner width, at most ``min(in, out)``.
        alpha: the update is scaled by ``alpha / rank``.

    Raises:
        UserError: a rank that is not a whole number from 1, or an alpha that is not positive.

    Example:
        >>> LoRA(rank=4).n_trainable(64, 32)
        384
    """

    name = "lora"

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        n_in, n_out = kernel.shape
        a = uniform(key, (n_in, self.rank), n_in**-0.5)
        return {"A": a, "B": jnp.zeros((self.rank, n_out), jnp.float32)}, {}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["A"], self.scale * factors["B"]

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * (n_in + n_out)
