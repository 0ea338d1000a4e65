"""SwitchLoRA (arXiv 2406.06564): low-rank training whose vectors are exchanged a few at a time."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra.draws import fold_path, uniform
from lora_mini_jax.algebra.low_rank import Product
from lora_mini_jax.method import Factors, Kernels, Stepped
from lora_mini_jax.settings.checks import require_number, require_whole
from lora_mini_jax.tree import over_lead


@dataclass(frozen=True)
class SwitchLoRA(Product):
    """SwitchLoRA: ``W' = W + dense + A @ B / rank``, for training at full rank, from scratch.

    ``A (in, rank)`` and ``B (rank, out)`` are trained: ``rank (in + out)`` float32 parameters. Each
    side has ``c = min(in, out)`` candidate vectors: its slots, ``A[:, i]`` or ``B[i]``, hold
    ``rank`` of them, and the queues ``A_pool (c - rank, in)`` and ``B_pool (c - rank, out)`` the
    others. A switch exchanges a slot's vector for the first of the queue, at whose end it goes, and
    ``dense`` takes up the difference, so that the function stays as it is. The slot's counterpart
    on the other side starts Adam afresh (`optim.scale_by_element_adam`) and is held for some steps.

    After update ``t`` each matrix switches ``rank / interval`` slots a side, stochastically
    rounded: ``interval = interval0 / 0.3^((t + 1) / (ratio total_steps))``. Slots take turns, in
    ``B`` half a round ahead of ``A``. Fewer are switched where more than half would be held, or a
    queue ends, so held slots are never reached. The authors switch before the update, with the
    gradient at hand, we after it: the same algorithm a step later, for a switch changes neither
    the function nor, held vectors aside, any gradient.

    Candidates are uniform, of standard deviations ``(rank sqrt(out) / in^1.5)^(1/4) / 3^(1/4)`` and
    ``(rank / sqrt(in out))^(1/4) / 3^(1/4)``. At the start ``dense = -A @ B / rank``, so the model
    is unchanged. Keep the kernels in float32: every layer rounds ``W + dense`` to their dtype.

    Args:
        rank: the inner width, from 2 and below ``min(in, out)``.
        interval0: after how many steps a slot's turn comes again, at the start; from 1.
        ratio: the share of all steps in which switches become 0.3 times as frequent.
        total_steps: how many updates the training will have.
        freeze_steps: for how many updates a counterpart is held.
        dropout: share of the layer's input that ``A`` and ``B`` do not see in training.

    Raises:
        UserError: a value that is not allowed.

    Example:
        >>> SwitchLoRA(rank=4, total_steps=2000).n_trainable(64, 32)
        384
    """

    name = "switchlora"
    restarts = True
    least_rank = 2

    interval0: float = 40.0
    ratio: float = 0.1
    total_steps: int = 1000
    freeze_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("interval0", self.interval0, low=1)
        require_number("ratio", self.ratio)
        require_whole("total_steps", self.total_steps)
        require_whole("freeze_steps", self.freeze_steps)

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        (n_in, n_out), r = kernel.shape, self.rank
        left, right = jax.random.split(key)
        # The bounds are sqrt(3) standard deviations.
        a = uniform(left, (min(n_in, n_out), n_in), (3 * r * n_out**0.5 / n_in**1.5) ** 0.25)
        b = uniform(right, (min(n_in, n_out), n_out), (3 * r / (n_in * n_out) ** 0.5) ** 0.25)
        trainable = {"A": a[:r].T, "B": b[:r]}
        held = {name: jnp.zeros(r, jnp.int32) for name in ("A_held", "B_held")}
        frozen = {"dense": -super().update(trainable), "A_pool": a[r:], "B_pool": b[r:]}
        return trainable, {**frozen, **held, "switched": jnp.zeros((), jnp.int32)}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["A"], factors["B"] / self.rank

    def shift(self, factors: Factors) -> jax.Array:
        return factors["dense"]

    def update(self, factors: Factors) -> jax.Array:
        return factors["dense"] + super().update(factors)

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * (n_in + n_out)

    def problems(self, n_in: int, n_out: int) -> list[str]:
        if self.rank >= (most := min(n_in, n_out)):
            return [f"rank {self.rank} is not below min(in, out) = {most}: nothing to switch to"]
        return []

    @property
    def stored(self) -> frozenset[str]:
        return self.scratch | {"dense"}

    @property
    def scratch(self) -> frozenset[str]:
        return frozenset({"A_pool", "B_pool", "A_held", "B_held", "switched"})

    def held(self, frozen: Factors) -> Factors:
        return {"A": frozen["A_held"][..., None, :] > 0, "B": frozen["B_held"][..., :, None] > 0}

    def step(self, key: jax.Array, t: jax.Array, kernels: Kernels, grads: Kernels) -> Stepped:
        rate = self.rank / self.interval0 * 0.3 ** ((t + 1) / (self.ratio * self.total_steps))
        stepped = Stepped({}, {}, {})
        for path, factors in kernels.items():
            lead = factors["switched"].shape
            draws = jax.random.uniform(fold_path(key, path), lead)
            wanted = jnp.floor(rate + draws).astype(jnp.int32)
            parts = over_lead(self._switched, len(lead))(wanted, factors)
            stepped.trainable[path], stepped.frozen[path], stepped.reset[path] = parts
        return stepped

    def _switched(self, wanted: jax.Array, factors: Factors) -> tuple[Factors, Factors, Factors]:
        """One matrix after ``wanted`` switches a side, or as many as can be: its trained leaves,
        its frozen ones, and what the optimiser forgets."""
        a, b, begun, r = factors["A"], factors["B"], factors["switched"], self.rank
        held_a, held_b = (jnp.maximum(factors[name] - 1, 0) for name in ("A_held", "B_held"))
        turn_a = (jnp.arange(r) - begun) % r  # after how many switches each slot has its turn
        turn_b = (turn_a - r // 2) % r
        # Held are the last slots that had their turn on the other side, half a round away: as long
        # as they are half of all at most, no turn comes to a held slot.
        n = jnp.minimum(jnp.minimum(wanted, len(factors["A_pool"])), r // 2 - (held_a > 0).sum())
        columns, a_pool = _exchange(a.T, factors["A_pool"], begun, turn_a, n)
        new_b, b_pool = _exchange(b, factors["B_pool"], begun, turn_b, n)
        new_a, afresh_a, afresh_b = columns.T, turn_b < n, turn_a < n
        with jax.default_matmul_precision("highest"):
            dense = factors["dense"] + ((a - new_a) @ b + new_a @ (b - new_b)) / r
        held_a = jnp.where(afresh_a, self.freeze_steps, held_a)
        held_b = jnp.where(afresh_b, self.freeze_steps, held_b)
        frozen = {"dense": dense, "A_pool": a_pool, "B_pool": b_pool}
        frozen |= {"A_held": held_a, "B_held": held_b, "switched": begun + n}
        return {"A": new_a, "B": new_b}, frozen, {"A": afresh_a[None, :], "B": afresh_b[:, None]}


def _exchange(
    slots: jax.Array, pool: jax.Array, begun: jax.Array, turn: jax.Array, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The ``n`` slots whose turn it is, and the first ``n`` of the pool, in each other's places.
    The pool ``(p, d)`` is a queue in a ring, its head at ``begun % p``."""
    size, goes = len(pool), turn < n
    place = (begun + turn) % size
    taken = jnp.where(goes[:, None], pool[place], slots)
    return taken, pool.at[jnp.where(goes, place, size)].set(slots, mode="drop")
