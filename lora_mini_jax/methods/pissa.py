"""PiSSA (Meng et al., arXiv 2404.02948): LoRA that starts at the kernel's principal part."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra.decompositions import qr, top_singular
from lora_mini_jax.algebra.low_rank import LowRank
from lora_mini_jax.algebra.products import matmul
from lora_mini_jax.method import Factors

Pair = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class FromKernel(LowRank):
    """LoRA whose factors start at a part of the kernel: ``W' = W + s (A @ B - A0 @ B0)``.

    The papers take ``s A0 @ B0`` out of ``W`` and train from there. Keeping ``W`` whole and the
    start as frozen factors ``A0 (in, rank)`` and ``B0 (rank, out)`` is the same function with the
    same gradients; it starts at the identity to the last bit, leaves the base as it is, and is what
    PEFT converts such an adapter to: plain LoRA of twice the rank.
    """

    redrawn_within = 1e-4  # the update is a small difference of large products

    def start(self, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``A0 (in, rank)`` and ``B0 (rank, out)``."""
        raise NotImplementedError

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        a, b = self.start(kernel)
        return {"A": a, "B": b}, {"A0": a, "B0": b}

    def chain(self, factors: Factors) -> Pair:
        return _joined(*self._pairs(factors))

    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        return _since(x, *self._pairs(factors))

    def _pairs(self, factors: Factors) -> tuple[Pair, Pair]:
        """What is trained and where it started, each ``(in, rank), (rank, out)``."""
        now, start = (factors["A"], factors["B"]), (factors["A0"], factors["B0"])
        return (now[0], self.scale * now[1]), (start[0], self.scale * start[1])

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * (n_in + n_out)


def _joined(now: Pair, start: Pair) -> Pair:
    """``[A - A0 | A0]`` and ``[B ; B - B0]``, whose product is the update. The differences are
    taken in float32: a narrow dtype would round ``A`` and ``A0`` by more than they differ."""
    return (
        jnp.concatenate([now[0] - start[0], start[0]], 1),
        jnp.concatenate([now[1], now[1] - start[1]], 0),
    )


@jax.custom_jvp
def _since(x: jax.Array, now: Pair, start: Pair) -> jax.Array:
    """``x`` times the update, in ``x``'s dtype; gradients are formed in the shapes of ``A`` and
    ``B``, not in those of the joined matrices, which autodiff would have devices exchange."""
    left, right = (each.astype(x.dtype) for each in _joined(now, start))
    return matmul(x, left) @ right


@_since.defjvp
def _since_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, now, start), (dx, *changes) = primals, tangents
    left, right = (each.astype(x.dtype) for each in _joined(now, start))
    dnow, dstart = jax.tree.map(lambda change: change.astype(x.dtype), changes)
    h, rank, seen = matmul(x, left), now[0].shape[1], matmul(x, dstart[0])
    moved, still = h[..., :rank], h[..., rank:]
    dh = jnp.concatenate([matmul(x, dnow[0]) - seen, seen], -1) + matmul(dx, left)
    return h @ right, dh @ right + (moved + still) @ dnow[1] - still @ dstart[1]


@dataclass(frozen=True)
class PiSSA(FromKernel):
    """PiSSA: LoRA started at the top of ``W``'s singular value decomposition ``U S V``.

    ``s A0 @ B0 = U_r S_r V_r`` with ``A0 = U_r sqrt(S_r / s)`` and ``B0 = sqrt(S_r / s) V_r``; what
    is left of ``W`` stays frozen, see `FromKernel`. Trains ``rank (in + out)`` parameters.

    Args:
        rank: how many singular triples are trained, at most ``min(in, out)``.
        alpha: the product is scaled by ``s = alpha / rank``.
        dropout: share of the layer's input that the adapter does not see in training.

    Raises:
        UserError: a rank that is not a whole number from 1, or an alpha that is not positive.

    Example:
        >>> PiSSA(rank=4).n_trainable(64, 32)
        384
    """

    name = "pissa"

    def start(self, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, s, vt = top_singular(kernel, self.rank)
        root = jnp.sqrt(s / self.scale)
        return u * root, root[:, None] * vt


@dataclass(frozen=True)
class OLoRA(FromKernel):
    """OLoRA (arXiv 2406.01775): LoRA started at the QR decomposition of ``W^T = Q R``.

    ``A0 = R_r^T`` and ``B0 = Q_r^T``, whose rows are orthonormal; ``s A0 @ B0`` is taken out of
    ``W``, see `FromKernel`. Trains ``rank (in + out)`` parameters. Arguments and errors as `PiSSA`.

    Example:
        >>> OLoRA(rank=4).n_trainable(64, 32)
        384
    """

    name = "olora"

    def start(self, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, r = qr(kernel.T.astype(jnp.float32))
        return r[: self.rank].T, q[:, : self.rank].T
