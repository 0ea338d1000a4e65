"""MiSS (arXiv 2409.15371, "FOSSIL" in its ninth version, once Bone and DiSHA): shared shards.

The rows of a kernel are cut into shards of ``rank`` rows, and all shards get the same update.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra.decompositions import inverse
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.settings.checks import require_choice, require_whole
from lora_mini_jax.tree import float32

Mode = Literal["miss", "mini", "bat"]


@dataclass(frozen=True)
class MiSS(Method):
    """MiSS: ``W'[i] = W[i] + D[i mod rank]``, one trained ``D (rank, out)``, zero at the start.

    The call never forms the update: ``x @ W + blocksum(x) @ D``, where ``blocksum`` adds up the
    inputs that share a row of ``D``, in float32; the last shard may be shorter. No alpha.
    The defaults are PEFT's; the authors' code trains rank 64 on all linear kernels.

    Args:
        rank: rows of a shard, at most ``in``.
        mode: ``"miss"`` as above, ``rank out`` parameters. ``"mini"``: ``D (rank, mini_rank)``
            is repeated along the outputs as well, ``rank mini_rank`` parameters. ``"bat"``: a block
            ``D_o (rank, rank)`` for every ``rank`` outputs, ``rank out`` parameters, which acts
            on the kernel itself: ``W'[i, o] = W[i, o] + D_o^T (W[i, o] + I)`` for the block of
            shard ``i`` and outputs ``o``. Its update is dense and depends on ``W``, so a call
            costs a second full product.
        mini_rank: width of ``D`` in mode mini; must divide ``out``.
        dropout: share of the layer's input that the adapter does not see in training.

    Raises:
        UserError: a rank or mini_rank that is not a whole number from 1, or an unknown mode.

    Example:
        >>> MiSS(rank=4).n_trainable(64, 32), MiSS(rank=4, mode="mini").n_trainable(64, 32)
        (128, 4)
    """

    name = "miss"

    rank: int = 64
    mode: Mode = "miss"
    mini_rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("rank", self.rank)
        require_whole("mini_rank", self.mini_rank)
        require_choice("mode", self.mode, Mode)

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        n_out, r = kernel.shape[1], self.rank
        shapes = {"miss": (r, n_out), "mini": (r, self.mini_rank), "bat": (n_out // r, r, r)}
        return {"D": jnp.zeros(shapes[self.mode], jnp.float32)}, {}

    @property
    def reads_kernel(self) -> bool:
        return self.mode == "bat"

    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        d = factors["D"].astype(x.dtype)
        if self.mode == "bat":
            return x @ _bat(kernel.astype(x.dtype), d)
        y = _blocksum(x, self.rank) @ d
        return jnp.tile(y, kernel.shape[1] // y.shape[-1])

    def rows(self, ids: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        if self.mode == "bat":
            return _bat(float32(kernel), factors["D"])[ids]
        y = factors["D"][ids % self.rank]
        return jnp.tile(y, kernel.shape[1] // y.shape[-1])

    def merge(self, kernel: jax.Array, factors: Factors) -> jax.Array:
        if self.mode == "bat":
            with jax.default_matmul_precision("highest"):
                return float32(kernel) + _bat(float32(kernel), factors["D"])
        return float32(kernel) + self._tiled(kernel.shape, factors["D"])

    def unmerge(self, merged: jax.Array, factors: Factors) -> jax.Array:
        if self.mode == "bat":
            with jax.default_matmul_precision("highest"):
                return _unbat(float32(merged), factors["D"])
        return float32(merged) - self._tiled(merged.shape, factors["D"])

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * (self.mini_rank if self.mode == "mini" else n_out)

    def thin(self, factors: Factors, n_in: int, n_out: int) -> tuple[jax.Array, jax.Array] | None:
        rows, d = jax.nn.one_hot(jnp.arange(n_in) % self.rank, self.rank), factors["D"]
        return None if self.mode == "bat" else (rows, jnp.tile(d, (1, n_out // d.shape[1])))

    joint = thin

    def sized(self, size: int, n_in: int, n_out: int) -> Method:
        return replace(self, rank=min(size, n_in))

    def problems(self, n_in: int, n_out: int) -> list[str]:
        r = self.rank
        found = [f"rank {r} exceeds in = {n_in}"] if r > n_in else []
        if self.mode == "mini" and n_out % self.mini_rank:
            found.append(f"mini_rank {self.mini_rank} does not divide out = {n_out}")
        if self.mode == "bat" and (n_in % r or n_out % r):
            found.append(f"rank {r} does not divide both in and out, as mode bat needs")
        return found

    def _tiled(self, shape: tuple[int, ...], d: jax.Array) -> jax.Array:
        """The update of modes miss and mini as a dense matrix ``(in, out)``."""
        n_in, n_out = shape
        return jnp.tile(d, (-(-n_in // self.rank), n_out // d.shape[1]))[:n_in]


def _blocksum(x: jax.Array, rank: int) -> jax.Array:
    """``(..., in)`` to ``(..., rank)``: the sums of every ``rank``-th entry, added in float32."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % rank)])
    shards = x.reshape(*x.shape[:-1], x.shape[-1] // rank, rank)
    return shards.sum(-2, dtype=jnp.float32).astype(x.dtype)


def _blocks(kernel: jax.Array, rank: int) -> jax.Array:
    """``(in, out)`` as blocks ``(in / rank, out / rank, rank, rank)``."""
    n_in, n_out = kernel.shape
    return kernel.reshape(n_in // rank, rank, n_out // rank, rank).swapaxes(1, 2)


def _dense(blocks: jax.Array) -> jax.Array:
    """The inverse of `_blocks`."""
    shards, groups, rank, _ = blocks.shape
    return blocks.swapaxes(1, 2).reshape(shards * rank, groups * rank)


def _bat(kernel: jax.Array, d: jax.Array) -> jax.Array:
    """The update of mode bat: ``D_o^T (W[i, o] + I)``, as PEFT's ``W D + D`` on its ``W^T``."""
    rank = d.shape[-1]
    eye = jnp.eye(rank, dtype=kernel.dtype)
    return _dense(d.swapaxes(-1, -2) @ (_blocks(kernel, rank) + eye))


def _unbat(merged: jax.Array, d: jax.Array) -> jax.Array:
    """``W[i, o] = (I + D_o^T)^-1 (W'[i, o] - D_o^T)``."""
    rank, dt = d.shape[-1], d.swapaxes(-1, -2)
    return _dense(jax.vmap(inverse)(jnp.eye(rank) + dt) @ (_blocks(merged, rank) - dt))
