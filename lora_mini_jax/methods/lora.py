"""LoRA (Hu et al., arXiv 2106.09685): a trained product of two thin matrices beside each kernel."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra.draws import uniform
from lora_mini_jax.algebra.low_rank import LowRank
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors


@dataclass(frozen=True)
class LoRA(LowRank):
    """LoRA: ``W' = W + (alpha / rank) A @ B`` with ``A (in, rank)`` and ``B (rank, out)`` trained.

    ``A ~ U(-1/sqrt(in), 1/sqrt(in))`` as PEFT draws it and ``B = 0``, so training starts at the
    unchanged model. Trains ``rank (in + out)`` float32 parameters per kernel.

    Args:
        rank: the inner width, at most ``min(in, out)``.
        alpha: the update is scaled by ``alpha / rank``.
        rslora: scale by ``alpha / sqrt(rank)`` instead (rsLoRA, arXiv 2312.03732), so that large
            ranks keep learning.
        dropout: share of the layer's input that the adapter does not see in training.

    Raises:
        UserError: a rank that is not a whole number from 1, or an alpha that is not positive.

    Example:
        >>> LoRA(rank=4).n_trainable(64, 32)
        384
    """

    name = "lora"
    any_rank = True

    rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rslora, bool):
            raise UserError(f"rslora is {self.rslora!r}: give true or false")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        n_in, n_out = kernel.shape
        a = uniform(key, (n_in, self.rank), n_in**-0.5)
        return {"A": a, "B": jnp.zeros((self.rank, n_out), jnp.float32)}, {}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["A"], self.scale * factors["B"]

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * (n_in + n_out)


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA-FA (arXiv 2308.03303): LoRA with ``A`` frozen as drawn, only ``B`` trained.

    ``rank out`` parameters per kernel, and the backward pass keeps ``x @ A`` in place of ``x``.
    Arguments and errors as `LoRA`.

    Example:
        >>> LoRAFA(rank=4).n_trainable(64, 32)
        128
    """

    name = "lora-fa"

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        factors, _ = super().init(key, kernel)
        return {"B": factors["B"]}, {"A": factors["A"]}

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * n_out
