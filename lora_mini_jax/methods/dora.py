"""DoRA (Liu et al., arXiv 2402.09353): a kernel's columns as magnitude and direction."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra.draws import uniform
from lora_mini_jax.algebra.low_rank import LowRank
from lora_mini_jax.method import Factors
from lora_mini_jax.tree import float32


@dataclass(frozen=True)
class DoRA(LowRank):
    """DoRA: ``W' = magnitude * V / ||V||`` with ``V = W + (alpha / rank) A @ B``, column by column.

    ``A (in, rank)``, ``B (rank, out)`` and ``magnitude (out,)`` are trained:
    ``rank (in + out) + out`` float32 parameters per kernel. ``A`` and ``B`` start as LoRA's, the
    magnitude at the columns' norms of ``W``, so training starts at the unchanged model. As in the
    paper (section 4.3) the norm counts as a constant in the backward pass.

    The update is made of ``x @ W``. A layer of Flax's own has that at hand, from its output and its
    bias; any other layer, and one with dropout, multiplies once more: XLA shares the forward
    product with the layer's own, the backward one remains.

    Unmerging is exact as long as no column of ``V`` points away from that of ``W`` (``v . w > 0``)
    and no magnitude is 0; a merged column alone does not tell its ``||V||``.

    Args:
        rank: the inner width, at most ``min(in, out)``.
        alpha: the update of the direction is scaled by ``alpha / rank``.
        dropout: share of the layer's input that the adapter does not see in training.

    Raises:
        UserError: a rank that is not a whole number from 1, or an alpha that is not positive.

    Example:
        >>> DoRA(rank=4).n_trainable(64, 32)
        416
    """

    name = "dora"
    any_rank = True
    reads_kernel = True

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        n_in, n_out = kernel.shape
        norm = jnp.linalg.norm(float32(kernel), axis=0)
        factors = {
            "A": uniform(key, (n_in, self.rank), n_in**-0.5),
            "B": jnp.zeros((self.rank, n_out), jnp.float32),
            "magnitude": norm,
        }
        return factors, {"norm": norm}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["A"], self.scale * factors["B"]

    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        return self.delta_beside(lambda: x @ kernel.astype(x.dtype), x, kernel, factors)

    def delta_beside(
        self,
        product: Callable[[], jax.Array],
        x: jax.Array,
        kernel: jax.Array,
        factors: Factors,
    ) -> jax.Array:
        # In float32, for a narrow sum would lose a small update; and multiplied by the gain once,
        # so that devices exchange its gradient once.
        base = float32(product())
        moved = base + float32(super().delta(x, kernel, factors))
        return (moved * self._gain(kernel, factors) - base).astype(x.dtype)

    def rows(self, ids: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        gain = self._gain(kernel, factors)
        return float32(kernel[ids]) * (gain - 1) + super().rows(ids, kernel, factors) * gain

    def merge(self, kernel: jax.Array, factors: Factors) -> jax.Array:
        return super().merge(kernel, factors) * self._gain(kernel, factors)

    def unmerge(self, merged: jax.Array, factors: Factors) -> jax.Array:
        # Along the merged column's direction d lies v = n d; ||n d - u|| = ||w|| gives n.
        d = float32(merged) / factors["magnitude"]
        u = self.update(factors)
        along = (d * u).sum(0)
        n = along + jnp.sqrt(along**2 - (u**2).sum(0) + factors["norm"] ** 2)
        return n * d - u

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * (n_in + n_out) + n_out

    def _gain(self, kernel: jax.Array, factors: Factors) -> jax.Array:
        """``magnitude / ||V||`` for every output, the norm a constant. float32 ``(out,)``."""
        direction = jax.lax.stop_gradient(float32(kernel) + self.update(factors))
        norm = jnp.linalg.norm(direction, axis=0)
        return factors["magnitude"] / jnp.where(norm == 0, 1.0, norm)  # a column of zeros stays
